"""Print the oldest versions that pyproject.toml allows inside a framework, and of the packages that tests need."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]

wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["transformers"]
wanted += PROJECT["optional-dependencies"]["train"]
for requirement in wanted:
    # gradselect[train] asks for a newer transformers than a Trainer needs.
    if not requirement.startswith(("gradselect", "torch", "transformers>=5.17")):
        sys.stdout.write(requirement.replace(">=", "==") + "\n")
