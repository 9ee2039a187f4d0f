"""Methods made from policies: one for each policy with a method name, and presets with other defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import create_model

from gradselect import policies
from gradselect.blocks import AbstractPolicy
from gradselect.policies import MISA, Cyclic, GradNormTopK, LoSiA, Spectrum, Stratified, Uniform

from .blocks import AbstractBlockMethod, has_other_layers
from .generated_keys import dataclass_keys, describe, named_classes, one_of


class AbstractPolicyMethod(AbstractBlockMethod):
    """A method whose own keys are the settings of a policy; `seed` is the run's.

    Where `among` is no key and the model holds several stacks of layers, the language model's layers are meant.

    Attributes:
        policy_class: class of the policy.
        pinned: settings of the policy that are no keys.
    """

    policy_class: ClassVar[type[AbstractPolicy]]
    pinned: ClassVar[Mapping[str, Any]] = {}

    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        own = self.model_dump(exclude={"name", *AbstractBlockMethod.model_fields})
        settings = {setting.name for setting in fields(self.policy_class)}
        seeded = {"seed": seed} if "seed" in settings else {}
        if "among" in settings and "among" not in own and has_other_layers(block_names):
            own["among"] = ("layer.*",)
        return self.policy_class(**own, **seeded, **self.pinned)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A policy under a name of its own, with other defaults.

    Args:
        name: `method.name` in recipes.
        about: description of the method.
        policy: class of the policy.
        defaults: values in place of those of the policy and of `AbstractBlockMethod`.
        types: types in place of those of the policy.
        without: settings of the policy that are no keys and keep its defaults.
        pinned: settings of the policy that are no keys, with other values.
    """

    name: str
    about: str
    policy: type[AbstractPolicy]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    pinned: Mapping[str, Any] = field(default_factory=dict)

    def method(self) -> type[AbstractPolicyMethod]:
        """Build the settings class."""
        shared = {key: (info.annotation, info.default) for key, info in AbstractBlockMethod.model_fields.items()}
        keys: dict[str, Any] = {
            **{key: entry for key, entry in shared.items() if key in self.defaults},
            **dataclass_keys(self.policy, without=("seed", *self.without, *self.pinned)),
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
        method.policy_class, method.pinned = self.policy, self.pinned
        return method


_OF_SLICES = {"count": 1, "blocks": "columns", "among": ("layer.*.*.*",)}
_WITHOUT = ("by", "fraction", "every", "stagger")


def _fixed_slices(*, name: str, about: str) -> Preset:
    """Return a preset of slices of each layer that are drawn once."""
    return Preset(
        name=name,
        about=about,
        policy=Stratified,
        defaults={**_OF_SLICES, "residency": "keep"},
        types={"count": int},
        without=_WITHOUT,
        pinned={"order": "fixed"},
    )


PRESETS = (
    Preset(
        name="grass",
        about="""GRASS (Tian et al., arXiv 2604.07808) on `gradselect.GradNormTopK`. The numbers are our choice.

        A number as `temperature` is on the scale of the RMS gradient of your model.
        """,
        policy=GradNormTopK,
        defaults={
            "refresh": 20,
            "temperature": "spread",
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

        `gradselect.MISA` says which parts are from the paper. `exit_step: true` adds the paper's last step of a period.
        """,
        policy=MISA,
        defaults={"among": ("layer.*.*.*",), "residency": "drop", "blocks": "matrix"},
    ),
    Preset(
        name="spectrum",
        about="""Spectrum (Hartford et al., arXiv 2406.06623): of each type of matrix, those of largest signal to noise.

        Embedding and head train too, as in the lists of the authors' code. `gradselect.Spectrum` says which parts are
        from the paper.
        """,
        policy=Spectrum,
        defaults={"blocks": "matrix", "always": ("embedding", "head"), "residency": "keep"},
    ),
    Preset(
        name="hft",
        about="""HFT (Hui et al., arXiv 2404.18466) on `gradselect.Stratified`: half of each category of matrices.

        From the paper: in each layer 2 of 4 attention matrices and half of those of the MLP (1 or 2 of 3), half of the
        norms over all layers; embedding and head always; a new random draw in each round of training. A run is one
        round by default; with `order: random` a round lasts `every` steps.
        """,
        policy=Stratified,
        defaults={"fraction": 0.5, "order": "fixed", "blocks": "matrix"},
        types={"fraction": float, "order": Literal["fixed", "random"]},
        without=("count", "stagger"),
        pinned={"by": "category"},
    ),
    _fixed_slices(
        name="paca",
        about="""PaCA (Woo et al., arXiv 2503.01905) on slices: random columns of every linear, drawn once.

        From the paper: columns of the weight, whose gradient needs only these columns of the input. Here they stand in
        one range, the same in all linears of a layer; the paper draws single columns for each linear, and scales their
        rate as LoRA does. The numbers are our choice: the paper's scripts train 8 or 16 columns.
        """,
    ),
    _fixed_slices(
        name="s2ft",
        about="""S2FT (Yang et al., arXiv 2412.06289) on slices: fixed columns of every linear of a layer.

        From the paper: input columns of the attention's output and of the MLP's down projection, which are heads and
        channels, drawn once at random. Here the same range of columns trains in the other linears of the layer too,
        each layer has its share, and heads may be cut. The numbers are our choice: the paper's scripts train 5.2 % of
        the heads and 2 % of the channels, drawn over all layers together.
        """,
    ),
    Preset(
        name="chunkft",
        about="""ChunkFT (arXiv 2605.21177) on slices: all columns of the layers in turn, the state offloaded.

        From the paper and its code: parts of all weights, cut along their columns, take turns, at each update or every
        few; the state of the others is in host memory. Their parts are equal numbers of bytes in the order of the
        model, so that one is a few layers. Here a part is one range of columns of each layer, another one in each, and
        embedding, norms and head do not train unless `always` names them. The numbers are our choice.
        """,
        policy=Stratified,
        defaults=_OF_SLICES,
        types={"count": int},
        without=tuple(name for name in _WITHOUT if name not in ("every", "stagger")),
        pinned={"order": "rotate"},
    ),
    Preset(
        name="losia",
        about="""LoSiA (Wang et al., arXiv 2507.04487) on slices: each layer's most important ones, layers in turn.

        `gradselect.LoSiA` says which parts are from the paper. The rate of new slices warms up over `rewarm_steps`
        updates, in the paper those of a slot; that of the first ones does too. In the authors' scripts embedding, norms
        and head train whole as well: `among: null`. By default they do not train here.
        """,
        policy=LoSiA,
        defaults={**_OF_SLICES, "residency": "drop", "rewarm_steps": 50},
        types={"count": int},
        without=("by", "fraction"),
    ),
)
"""Methods of the literature."""


def policy_methods() -> list[type[AbstractPolicyMethod]]:
    """Build the method of every policy of `gradselect.policies` that has a method name."""
    named = named_classes(policies, AbstractPolicy)
    return [Preset(name=name, about=describe(policy), policy=policy).method() for name, policy in named.items()]
