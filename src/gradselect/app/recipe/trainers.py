"""The section `trainer` of a recipe: the loss that a run minimises, one class for each trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from gradselect.methods import Settings

BUILT_IN_REWARDS = ("gsm8k", "math")
"""Rewards of the rule-based answer checker of `gradselect evaluate`."""


class AbstractTrainer(Settings):
    """Common keys of all trainers but `sft`.

    Attributes:
        reads: format of the data that it trains on.
        reference: how it uses the start weights: "always", "beta" (only if `beta` is above 0) or "never".
    """

    reads: ClassVar[str]
    reference: ClassVar[Literal["always", "beta", "never"]] = "never"

    @property
    def uses_reference(self) -> bool:
        """True if the loss compares with the model before training."""
        return self.reference == "always" or (self.reference == "beta" and getattr(self, "beta", 0.0) > 0)


class SftSettings(Settings):
    """Supervised fine-tuning: the likelihood of given text. The default for data of a language model."""

    name: Literal["sft"]


class DpoSettings(AbstractTrainer):
    """Direct preference optimization: the chosen answer against the rejected one (Rafailov et al., arXiv 2305.18290).

    Attributes:
        beta: strength of the pull towards the reference, the model before training.
        loss: form of the loss: "sigmoid" of the paper, "hinge" (SLiC), "ipo" (arXiv 2310.12036), or "robust" to wrong
            labels (arXiv 2403.00409).
        label_smoothing: assumed share of pairs whose answers are swapped. Used by "robust".
        precompute_reference: compute the log-probabilities of the reference before the first step. Training then needs
            no second model and no further forward pass.
    """

    reads: ClassVar[str] = "preference"
    reference: ClassVar[Literal["always", "beta", "never"]] = "always"

    name: Literal["dpo"]
    beta: PositiveFloat = 0.1
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    precompute_reference: bool = False

    @model_validator(mode="after")
    def check_smoothing(self) -> Self:
        if (self.label_smoothing > 0) != (self.loss == "robust"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} with loss={self.loss}: loss=robust is the one that uses it; "
                "write e.g. trainer.loss=robust trainer.label_smoothing=0.1"
            )
        return self


class KtoSettings(AbstractTrainer):
    """KTO: single answers, each good or bad (Ethayarajh et al., arXiv 2402.01306). Pairs are read as two answers.

    Attributes:
        beta: strength of the pull towards the reference, the model before training.
        loss: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which estimates no divergence.
        desirable_weight: weight of the loss of good answers.
        undesirable_weight: weight of the loss of bad answers.
        precompute_reference: compute the log-probabilities of the reference before the first step.
    """

    reads: ClassVar[str] = "preference"
    reference: ClassVar[Literal["always", "beta", "never"]] = "always"

    name: Literal["kto"]
    beta: PositiveFloat = 0.1
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0
    precompute_reference: bool = False


class OrpoSettings(AbstractTrainer):
    """ORPO: likelihood of the chosen answer and its odds against the rejected one (Hong et al., arXiv 2403.07691).

    There is no reference. The likelihood counts the tokens of the prompt too.

    Attributes:
        beta: weight of the odds; lambda in the paper.
    """

    reads: ClassVar[str] = "preference"

    name: Literal["orpo"]
    beta: PositiveFloat = 0.1


class AbstractSamplingTrainer(AbstractTrainer):
    """Draws answers from the model while it trains, and rewards them.

    Attributes:
        reward: what rewards an answer: "gsm8k" or "math" (1 if the answer is right by the rules of
            `gradselect evaluate`, else 0; needs data.answer), or a Python function, "package.module:function" or
            "file.py:function". Several are summed.
        reward_weights: weight of each reward in the sum. Default: 1.
        num_generations: answers to each prompt. run.batch_size x run.accumulation answers make a step.
        max_completion_length: tokens of an answer; longer ones are cut off there.
        temperature: temperature of the draw.
        top_p: draw from the most likely tokens whose probabilities sum up to this.
        top_k: draw from this many most likely tokens. 0: from all.
        beta: weight of the divergence from the reference, the model before training. 0: there is no reference.
        epsilon: clip the ratio of new to old probabilities to 1 - epsilon and 1 + epsilon.
    """

    reads: ClassVar[str] = "prompts"
    reference: ClassVar[Literal["always", "beta", "never"]] = "beta"

    name: Any
    reward: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    num_generations: Annotated[int, Field(ge=2, le=10**4)] = 8
    max_completion_length: Annotated[int, Field(ge=1, le=2**20)] = 256
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    beta: NonNegativeFloat = 0.0
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def check_rewards(self) -> Self:
        if not self.reward:
            raise ValueError(
                "reward is missing: name what rewards an answer, e.g. trainer.reward=gsm8k (with data.answer='{answer}'"
                ") or trainer.reward=rewards.py:my_function"
            )
        for name in self.reward:
            if name not in BUILT_IN_REWARDS and not all(part.strip() for part in name.rpartition(":")):
                raise ValueError(
                    f"reward={name!r} is none of {', '.join(BUILT_IN_REWARDS)} and no function; write "
                    "package.module:function or file.py:function"
                )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights={list(self.reward_weights)} for {len(self.reward)} rewards; give one weight for each"
            )
        return self


class GrpoSettings(AbstractSamplingTrainer):
    """GRPO: an answer's reward against those of the other answers to its prompt (Shao et al., arXiv 2402.03300).

    Attributes:
        loss: how the loss of tokens is averaged: "dapo" over all tokens of the step (arXiv 2503.14476), "grpo" within
            each answer first, "bnpo" over the tokens of a forward pass, "dr_grpo" by a constant length (arXiv
            2503.20783).
        scale_rewards: divide advantages by the standard deviation of the rewards in the "group" of a prompt, in the
            "batch", or not at all ("none").
    """

    name: Literal["grpo"]
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"


class RlooSettings(AbstractSamplingTrainer):
    """RLOO: REINFORCE with the mean reward of the other answers as baseline (Ahmadian et al., arXiv 2402.14740).

    Attributes:
        beta: weight of the divergence from the reference, which is taken off the reward. 0: there is no reference.
        normalize_advantages: divide advantages by their standard deviation.
    """

    name: Literal["rloo"]
    beta: NonNegativeFloat = 0.05
    normalize_advantages: bool = False


def draws_answers(recipe: Mapping[str, Any]) -> bool:
    """Return True if a recipe of plain values has an `AbstractSamplingTrainer`.

    Its loss on held-out prompts says nothing of how good the answers are.

    Example:
        >>> draws_answers({"trainer": {"name": "grpo"}}), draws_answers({"trainer": None})
        (True, False)
    """
    annotations = [kind.model_fields["name"].annotation for kind in AbstractSamplingTrainer.__subclasses__()]
    return (recipe.get("trainer") or {}).get("name") in {get_args(annotation)[0] for annotation in annotations}


Trainer = Annotated[
    SftSettings | DpoSettings | KtoSettings | OrpoSettings | GrpoSettings | RlooSettings | None,
    Field(discriminator="name"),
]
"""None: supervised fine-tuning, or classification, as the data say."""
