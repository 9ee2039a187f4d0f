"""What a forward pass of a model keeps, whichever of its weights train."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .activations import Trained, count_activations
from .architecture import KINDS, read_architecture
from .meta_forward import count_saved
from .tape import Rows


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that the backward pass finds.

    Args:
        activations: without logits.
        logits: the most that the loss holds.
        recomputed: of one layer, where layers are computed again.
        in_flight: gradients of activations inside one layer; an estimate.
    """

    activations: int
    logits: int
    recomputed: int
    in_flight: int


class ForwardPass:
    """Counts what is kept, by the model of activations where it knows the architecture, else by running it on meta.

    Args:
        model: on the meta device, as it will be trained: with its adapter, if it gets one.
        rows: the tokens.
        loss: how it is computed.
        checkpointing: layers keep their input alone and are computed again.
        keeps_cache: whether the model makes a cache of keys and values.

    Attributes:
        notes: what is only an estimate, in words.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, loss: Loss, checkpointing: bool, keeps_cache: bool) -> None:
        self.checkpointing = checkpointing
        self._model = model
        self._rows = rows
        self._loss: Loss = loss
        self._keeps_cache = keeps_cache
        self._names = {name: plain_name(name) for name, _ in model.named_parameters()}
        self._config: Any = getattr(model, "config", None)
        self._shape = None if self._config is None else read_architecture(self._config.get_text_config())
        if self._shape is not None and not self._is_as_known():
            self._shape = None
        self.notes = () if self._shape is not None else (self._note(),)
        self._known: dict[frozenset[str], Kept] = {}

    def kept(self, trained: Collection[str]) -> Kept:
        """Bytes when the parameters of these names have a gradient."""
        key = frozenset(trained)
        if key not in self._known:
            self._known[key] = self._count(key) if self._shape is None else self._model_of(key)
        return self._known[key]

    def _model_of(self, names: frozenset[str]) -> Kept:
        assert self._shape is not None
        ranks = {
            self._names[name].partition(".lora_A.")[0]: parameter.shape[0]
            for name, parameter in self._model.named_parameters()
            if ".lora_A." in name and name in names
        }
        trained = Trained(names={self._names[name] for name in names}, ranks=ranks, dropout=self._adapter_dropout())
        head_trains = self._head_trains(trained.names)
        counted = count_activations(
            self._shape,
            trained,
            self._rows,
            head_trains=head_trains,
            copies_head_input=self._loss == "chunked",
            checkpointing=self.checkpointing,
            keeps_cache=self._keeps_cache,
        )
        return Kept(
            activations=counted.total,
            logits=self._logits(self._shape.vocabulary, self._shape.hidden, head_trains=head_trains),
            recomputed=counted.recomputed,
            in_flight=counted.in_flight,
        )

    def _count(self, names: frozenset[str]) -> Kept:
        """Of an architecture without a model. With checkpointing each layer keeps its input, of the hidden size."""
        text = None if self._config is None else self._config.get_text_config()
        vocabulary, hidden = getattr(text, "vocab_size", 0), getattr(text, "hidden_size", 0)
        loss: Loss = "none" if self._loss == "none" else "whole"
        kept_by_loss = saved_logits(self._rows, vocabulary=vocabulary, loss=loss)
        everything = max(0, count_saved(self._model, names, self._rows) - kept_by_loss)
        num_layers = getattr(text, "num_hidden_layers", 1)
        inputs = num_layers * self._rows.tokens * hidden * self._rows.itemsize
        return Kept(
            activations=min(inputs, everything) if self.checkpointing else everything,
            logits=self._logits(vocabulary, hidden, head_trains=self._head_trains(names)),
            recomputed=everything // num_layers if self.checkpointing else 0,
            in_flight=everything // num_layers,
        )

    def _logits(self, vocabulary: int, hidden: int, *, head_trains: bool) -> int:
        return peak_logits(self._rows, vocabulary=vocabulary, hidden=hidden, loss=self._loss, head_trains=head_trains)

    def _head_trains(self, names: Collection[str]) -> bool:
        """Whether what stands above the layers has a gradient; tied, it is the embedding."""
        tied = self._loss != "none" and getattr(self._config, "tie_word_embeddings", False)
        ends = ("embed_tokens.weight", "wte.weight") if tied else ("lm_head.weight", "score.weight")
        return any(name.endswith(ends) for name in names)

    def _is_as_known(self) -> bool:
        """Whether the layers lie where the architecture has them, and adapters are plain LoRA."""
        assert self._shape is not None
        plain = self._names.values()
        has_layers = any(name.startswith(f"{self._shape.layers}.") for name in plain)
        return has_layers and not any(mark in name for name in plain for mark in _OTHER_ADAPTERS)

    def _adapter_dropout(self) -> float:
        configurations = getattr(self._model, "peft_config", {})
        return max((getattr(each, "lora_dropout", 0.0) for each in configurations.values()), default=0.0)

    def _note(self) -> str:
        kind = getattr(self._config, "model_type", type(self._model).__name__)
        what = "this adapter" if kind in KINDS else f"model type {kind!r}"
        return (
            f"there is no model of activations for {what}: they were counted by a forward pass on the meta device, "
            "without padding, and with checkpointing only estimated"
        )


_OTHER_ADAPTERS = ("magnitude_vector", "lora_E", ".ia3_", ".hra_", ".shira_", ".oft_", ".vera_", ".hada_", ".boft_")


def plain_name(name: str) -> str:
    """The name that a parameter has without the wrappers of PEFT around it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".modules_to_save.default.", ".")


Loss = Literal["whole", "chunked", "none"]
"""How the loss is computed: from "whole" logits in float32, as models of transformers do; in tiles of tokens and
vocabulary, "chunked", as TRL does; "none": from one number a class, which is nothing."""

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Of TRL's chunked loss."""


def saved_logits(rows: Rows, *, vocabulary: int, loss: Loss) -> int:
    """What the loss keeps for the backward pass: whole logarithms of probabilities, or two numbers a token."""
    return {"whole": 4 * rows.tokens * vocabulary, "chunked": 8 * rows.tokens, "none": 0}[loss]


def peak_logits(rows: Rows, *, vocabulary: int, hidden: int, loss: Loss, head_trains: bool) -> int:
    r"""The most that a loss holds at once.

    Whole: tokens x vocabulary in float32 three times over: the logarithms of the probabilities, the gradient with
    respect to them and that with respect to the logits. Chunked: one tile of logits, the gradient of the head's input
    in float32, and that of the head in float32 where it trains.
    """
    if loss == "none":
        return 0
    kept = saved_logits(rows, vocabulary=vocabulary, loss=loss)
    if loss == "whole":
        return 3 * kept
    tile = min(rows.tokens, TILE_TOKENS) * TILE_WORDS * rows.itemsize
    return kept + tile + 4 * rows.tokens * hidden + (4 * vocabulary * hidden if head_trains else 0)
