"""Sizes in a model's configuration that no machine could hold, refused before anything is made of them."""

from __future__ import annotations

from typing import Any

from gradselect.usage import UsageError

MOST_LAYERS = 10_000
"""Every layer is a Python object before it is a weight; the deepest models that are known have a thousand."""


MOST_WEIGHTS = 10**14
"""A hundred times the largest model that is known; a plan may be of a model for other machines than this."""


def check_sizes(config: Any, *, name: str, most_weights: int = MOST_WEIGHTS) -> None:
    """The model of this configuration has so many layers, and weights of so many bytes, that there may be such a one.

    With the width h, L layers, a vocabulary of V and MLPs of the width m a model has at least V h + L h m weights. Of
    one that is to be loaded `most_weights` are the bytes of this machine: `machine_bytes()`.

    Raises:
        UsageError: names the sizes.
    """
    sizes = _sizes(config.get_text_config())
    layers, width, inner = (sizes.get(key, 1) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    if layers > MOST_LAYERS:
        raise UsageError(f"{name} cannot be used: num_hidden_layers={layers} is more than {MOST_LAYERS:,}")
    if sizes.get("vocab_size", 1) * width + layers * width * inner > most_weights:
        raise UsageError(
            f"{name} cannot be used: with {', '.join(f'{key}={size}'[:60] for key, size in sizes.items())} it has more "
            f"than {most_weights:,} weights"
            f"{', the bytes of this machine' if most_weights < MOST_WEIGHTS else ''}; correct its config.json"
        )


def _sizes(config: Any) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int)}
