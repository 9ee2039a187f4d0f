"""Print the oldest version that pyproject.toml allows of each package that gradselect[train] needs, but torch."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]

wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["transformers"]
wanted += PROJECT["optional-dependencies"]["train"]
for requirement in wanted:
    if not requirement.startswith(("gradselect", "torch")):
        sys.stdout.write(requirement.replace(">=", "==") + "\n")
