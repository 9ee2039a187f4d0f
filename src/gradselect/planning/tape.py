"""What autograd keeps of a forward pass, counted without one: tensors are sizes, operations say what they save.

Every rule is one line of torch's derivatives: an operation saves a tensor only if the gradient of another one needs it.
So a linear layer keeps its input for the weight's gradient alone, and a product keeps each factor for the other's. What
has no gradient to hand down keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Attention = Literal["fused", "eager"]

_COPIES_OF_GELU = 4
"""GPT-2's GELU, written out in elementary operations, keeps x, x / 2, tanh(...) and 1 + tanh(...)."""


@dataclass(frozen=True)
class Value:
    """A tensor of the forward pass.

    Args:
        storage: which memory it lies in; a view lies in that of another.
        num_bytes: of that memory.
        width: elements of it that belong to one token.
        has_gradient: whether the backward pass reaches it.
    """

    storage: int
    num_bytes: int
    width: int
    has_gradient: bool


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tokens of one forward pass.

    Args:
        batch: rows.
        length: tokens of a row.
        itemsize: bytes of an element of the weights and of the residual stream.
        masked: whether attention is given a mask: rows are padded, or several examples stand in one.
        attention: "fused" kernels keep queries, keys, values, output and a number a head and token; "eager" keeps the
            probabilities.
    """

    batch: int
    length: int
    itemsize: int
    masked: bool = False
    attention: Attention = "fused"

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.batch * self.length


class Tape:
    """Collects what is kept for the backward pass.

    Args:
        rows: the tokens.
        storages: numbers of storages, shared by the tapes that values go between.

    Attributes:
        saved: bytes by storage.
    """

    def __init__(self, rows: Rows, storages: Iterator[int]) -> None:
        self.rows = rows
        self.saved: dict[int, int] = {}
        self._storages = storages

    @property
    def num_bytes(self) -> int:
        """Kept so far."""
        return sum(self.saved.values())

    def value(self, width: int, *, has_gradient: bool, itemsize: int | None = None) -> Value:
        """A new tensor of `width` elements a token."""
        size = self.rows.itemsize if itemsize is None else itemsize
        return Value(next(self._storages), self.rows.tokens * width * size, width, has_gradient)

    def save(self, *values: Value) -> None:
        """Kept for the backward pass; a storage counts once."""
        self.saved |= {value.storage: value.num_bytes for value in values}

    def linear(self, x: Value, width: int, *, trains: bool, has_bias_gradient: bool = False) -> Value:
        """y = x Wᵀ + b. dW = dyᵀ x needs x; dx = dy W needs the weight alone."""
        if trains:
            self.save(x)
        return self.value(width, has_gradient=x.has_gradient or trains or has_bias_gradient)

    def adapted(self, x: Value, *, rank: int, dropout: float) -> None:
        """B (A x) of a LoRA, whose matrices are float32: A keeps its input in float32, B what A makes of it."""
        wide = x if self.rows.itemsize == 4 else self.value(x.width, has_gradient=x.has_gradient, itemsize=4)
        self.save(self.dropout(wide, dropout), self.value(rank, has_gradient=True, itemsize=4))

    def rms_norm(self, x: Value, *, trains: bool) -> Value:
        """w * x̂ with x̂ = x rsqrt(mean(x²)) in float32: dx needs x in float32 and the root, dw needs x̂."""
        if x.has_gradient:
            self.save(x if self.rows.itemsize == 4 else self.value(x.width, has_gradient=True, itemsize=4))
            self.save(self.value(1, has_gradient=True, itemsize=4))
        if trains:
            self.save(self.value(x.width, has_gradient=x.has_gradient))
        return self.value(x.width, has_gradient=x.has_gradient or trains)

    def layer_norm(self, x: Value, *, trains: bool) -> Value:
        """One kernel, which keeps x, the mean and the root."""
        if x.has_gradient or trains:
            self.save(x, *(self.value(1, has_gradient=True, itemsize=4) for _ in range(2)))
        return self.value(x.width, has_gradient=x.has_gradient or trains)

    def changed(self, x: Value) -> Value:
        """A new tensor from x by an operation that keeps nothing: a rotation, a copy, a sum with a constant."""
        return self.value(x.width, has_gradient=x.has_gradient)

    def add(self, one: Value, other: Value) -> Value:
        """A sum keeps nothing."""
        return self.value(one.width, has_gradient=one.has_gradient or other.has_gradient)

    def multiply(self, one: Value, other: Value) -> Value:
        """Each factor is kept for the other's gradient."""
        if one.has_gradient:
            self.save(other)
        if other.has_gradient:
            self.save(one)
        return self.add(one, other)

    def activation(self, x: Value, *, name: str) -> Value:
        """Elementwise: the input is kept, or the output, which is as large."""
        if x.has_gradient:
            self.save(x)
            if name in ("gelu_new", "gelu_fast"):
                self.save(*(self.value(x.width, has_gradient=True) for _ in range(_COPIES_OF_GELU - 1)))
        return self.changed(x)

    def dropout(self, x: Value, probability: float) -> Value:
        """A mask of one byte an element, as accelerators have it."""
        if probability == 0:
            return x
        if x.has_gradient:
            self.save(self.value(x.width, has_gradient=False, itemsize=1))
        return self.changed(x)

    def attend(self, query: Value, key: Value, value: Value, *, heads: int) -> Value:
        """softmax(q kᵀ + mask) v.

        The fused kernels keep q, k, v, the output, one number a head and token, and a mask in the weights' type. With a
        mask keys and values of grouped heads are spread over all heads first.
        """
        rows = self.rows
        output = self.value(query.width, has_gradient=any(part.has_gradient for part in (query, key, value)))
        if not output.has_gradient:
            return output
        is_grouped = key.width < query.width
        if is_grouped and (rows.masked or rows.attention == "eager"):
            key = self.value(query.width, has_gradient=key.has_gradient)
            value = self.value(query.width, has_gradient=value.has_gradient)
        self.save(query, key, value)
        if rows.attention == "eager":
            sizes = (4,) if rows.itemsize == 4 else (4, rows.itemsize)
            for size in sizes:
                self.save(self.value(heads * rows.length, has_gradient=True, itemsize=size))
            return output
        self.save(output, self.value(heads, has_gradient=True, itemsize=4))
        if rows.masked:
            self.save(self.value(rows.length, has_gradient=False))
        return output
