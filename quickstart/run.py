"""What `make quickstart` runs: `gradselect quickstart` into quickstart/out, which is made anew."""

import shutil
from pathlib import Path

from gradselect.app.cli import main

OUT = Path(__file__).parent / "out"

if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    main(["quickstart", str(OUT)])
