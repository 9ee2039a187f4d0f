"""Learning rate to begin with, from the method, the data and the width of the model."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from gradselect.app.models import load_configuration
from gradselect.app.recipe import AbstractBlockMethod, AbstractMaskMethod, FullMethod, LoraMethod, Method, Recipe
from gradselect.usage import UsageError

Kind = Literal["full", "blocks", "lora"]

MEASURED_WIDTH = 576
RATES: dict[Kind, float] = {"full": 5e-5, "blocks": 2e-4, "lora": 5e-4}
"""At the width of SmolLM2-135M. Full fine-tuning and blocks: half of the best rate of suites/smollm2.yaml, since longer
runs want less; AdaGradSelect, uniform draws and layers chosen once had the same there. LoRA: ten times that of full
fine-tuning (Schulman et al., LoRA Without Regret, 2025). Half of the best rates there were 1e-3 at rank 16 with the
embedding, and 2e-4 at rank 256."""
MEASURED_POLICIES = ("adagradselect", "uniform")
"""Methods whose best rate on SmolLM2-135M is that of blocks, and `gradnorm` if it selects once."""
EXPONENT = 0.78
"""Power of the width by which the best rate falls: what Schulman et al. fitted to Llama."""
USUAL_WIDTH = 2048
"""Width of a model of a billion weights, taken where the model's is not known."""
RATE_OF_OTHERS = 1e-4
RATE_OF_PREFERENCES = 5e-7
RATE_OF_FEW_WEIGHTS_ON_PREFERENCES = 1e-5
"""For what is not measured: preferences and rewards, and adapters and packages of which nothing is known. Our choice,
whatever the width."""
LIKE_LORA = ("adalora", "ether", "etherplus", "lorta")
"""Adapters whose best rates in suites/seeds/decoder.yaml were LoRA's or higher, as were those of masks of a few
entries. Propulsion's was a third of LoRA's there, and 0.4 of it in suites/seeds/stsb.yaml."""
LIKE_FULL = ("gmt", "mofo", "hft")
"""Methods that train a large share of the weights at each step: nearer to all of them than to a few. GMT's best rate in
suites/seeds was that of full fine-tuning."""
BLOCKS_ON_LABELS = 2.0
"""Factor of full fine-tuning's rate with which blocks begin on labels. On STS-B (suites/seeds/stsb.yaml) the best rate
of layers was four times that of full fine-tuning, of matrices and with a coverage twice."""


class _Basis(NamedTuple):
    """Rate that a method begins with: that of a kind times a factor, and words on why."""

    kind: Kind
    words: str
    factor: float = 1.0


def first_rate(recipe: Recipe) -> tuple[float, str]:
    """Return a rate for a recipe that names none, and a few words on where it comes from."""
    trains_blocks = isinstance(recipe.method, AbstractBlockMethod | FullMethod)
    if recipe.data.format in ("preference", "prompts"):
        return RATE_OF_PREFERENCES if trains_blocks else RATE_OF_FEW_WEIGHTS_ON_PREFERENCES, "cautious, not measured"
    basis = _basis_of(recipe.method)
    if basis is None:
        return RATE_OF_OTHERS, "cautious, not measured"
    if recipe.data.format == "classification" and basis.kind == "blocks":
        basis = _Basis("full", "twice that of full fine-tuning, as on STS-B, ", BLOCKS_ON_LABELS)
    width = size_of(recipe, "hidden_size")
    known = f"a width of {width:,}" if width else f"a width of {USUAL_WIDTH:,}, since the model's is not known"
    rate = float(f"{scaled_rate(basis.kind, width or USUAL_WIDTH) * basis.factor:.0e}")
    return rate, f"{basis.words}from runs of SmolLM2-135M, for {known}"


def _basis_of(method: Method) -> _Basis | None:
    """Return the basis of a method's rate, None if nothing is known. Its words end where "from runs of" goes on."""
    tenfold, unmeasured = "ten times that of full fine-tuning, ", f"not measured for {method.name}: "
    selects_once = method.name == "gradnorm" and method.model_dump()["refresh"] is None
    match method:
        case LoraMethod(name="lora"):
            return _Basis("lora", tenfold)
        case LoraMethod(name="rslora"):
            # Its scale is alpha / sqrt(rank), LoRA's alpha / rank: so a first step moves the weights as far.
            return _Basis("lora", f"{unmeasured}LoRA's divided by the root of the rank, ", 1 / math.sqrt(method.rank))
        case FullMethod():
            return _Basis("full", "")
        case _ if method.name in LIKE_FULL:
            return _Basis("full", f"{unmeasured}that of full fine-tuning, ")
        case AbstractBlockMethod() if method.name in MEASURED_POLICIES or selects_once:
            return _Basis("blocks", "")
        case AbstractBlockMethod():
            return _Basis("blocks", f"{unmeasured}AdaGradSelect's, ")
        case _ if method.name == "propulsion":
            return _Basis("lora", f"{unmeasured}a third of LoRA's, ", 1 / 3)
        case _ if isinstance(method, LoraMethod | AbstractMaskMethod) or method.name in LIKE_LORA:
            return _Basis("lora", f"{unmeasured}LoRA's, {tenfold}")
    return None


def scaled_rate(kind: Kind, width: int) -> float:
    """Return a rate of one digit for "full", "blocks" or "lora" at a width.

    Example:
        >>> scaled_rate("blocks", 2048)
        7e-05
    """
    return float(f"{RATES[kind] * (MEASURED_WIDTH / width) ** EXPONENT:.0e}")


def size_of(recipe: Recipe, name: str) -> int | None:
    """Return a size of the model, such as "hidden_size"; None where its configuration cannot be read, or has none."""
    model = recipe.model
    origin = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = load_configuration(model.path, key="model.path", **origin)
    except UsageError:  # the command says what is wrong when it loads the model
        return None
    size = getattr(config.get_text_config(), name, None)
    return size if isinstance(size, int) and size > 0 else None
