"""The command `python -m gradselect.integrations.llamafactory`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
