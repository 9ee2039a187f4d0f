"""Selective training in axolotl, by two keys of its YAML.

    plugins: [gradselect.integrations.axolotl.SelectivePlugin]
    gradselect: {name: adagradselect, fraction: 0.3, jsonl: selection.jsonl}

`gradselect` takes the keys of `gradselect.method`, and `jsonl`, the file for the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, field_validator, model_validator

from gradselect import UsageError
from gradselect.integrations.section import parse_section
from gradselect.integrations.transformers import SelectiveTraining

KEY = "gradselect"

RIVALS = {
    "lisa_n_layers": "LISA selects layers as well",
    "loraplus_lr_ratio": "rates of its own need axolotl's optimizer",
    "embedding_lr": "rates of its own need axolotl's optimizer",
    "embedding_lr_scale": "rates of its own need axolotl's optimizer",
    "lr_groups": "rates of its own need axolotl's optimizer",
}
"""Keys of axolotl that it would drop in silence, or that fight over the weights."""


class SelectiveArguments(BaseModel):
    """Section `gradselect` of axolotl's configuration; axolotl adds it to its own.

    Example:
        >>> SelectiveArguments(gradselect={"name": "uniform", "count": 2}).gradselect["count"]
        2
    """

    gradselect: Any = None

    @field_validator(KEY, mode="before")
    @classmethod
    def _check_section(cls, value: Any) -> Any:
        if value is not None:
            parse_section(value, key=KEY)
        return dict(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check_rest(self) -> SelectiveArguments:
        if self.gradselect is None:
            raise UsageError(
                f"the plugin SelectivePlugin needs a section {KEY}; write e.g. {KEY}: {{name: adagradselect, "
                "fraction: 0.2}, or take the plugin out of `plugins`"
            )
        for key, why in RIVALS.items():
            if getattr(self, key, None) is not None:
                raise UsageError(f"{key} beside {KEY}: {why}, and axolotl would ignore one of them; leave one out")
        return self


class SelectivePlugin(BasePlugin):
    """Plugin of axolotl: the trainer gets the optimizer of the section `gradselect`, and its callback.

    Rate, weight decay, betas, schedule, accumulation and clipping stay axolotl's keys.

    Example:
        >>> SelectivePlugin().get_input_args()
        'gradselect.integrations.axolotl.SelectiveArguments'
    """

    def get_input_args(self) -> str:
        return f"{SelectiveArguments.__module__}.{SelectiveArguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        method, jsonl = parse_section(cfg[KEY], key=KEY)
        SelectiveTraining(method=method, jsonl=jsonl).attach(trainer)
