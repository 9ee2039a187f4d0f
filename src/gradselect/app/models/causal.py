"""Check that a model predicts each token from those before it alone. Encoders load as language models in silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradselect.usage import UsageError

logger = logging.getLogger(__name__)

LENGTH = 12
"""Tokens of each row of the check."""

VISIBLE = 0.05
"""Influence of later tokens that counts, as a share of that of earlier ones. Measured: exactly 0, or 0.6 and more."""

FLOOR = 1e-5
"""Rounding of a log-probability, in nats."""


def check_causal(model: Any, *, name: str) -> None:
    """Refuse a model whose predictions depend on the tokens that they predict.

    One forward pass of four short rows, without gradients and dropout. Random state and modes are put back.

    Args:
        model: a language model of transformers, on its device.
        name: name of the model in errors: "model.path='base'".

    Raises:
        UsageError: later tokens change earlier predictions.
    """
    try:
        with at_rest(model), torch.no_grad():
            earlier, later = _influences(model)
    except Exception as error:  # some need rows of another length; training says what is wrong with it
        logger.warning("could not check that %s is causal (%s)", name, type(error).__name__)
        return
    if later > max(FLOOR, VISIBLE * earlier):
        raise UsageError(
            f"{name} is no causal language model, as loaded: log-probabilities of a token change by {later:.1e} with "
            f"the tokens behind it (by {earlier:.1e} with those before it), so it would see the answers that it learns "
            'to write. Give a decoder; or, if it was trained as one, write "is_decoder": true into its config.json'
        )


def _influences(model: Any) -> tuple[float, float]:
    """Return how far other tokens at the beginning, and at the end, change predictions, in nats."""
    num_tokens = min(next(iter(model.get_input_embeddings().parameters())).shape[0], 1000)
    one, other, third = torch.randint(num_tokens, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    half = LENGTH // 2
    begins_otherwise = torch.cat([other[:half], one[half:]])
    ends = [torch.cat([one[:half], row[half:]]) for row in (other, third)]
    rows = torch.stack([one, begins_otherwise, *ends]).to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    whole, begun, *ended = logits.float().log_softmax(-1)
    earlier = (whole[half:] - begun[half:]).abs().max().item()
    # A near tie between experts may flip once; a model that looks ahead shows it every time.
    later = min((whole[:half] - row[:half]).abs().max().item() for row in ended)
    return earlier, later


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and fork the random state; both are put back."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    # Dropout is off, but e.g. a router may draw.
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
