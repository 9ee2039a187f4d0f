"""Learning rate to begin with, from the method, the data and the width of the model."""

from __future__ import annotations

from gradselect.app.models import load_configuration
from gradselect.app.recipe import AbstractBlockMethod, FullMethod, LoraMethod, Recipe
from gradselect.usage import UsageError

MEASURED_WIDTH = 576
RATES = {"full": 5e-5, "blocks": 2e-4, "lora": 5e-4}
"""At the width of SmolLM2-135M. Full fine-tuning and blocks: half of the best rate of suites/smollm2.yaml, since longer
runs want less; AdaGradSelect, uniform draws and layers chosen once had the same there; it is taken for other policies.
LoRA: ten times that of full fine-tuning (Schulman et al., LoRA Without Regret, 2025)."""
EXPONENT = 0.78
"""Power of the width by which the best rate falls: what Schulman et al. fitted to Llama."""
USUAL_WIDTH = 2048
"""Width of a model of a billion weights, taken where the model's is not known."""
RATE = 1e-5
RATE_OF_FEW_WEIGHTS = 1e-4
RATE_OF_PREFERENCES = 5e-7
RATE_OF_FEW_WEIGHTS_ON_PREFERENCES = 1e-5
"""For what is not measured: classifiers, preferences, masks and other adapters. Our choice, whatever the width."""


def first_rate(recipe: Recipe) -> tuple[float, str]:
    """Return a rate for a recipe that names none, and a few words on where it comes from."""
    trains_blocks = isinstance(recipe.method, AbstractBlockMethod | FullMethod)
    if recipe.data.format == "preference":
        return RATE_OF_PREFERENCES if trains_blocks else RATE_OF_FEW_WEIGHTS_ON_PREFERENCES, "cautious, not measured"
    if recipe.data.format == "classification" or not (trains_blocks or isinstance(recipe.method, LoraMethod)):
        return RATE if trains_blocks else RATE_OF_FEW_WEIGHTS, "cautious, not measured"
    width = width_of(recipe)
    kind = "lora" if not trains_blocks else "full" if isinstance(recipe.method, FullMethod) else "blocks"
    known = f"a width of {width:,}" if width else f"a width of {USUAL_WIDTH:,}, since the model's is not known"
    return scaled_rate(kind, width or USUAL_WIDTH), f"from runs of SmolLM2-135M, for {known}"


def scaled_rate(kind: str, width: int) -> float:
    """Return a rate of one digit for "full", "blocks" or "lora" at a width.

    Example:
        >>> scaled_rate("blocks", 2048)
        7e-05
    """
    return float(f"{RATES[kind] * (MEASURED_WIDTH / width) ** EXPONENT:.0e}")


def width_of(recipe: Recipe) -> int | None:
    """Return the hidden size of the model; None where its configuration cannot be read, or has none."""
    model = recipe.model
    origin = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = load_configuration(model.path, key="model.path", **origin)
    except UsageError:  # the command says what is wrong when it loads the model
        return None
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None
