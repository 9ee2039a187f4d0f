"""Methods made from policies: one for each policy with a method name, and presets with other defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from pydantic import create_model

from gradselect import policies
from gradselect.blocks import AbstractPolicy
from gradselect.policies import MISA, Cyclic, GradNormTopK, Uniform

from .blocks import AbstractBlockMethod, has_other_layers
from .generated_keys import dataclass_keys, describe, named_classes, one_of


class AbstractPolicyMethod(AbstractBlockMethod):
    """A method whose own keys are the settings of a policy; `seed` is the run's.

    Where `among` is no key and the model holds several stacks of layers, the language model's layers are meant.

    Attributes:
        policy_class: class of the policy.
    """

    policy_class: ClassVar[type[AbstractPolicy]]

    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        own = self.model_dump(exclude={"name", *AbstractBlockMethod.model_fields})
        settings = {setting.name for setting in fields(self.policy_class)}
        seeded = {"seed": seed} if "seed" in settings else {}
        if "among" in settings and "among" not in own and has_other_layers(block_names):
            own["among"] = ("layer.*",)
        return self.policy_class(**own, **seeded)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A policy under a name of its own, with other defaults.

    Args:
        name: `method.name` in recipes.
        about: description of the method.
        policy: class of the policy.
        defaults: values in place of those of the policy and of `AbstractBlockMethod`.
        types: types in place of those of the policy.
        without: settings of the policy that are no keys.
    """

    name: str
    about: str
    policy: type[AbstractPolicy]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def method(self) -> type[AbstractPolicyMethod]:
        """Build the settings class."""
        shared = {key: (info.annotation, info.default) for key, info in AbstractBlockMethod.model_fields.items()}
        keys: dict[str, Any] = {
            **{key: entry for key, entry in shared.items() if key in self.defaults},
            **dataclass_keys(self.policy, without=("seed", *self.without)),
        }
        keys = {
            key: (self.types.get(key, annotation), self.defaults.get(key, default))
            for key, (annotation, default) in keys.items()
        }
        method: Any = create_model(
            f"{self.name.capitalize()}Method",
            __base__=AbstractPolicyMethod,
            __doc__=self.about,
            name=(one_of(self.name), ...),
            **keys,
        )
        method.policy_class = self.policy
        return method


PRESETS = (
    Preset(
        name="grass",
        about="GRASS (Tian et al., arXiv 2604.07808) on `gradselect.GradNormTopK`. The numbers are our choice.",
        policy=GradNormTopK,
        defaults={
            "refresh": 20,
            "temperature": 1e-3,
            "ema": 0.9,
            "probe_steps": 20,
            "norm": "rms",
            "among": ("layer.*",),
        },
    ),
    Preset(
        name="lisa",
        about="LISA (Pan et al., arXiv 2403.17919): random layers for some steps; embedding, final norm, head always.",
        policy=Uniform,
        defaults={"count": 2, "every": 20, "always": ("embedding", "norm", "head"), "residency": "keep"},
        types={"count": int},
        without=("fraction", "among"),
    ),
    Preset(
        name="badam",
        about="BAdam (Luo et al., arXiv 2404.02827) on `gradselect.Cyclic`: one layer at a time, its state is dropped.",
        policy=Cyclic,
        defaults={"among": ("layer.*",), "residency": "drop"},
    ),
    Preset(
        name="misa",
        about="""MISA (Liu et al., arXiv 2511.00056): matrices, drawn by importance; state dropped after a period.

        `gradselect.MISA` says which parts are from the paper.
        """,
        policy=MISA,
        defaults={"among": ("layer.*.*.*",), "residency": "drop", "blocks": "matrix"},
    ),
)
"""Methods of the literature."""


def policy_methods() -> list[type[AbstractPolicyMethod]]:
    """Build the method of every policy of `gradselect.policies` that has a method name."""
    named = named_classes(policies, AbstractPolicy)
    return [Preset(name=name, about=describe(policy), policy=policy).method() for name, policy in named.items()]
