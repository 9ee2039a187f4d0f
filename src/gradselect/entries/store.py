"""Compact optimizer state: indices, moments and master weights of chosen entries, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part

Group = Mapping[str, Any]

RUN = 1 << 22
"""Entries that are updated together, or those of one tensor: what the update needs for a moment is of their size."""


def index_dtype(numel: int) -> torch.dtype:
    """The smallest of int32 and int64 that holds every flat index of a tensor of `numel` entries."""
    return torch.int32 if numel <= 2**31 else torch.int64


class EntryStore:
    r"""The chosen entries of several tensors, with their AdamW state, in one flat array of each kind.

        indices      flat index in its tensor      4 bytes (8 in tensors of more than 2^31 entries)
        exp_avg      first moment, float32         4
        exp_avg_sq   second moment, float32        4
        master       float32 weight                4, of half-precision tensors only

    Of float64 tensors, or with another dtype of masters, the last three are in that dtype.

    Entries lie tensor by tensor, within a tensor in the order in which they joined. Those that joined at the same
    update of their tensor are a *cohort* and share the step count t of the bias correction. Counting costs no byte an
    entry: the sign bit of an index says that a cohort begins there, and one bit for each tensor and update says whether
    a cohort joined at it.

    On several processes a tensor is what this one holds of it.

    Args:
        parameters: the tensors, by name: of one device, one dtype, one parameter group.
        master_dtype: of master weights, and of the moments beside them; None: no masters.

    Reference: Loshchilov, Hutter, arXiv 1711.05101, algorithm 2, with t counted by entry.
    """

    def __init__(self, parameters: Mapping[str, Parameter], *, master_dtype: torch.dtype | None) -> None:
        self.names = tuple(parameters)
        self._parameters = dict(parameters)
        self._position = {name: position for position, name in enumerate(self.names)}
        first = next(iter(parameters.values()))
        self._index_dtype = index_dtype(max(local_part(parameter).numel() for parameter in parameters.values()))
        self._sign_bit = torch.iinfo(self._index_dtype).min
        moment_dtype = master_dtype or torch.promote_types(first.dtype, torch.float32)
        empty = torch.empty(0, dtype=moment_dtype, device=first.device)
        self._indices = torch.empty(0, dtype=self._index_dtype, device=first.device)
        self._arrays = {"exp_avg": empty, "exp_avg_sq": empty.clone()}
        if master_dtype is not None:
            self._arrays["master"] = empty.clone()
        self._ends = [0] * len(self.names)
        self._num_updates = [0] * len(self.names)
        self._joined = torch.zeros(len(self.names), 0, dtype=torch.uint8, device=first.device)
        self._known_corrections = ((0.0, 0.0), torch.empty(0), torch.empty(0))
        self.restart()

    # Gradients of the step that is under way ----------------------------------------------------------------------

    def restart(self) -> None:
        """No gradient has been read."""
        self._gradients: Tensor | None = None
        self._places: Tensor | None = None
        self._was_read = [False] * len(self.names)

    def read(self, name: str, gradient: Tensor, *, clear: bool = False) -> None:
        """Add to the gradients of the tensor's entries.

        Args:
            gradient: flat, shape (n,).
            clear: set it to zero there.
        """
        if self._gradients is None:
            self._gradients = torch.zeros_like(self._arrays["exp_avg"])
        position = self._position[name]
        self._was_read[position] = True
        part = self._slice(position)
        if part.start < part.stop:
            places = self._plain_indices()[part]
            self._gradients[part] += gradient.index_select(0, places)
            if clear:
                gradient.index_fill_(0, places.long(), 0.0)

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient of one of the tensors has been read."""
        return any(self._was_read)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that were read."""
        return 0 if self._gradients is None else self._gradients.nbytes

    def squared_norm(self) -> Tensor:
        """Sum of the squares of the gradients that were read. Shape ()."""
        return torch.zeros(()) if self._gradients is None else self._gradients.square().sum()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply them, as clipping does."""
        if self._gradients is not None:
            self._gradients.mul_(factor.to(self._gradients.device))

    # The set ------------------------------------------------------------------------------------------------------

    def indices(self, name: str) -> Tensor:
        """Flat indices of the tensor's entries in the order in which they joined. Shape (n,), the index dtype."""
        return self._indices[self._slice(self._position[name])] & ~self._sign_bit

    def num_entries(self, name: str) -> int:
        """How many entries of the tensor are chosen."""
        part = self._slice(self._position[name])
        return part.stop - part.start

    def add(self, newcomers: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Entries join, as one cohort in each tensor.

        Args:
            newcomers: by tensor name their flat indices (int64, ascending; none of them chosen yet), and their
                gradients if the step under way is to move them: those of all, or of none.
        """
        newcomers = {name: new for name, new in newcomers.items() if new[0].numel()}
        if not newcomers:
            return
        self._places = None
        indices = {name: self._as_cohort(name, new) for name, (new, _) in newcomers.items()}
        self._indices = self._appended(self._indices, indices)
        gradients = {name: gradient for name, (_, gradient) in newcomers.items() if gradient is not None}
        assert len(gradients) == (0 if self._gradients is None else len(newcomers))
        if self._gradients is not None:
            self._gradients = self._appended(self._gradients, gradients)
        for key, array in self._arrays.items():
            self._arrays[key] = self._appended(
                array, {name: self._initial(key, name, new) for name, (new, _) in newcomers.items()}
            )
        self._grow({name: new.numel() for name, (new, _) in newcomers.items()})
        for name in newcomers:
            position = self._position[name]
            byte, bit = divmod(self._num_updates[position], 8)
            self._widen(byte + 1)
            self._joined[position, byte] |= 1 << bit

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Only these entries stay, with moments and age.

        Args:
            kept: by tensor name a bool tensor over its entries, in the order of `indices`; all of a tensor that is
                left out stay.
        """
        kept = {name: mask for name, mask in kept.items() if not bool(mask.all())}
        if not kept:
            return
        everywhere = torch.cat(
            [kept.get(name, self._indices.new_ones(self.num_entries(name), dtype=torch.bool)) for name in self.names]
        )
        joined_at = {name: self._joined_at(name)[mask] for name, mask in kept.items()}
        self._places = None
        self._indices = self._indices[everywhere]
        self._arrays = {key: array[everywhere] for key, array in self._arrays.items()}
        if self._gradients is not None:
            self._gradients = self._gradients[everywhere]
        self._grow({name: int(mask.sum()) - mask.numel() for name, mask in kept.items()})
        for name, steps in joined_at.items():
            self._write_cohorts(name, steps)

    def state(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint keeps of one tensor, copied: `indices`, `joined_at` (the tensor's updates before an entry
        joined, int32), `num_updates` (of the tensor, shape ()), and the arrays."""
        part = self._slice(self._position[name])
        return {
            "indices": self.indices(name).clone(),
            "joined_at": self._joined_at(name).to(torch.int32),
            "num_updates": torch.tensor(self._num_updates[self._position[name]]),
            **{key: array[part].clone() for key, array in self._arrays.items()},
        }

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Become what `state` said, of every tensor."""
        device = self._indices.device
        ordered = [states[name] for name in self.names]
        self._indices = torch.cat([state["indices"].to(device, self._index_dtype) for state in ordered])
        for key, array in self._arrays.items():
            self._arrays[key] = torch.cat([state[key].to(device, array.dtype) for state in ordered])
        self._ends = torch.tensor([state["indices"].numel() for state in ordered]).cumsum(0).tolist()
        self._num_updates = [int(state["num_updates"]) for state in ordered]
        self._joined = torch.zeros_like(self._joined[:, :0])
        for name, state in zip(self.names, ordered, strict=True):
            self._write_cohorts(name, state["joined_at"].to(device))
        self.restart()

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the masters, and of all else."""
        sizes = {key: array.nbytes for key, array in self._arrays.items()}
        masters = sizes.pop("master", 0)
        return masters, sum(sizes.values()) + self._indices.nbytes + self._joined.nbytes

    # The update ---------------------------------------------------------------------------------------------------

    def update(self, group: Group) -> None:
        r"""One AdamW step of every entry whose tensor had a gradient.

        m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
        w <- w (1 - lr weight_decay) - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

        With every entry chosen from the first step on, bitwise what `torch.optim.AdamW(foreach=False)` computes on the
        CPU; kernels elsewhere may round in another order.
        """
        if self._gradients is not None:
            for names in self._runs():
                self._update_run(names, group)
        self.restart()

    def refresh_masters(self) -> None:
        """Master weights as the tensors are now."""
        if "master" in self._arrays:
            for name in self.names:
                self._arrays["master"][self._slice(self._position[name])] = self._weights(name)

    def _update_run(self, names: Sequence[str], group: Group) -> None:
        """The entries of neighbouring tensors, all of which had a gradient."""
        for name in names:
            self._num_updates[self._position[name]] += 1
        part = slice(self._slice(self._position[names[0]]).start, self._slice(self._position[names[-1]]).stop)
        if part.start == part.stop:
            return
        assert self._gradients is not None
        gradients = self._gradients[part]
        mean, square = self._arrays["exp_avg"][part], self._arrays["exp_avg_sq"][part]
        masters = self._arrays.get("master")
        flats = [self._flat(name) for name in names]
        indices = self._split(self._plain_indices()[part], names)
        if masters is None:
            gathered = [flat.index_select(0, places) for flat, places in zip(flats, indices, strict=True)]
            weights = torch.cat(gathered).to(mean.dtype)
        else:
            weights = masters[part]
        step_size, root = self._corrections(names, group)
        beta1, beta2 = group["betas"]
        # The order of operations is that of torch on the CPU, so that results are bitwise its own.
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradients, 1 - beta1)
        square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        denominator = square.sqrt().div_(root).add_(group["eps"])
        weights.add_(step_size.mul(mean).div_(denominator))
        for flat, places, moved in zip(flats, indices, self._split(weights.to(flats[0].dtype), names), strict=True):
            flat.index_copy_(0, places.long(), moved)

    def _corrections(self, names: Sequence[str], group: Group) -> tuple[Tensor, Tensor]:
        """-lr / (1 - beta1^t) and sqrt(1 - beta2^t) of each entry of these neighbouring tensors, shape (n,); shape (1,)
        where t is the same for all."""
        positions = [self._position[name] for name in names]
        num_updates = torch.tensor([self._num_updates[position] for position in positions])
        rows, joined = self._cohorts(slice(positions[0], positions[-1] + 1))
        ages = (num_updates.to(rows.device)[rows] - joined).int()
        if bool((ages == ages[0]).all()):
            ages = ages[:1]
        else:
            part = slice(self._slice(positions[0]).start, self._slice(positions[-1]).stop)
            ages = ages.index_select(0, self._ordinals(part))
        first, second = self._bias_corrections(int(num_updates.max()), group["betas"])
        like = self._arrays["exp_avg"]
        step_sizes, roots = (-group["lr"] / first).to(like), second.sqrt().to(like)
        return step_sizes.index_select(0, ages), roots.index_select(0, ages)

    def _bias_corrections(self, oldest: int, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """1 - beta^t of both betas for t = 0 to `oldest` and beyond, in Python's double precision as torch has them."""
        known, first, second = self._known_corrections
        if known != betas or len(first) <= oldest:
            self._known_corrections = known, first, second = (
                betas,
                *(torch.tensor([1 - beta**t for t in range(2 * oldest + 64)], dtype=torch.float64) for beta in betas),
            )
        return first, second

    def _runs(self) -> Iterator[list[str]]:
        """Names of tensors that had a gradient, neighbours together until they are `RUN` entries."""
        run: list[str] = []
        num_entries = 0
        for name, read in zip(self.names, self._was_read, strict=True):
            if read:
                run.append(name)
                num_entries += self.num_entries(name)
            if run and (not read or num_entries >= RUN):
                yield run
                run, num_entries = [], 0
        if run:
            yield run

    def _split(self, array: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """What belongs to each of these neighbouring tensors."""
        return array.split([self.num_entries(name) for name in names])

    def _weights(self, name: str) -> Tensor:
        """The tensor's chosen entries, in the moments' dtype."""
        return self._flat(name)[self.indices(name)].to(self._arrays["exp_avg"].dtype)

    def _flat(self, name: str) -> Tensor:
        # Looked up at every use: a wrapper may move a shard to other memory.
        return local_part(self._parameters[name]).detach().view(-1)

    def _plain_indices(self) -> Tensor:
        """All indices without their flags, kept until the set or the step changes."""
        if self._places is None:
            self._places = self._indices & ~self._sign_bit
        return self._places

    # Cohorts ------------------------------------------------------------------------------------------------------

    def _as_cohort(self, name: str, indices: Tensor) -> Tensor:
        cohort = indices.to(self._index_dtype)
        position = self._position[name]
        byte, bit = divmod(self._num_updates[position], 8)
        # Where nothing was updated since the last ones joined, these belong to the same cohort.
        if byte >= self._joined.shape[1] or not int(self._joined[position, byte]) >> bit & 1:
            cohort[0] |= self._sign_bit
        return cohort

    def _widen(self, num_bytes: int) -> None:
        """Room for the bits of so many times eight updates."""
        missing = num_bytes - self._joined.shape[1]
        if missing > 0:
            self._joined = torch.nn.functional.pad(self._joined, (0, missing))

    def _joined_at(self, name: str) -> Tensor:
        """At which update of its tensor, from 0, each entry joined. Shape (n,), int64."""
        position = self._position[name]
        _, joined = self._cohorts(slice(position, position + 1))
        return joined[self._ordinals(self._slice(position))]

    def _cohorts(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Of every cohort of these tensors, in order: its tensor, counted from the first, and when it joined."""
        bits = self._joined[positions, :, None] >> torch.arange(8, device=self._joined.device, dtype=torch.uint8)
        return (bits & 1).view(bits.shape[0], -1).nonzero().unbind(1)  # pyright: ignore[reportReturnType]

    def _ordinals(self, part: slice) -> Tensor:
        """The number of each entry's cohort among those of this part."""
        return (self._indices[part] < 0).cumsum(0, dtype=torch.int32).sub_(1)

    def _write_cohorts(self, name: str, joined_at: Tensor) -> None:
        """Flags and bits of entries that joined at these updates, in ascending order."""
        position = self._position[name]
        part = self._slice(position)
        begins = torch.ones_like(joined_at, dtype=torch.bool)
        begins[1:] = joined_at[1:] != joined_at[:-1]
        plain = self._indices[part] & ~self._sign_bit
        self._indices[part] = torch.where(begins, plain | self._sign_bit, plain)
        updates = joined_at[begins].long()
        self._widen(int(updates[-1]) // 8 + 1 if updates.numel() else 0)
        bits = self._joined.new_zeros(self._joined.shape[1], 8)
        bits.view(-1)[updates] = 1
        self._joined[position] = (bits << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(1)

    # Layout -------------------------------------------------------------------------------------------------------

    def _slice(self, position: int) -> slice:
        return slice(self._ends[position - 1] if position else 0, self._ends[position])

    def _appended(self, array: Tensor, additions: Mapping[str, Tensor]) -> Tensor:
        """`array` with `additions` at the end of their tensors' parts."""
        parts, start = [], 0
        for name in sorted(additions, key=self._position.__getitem__):
            end = self._ends[self._position[name]]
            parts += [array[start:end], additions[name].to(array.dtype)]
            start = end
        return torch.cat([*parts, array[start:]])

    def _initial(self, key: str, name: str, indices: Tensor) -> Tensor:
        if key == "master":
            return self._flat(name)[indices]
        return torch.zeros(indices.numel(), dtype=self._arrays[key].dtype, device=indices.device)

    def _grow(self, by: Mapping[str, int]) -> None:
        moved = 0
        for position, name in enumerate(self.names):
            moved += by.get(name, 0)
            self._ends[position] += moved
