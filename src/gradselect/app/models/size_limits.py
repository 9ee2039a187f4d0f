"""Limits on the sizes in a model's configuration, checked before anything is allocated."""

from __future__ import annotations

from typing import Any

from gradselect.usage import UsageError

MOST_LAYERS = 10_000
"""Every layer is a Python object before it is a weight; the deepest known models have a thousand."""

MOST_WEIGHTS = 10**14
"""A hundred times the largest known model. A plan may be for a larger machine than this one."""


def check_sizes(config: Any, *, name: str, most_weights: int = MOST_WEIGHTS) -> None:
    """Check that a model of this configuration can exist.

    With width h, L layers, a vocabulary of V and MLPs of width m, a model has at least V h + L h m weights.
    To load one, pass `machine_bytes()` as `most_weights`.

    Raises:
        UsageError: there are too many layers or weights; names the sizes.
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
