"""The process of one device: torchrun runs this file in place of LLaMA-Factory's launcher."""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, in which modules have short names

    from gradselect.integrations.llamafactory.command import main_of_worker

    sys.exit(main_of_worker())
