"""How many bytes a forward pass leaves for the backward pass, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from .architecture import Architecture
from .tape import Rows, Tape, Value


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What has a gradient, by the names that the parameters have without an adapter around them.

    Args:
        names: parameters.
        ranks: rank of the LoRA on a linear layer, by the layer's path.
        dropout: on the adapters' input.
    """

    names: Collection[str]
    ranks: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that wait for the backward pass when the forward pass ends, without logits and weights.

    Args:
        layers: of each layer.
        others: of embedding and final norm, the head's input among them.
        recomputed: of the layer that holds most, where layers are computed again: it is there beside the others while
            the backward pass is in it.
        in_flight: gradients of activations while the backward pass is in a layer; an estimate.
    """

    layers: tuple[int, ...]
    others: int
    recomputed: int
    in_flight: int

    @property
    def total(self) -> int:
        """All that is kept."""
        return sum(self.layers) + self.others


def count_activations(
    architecture: Architecture,
    trained: Trained,
    rows: Rows,
    *,
    head_trains: bool,
    copies_head_input: bool,
    checkpointing: bool,
    keeps_cache: bool,
) -> Activations:
    """The bytes, by the rules of `Tape`.

    Args:
        architecture: the shapes.
        trained: what has a gradient.
        rows: the tokens.
        head_trains: whether the output embeddings, tied or not, have a gradient.
        copies_head_input: whether the loss keeps a copy of the head's input of its own, as chunked ones do.
        checkpointing: layers keep their input alone and are computed again.
        keeps_cache: whether keys and values are copied to a cache, as models do unless they are told not to.
    """
    if architecture.window is not None and rows.length > architecture.window:
        rows = replace(rows, masked=True)
    storages = count()
    outside = Tape(rows, storages)
    starts = any(name in trained.names for name in architecture.embedding)
    x = outside.dropout(outside.value(architecture.hidden, has_gradient=starts), architecture.dropout[0])
    kept, computed = [], []
    for number in range(architecture.num_layers):
        layer = Layer(
            architecture, trained, Tape(rows, storages), f"{architecture.layers}.{number}.", keeps_cache=keeps_cache
        )
        following = layer.forward(x)
        computed.append(layer.tape.num_bytes)
        kept.append((x.num_bytes if following.has_gradient else 0) if checkpointing else computed[-1])
        x = following
    norm = outside.rms_norm if architecture.kind != "gpt2" else outside.layer_norm
    top = norm(x, trains=f"{architecture.norm}.weight" in trained.names)
    if (head_trains or copies_head_input) and (head_trains or top.has_gradient):
        outside.save(top)
    return Activations(
        layers=tuple(kept),
        others=outside.num_bytes,
        recomputed=max(computed) if checkpointing else 0,
        in_flight=_in_flight(architecture, rows) if top.has_gradient else 0,
    )


class Layer:
    """One layer of a decoder, run on a tape.

    Args:
        architecture: the shapes.
        trained: what has a gradient.
        tape: what to run on.
        path: of the layer, with a dot at its end.
        keeps_cache: whether keys and values are copied.
    """

    def __init__(
        self, architecture: Architecture, trained: Trained, tape: Tape, path: str, *, keeps_cache: bool
    ) -> None:
        self.tape = tape
        self._shape = architecture
        self._trained = trained
        self._path = path
        self._keeps_cache = keeps_cache

    def forward(self, x: Value) -> Value:
        """The residual stream behind the layer."""
        return self._gpt2(x) if self._shape.kind == "gpt2" else self._llama(x)

    def _llama(self, x: Value) -> Value:
        tape, shape = self.tape, self._shape
        normed = tape.rms_norm(x, trains=self._trains("input_layernorm.weight"))
        query, key, value = self._projections(normed)
        query, key = tape.changed(query), tape.changed(key)  # rotated
        attended = tape.attend(query, key, value, heads=shape.heads)
        x = self._add(x, self._linear(attended, "self_attn.o_proj", shape.hidden))
        normed = tape.rms_norm(x, trains=self._trains("post_attention_layernorm.weight"))
        gate, up = self._gate_and_up(normed)
        product = tape.multiply(tape.activation(gate, name=shape.activation), up)
        return self._add(x, self._linear(product, "mlp.down_proj", shape.hidden))

    def _projections(self, x: Value) -> tuple[Value, Value, Value]:
        shape = self._shape
        width, key_width = shape.heads * shape.head_size, shape.key_heads * shape.head_size
        if shape.kind == "fused":
            return self._views(self._linear(x, "self_attn.qkv_proj", width + 2 * key_width), width, key_width)
        widths = {"q": width, "k": key_width, "v": key_width}
        parts = {name: self._linear(x, f"self_attn.{name}_proj", part_width) for name, part_width in widths.items()}
        if shape.norms_heads:
            parts |= {name: self._head_norm(parts[name], f"self_attn.{name}_norm.weight") for name in ("q", "k")}
        return parts["q"], parts["k"], parts["v"]

    def _views(self, fused: Value, width: int, key_width: int) -> tuple[Value, Value, Value]:
        """Query, key and value in one piece of memory, or, with a cache, the latter two in copies."""
        query, key, value = (replace(fused, width=part) for part in (width, key_width, key_width))
        return (query, self.tape.changed(key), self.tape.changed(value)) if self._keeps_cache else (query, key, value)

    def _head_norm(self, x: Value, name: str) -> Value:
        # Roots are one a head; against the rest they are nothing.
        return self.tape.rms_norm(x, trains=self._trains(name))

    def _gate_and_up(self, x: Value) -> tuple[Value, Value]:
        width = self._shape.intermediate
        if self._shape.kind == "split":
            return self._linear(x, "mlp.gate_proj", width), self._linear(x, "mlp.up_proj", width)
        both = self._linear(x, "mlp.gate_up_proj", 2 * width)
        return replace(both, width=width), replace(both, width=width)

    def _gpt2(self, x: Value) -> Value:
        tape, shape = self.tape, self._shape
        normed = tape.layer_norm(x, trains=self._trains("ln_1.weight", "ln_1.bias"))
        fused = self._linear(normed, "attn.c_attn", 3 * shape.hidden)
        attended = tape.attend(*self._views(fused, shape.hidden, shape.hidden), heads=shape.heads)
        x = self._add(x, self._linear(attended, "attn.c_proj", shape.hidden))
        normed = tape.layer_norm(x, trains=self._trains("ln_2.weight", "ln_2.bias"))
        inner = tape.activation(self._linear(normed, "mlp.c_fc", shape.intermediate), name=shape.activation)
        return self._add(x, self._linear(inner, "mlp.c_proj", shape.hidden))

    def _add(self, x: Value, branch: Value) -> Value:
        return self.tape.add(x, self.tape.dropout(branch, self._shape.dropout[1]))

    def _linear(self, x: Value, name: str, width: int) -> Value:
        output = self.tape.linear(
            x, width, trains=self._trains(f"{name}.weight"), has_bias_gradient=self._trains(f"{name}.bias")
        )
        rank = self._trained.ranks.get(self._path + name)
        if rank is None:
            return output
        self.tape.adapted(x, rank=rank, dropout=self._trained.dropout)
        return replace(output, has_gradient=True)

    def _trains(self, *names: str) -> bool:
        return any(self._path + name in self._trained.names for name in names)


def _in_flight(shape: Architecture, rows: Rows) -> int:
    """Three gradients inside the MLP and two of the residual stream, or four of it in float32 in a norm."""
    return rows.tokens * max((3 * shape.intermediate + 2 * shape.hidden) * rows.itemsize, 4 * shape.hidden * 4)
