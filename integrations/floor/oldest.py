"""Print the oldest versions that pyproject.toml allows inside a framework, and of the packages that tests need."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]

wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["transformers"]
wanted += PROJECT["optional-dependencies"]["train"]
# gradselect[train] asks for newer versions of both than a Trainer needs.
for requirement in (*wanted, "trl>=1.10"):
    if not requirement.startswith(("gradselect", "torch", "transformers>=5.18", "trl>=1.16")):
        sys.stdout.write(requirement.replace(">=", "==") + "\n")
