"""Trial of an optimizer class on tiny tensors: may it be a rule, and which?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradselect.usage import UsageError

from .torch_state import Layout, aside, layout_of, probe

STEPS = 3
LARGE = (64, 64)
"""Shape of the matrix whose state is looked at: some classes quantise from 4096 entries on."""

OF_TORCH = ("_warned_capturable_if_run_uncaptured", "_zero_grad_profile_name", "_opt_called")
"""Attributes of every torch optimizer that change by themselves."""

PLAIN = (bool, int, float, str, type(None))

Build = Callable[..., Optimizer]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Results of a trial.

    Attributes:
        hyper_parameters: those of `lr` and `weight_decay` that the class has.
        group_options: its other options that are plain values, with their values.
        state_names: names of its large state tensors.
        host_names: names of its numbers and of tensors that it keeps on the CPU.
        counters: those of them that entries need; only "step" can be.
        is_elementwise: True if each entry moves for itself, with state of its own.
        decouples_decay: True as AdamW, False as SGD, None: neither.
        why_whole_tensors: why it cannot move single entries; "": it can.
    """

    hyper_parameters: tuple[str, ...]
    group_options: Mapping[str, Any]
    state_names: tuple[str, ...]
    host_names: tuple[str, ...]
    counters: tuple[str, ...]
    is_elementwise: bool
    decouples_decay: bool | None
    why_whole_tensors: str


def examine(kind: type[Optimizer], build: Build, build_plain: Build) -> Findings:
    """Try the class.

    Args:
        kind: the class.
        build: makes an instance for some weights.
        build_plain: makes one that can step on a CPU and on the meta device.

    Raises:
        UsageError: names the class, and why it cannot be a rule.
    """
    _check_interface(kind)
    try:
        with aside():
            return _Trial(build, build_plain).findings()
    except UsageError as error:
        raise UsageError(f"{kind.__name__} cannot be a rule: {error}") from None


def _check_interface(kind: type[Optimizer]) -> None:
    name = kind.__name__
    needed = inspect.signature(kind.step).parameters.get("closure")
    if needed is not None and needed.default is inspect.Parameter.empty:
        raise UsageError(f"{name} cannot be a rule: its step needs a closure that evaluates the model several times")
    if callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None)):
        raise UsageError(
            f"{name} cannot be a rule: it has a train and an eval mode, because it averages weights that it believes "
            "to move at every step, and most blocks do not; write gs.AdamWRule() with a schedule of "
            "torch.optim.lr_scheduler"
        )


class _Trial:
    """Runs of a class on a few tiny tensors."""

    def __init__(self, build: Build, build_plain: Build) -> None:
        self._build_as_asked = build
        self._build = build_plain
        failures = {}
        self._shapes = []
        for shape in ((6, 4), (5, 3), (5,)):
            try:
                self._run([shape])
                self._shapes.append(shape)
            except UsageError:
                raise
            except Exception as error:
                failures[shape] = str(error).splitlines()[0]
        if not self._shapes:
            raise UsageError(f"a trial step failed: {failures[6, 4]}")

    def findings(self) -> Findings:
        self._check_state()
        group = self._build_as_asked(_numbers(self._shapes[0], 0)).param_groups[0]
        self._check_apart()
        elementwise = self._why_not_elementwise()
        layouts = [self._probe(shape) for shape in (LARGE, *self._shapes)]
        parts = {name: part for layout in layouts for name, part in layout.parts.items()}
        host_names = tuple(name for name, part in parts.items() if part.is_on_host)
        why = elementwise or self._why_not_from_zeros(host_names)
        return Findings(
            hyper_parameters=tuple(name for name in ("lr", "weight_decay") if name in group),
            group_options={
                k: v for k, v in group.items() if k not in ("params", "lr", "weight_decay") and _is_plain(v)
            },
            state_names=tuple(name for name in parts if name not in host_names),
            host_names=host_names,
            counters=host_names if not why else (),
            is_elementwise=not elementwise,
            decouples_decay=self._decay() if "weight_decay" in group else True,
            why_whole_tensors=why,
        )

    # Runs ----------------------------------------------------------------------------------------------------------

    def _run(
        self,
        shapes: Sequence[tuple[int, ...]],
        *,
        steps: int = STEPS,
        watch: Callable[[Optimizer, list[Tensor], int], None] | None = None,
        weights: Sequence[Tensor] | None = None,
        grads: Callable[[int, Tensor], Tensor] | None = None,
        **group: Any,
    ) -> list[Tensor]:
        """Return weights after some steps; entries of all runs begin and go on with the same numbers."""
        moving = [_numbers(shape, 0) for shape in shapes] if weights is None else [each.clone() for each in weights]
        optimizer = self._build(*moving)
        for name, value in group.items():
            theirs = optimizer.param_groups[0][name]
            optimizer.param_groups[0][name] = torch.full_like(theirs, value) if isinstance(theirs, Tensor) else value
        for step in range(steps):
            for weight in moving:
                weight.grad = _numbers(tuple(weight.shape), step + 1) if grads is None else grads(step, weight)
            optimizer.step()
            if watch is not None:
                watch(optimizer, moving, step)
        return moving

    def _check_state(self) -> None:
        """Check that the class keeps nothing but tensors and numbers by parameter."""
        seen: list[Any] = []

        def watch(optimizer: Optimizer, weights: list[Tensor], step: int) -> None:
            group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            inside = {k: repr(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
            strangers = [key for key in optimizer.state if not any(key is weight for weight in weights)]
            if strangers:
                raise UsageError(f"it keeps a state that belongs to no weight ({strangers[0]!r:.80})")
            layouts = [layout_of(optimizer.state[weight], weight=weight) for weight in weights]
            seen.append((group, inside, layouts))

        for shape in self._shapes:
            seen.clear()
            self._run([shape], watch=watch)
            start, last = self._build(_numbers(shape, 0)), seen[-1]
            before = {k: v for k, v in start.param_groups[0].items() if k != "params"}
            changed = _differing(before, last[0])
            if changed:
                raise UsageError(f"it keeps numbers for all weights together in its parameter groups: {changed}")
            apart = {k: repr(v) for k, v in vars(start).items() if k not in ("state", "param_groups")}
            changed = [k for k in _differing(apart, last[1]) if k not in OF_TORCH]
            if changed:
                raise UsageError(f"it keeps something for all weights together: {changed}")
            first, third = seen[0][2][0], last[2][0]
            if _outline(first) != _outline(third):
                raise UsageError("it makes or changes state after the first update of a weight")
            if "lr" not in before:
                raise UsageError("it has no lr in its parameter groups, so that no learning rate can reach it")

    def _check_apart(self) -> None:
        """Check that a parameter moves as if it were alone."""
        together = self._run(self._shapes)
        alone = [self._run([shape])[0] for shape in self._shapes]
        if not _alike(together, alone):
            raise UsageError("parameters move otherwise together than one by one: it couples them")

    def _why_not_elementwise(self) -> str:
        if self._shapes != [(6, 4), (5, 3), (5,)]:
            return "takes tensors of some shapes only"
        layout = self._probe(LARGE)
        shared = [n for n, p in layout.parts.items() if not p.is_on_host and tuple(p.like.shape) != LARGE]
        if layout.wrappers or shared:
            return "keeps numbers that several entries share"
        whole, vector = self._run([(6, 4)])[0], self._run([(24,)])[0]
        halves = [self._run([(11,)])[0], self._run([(13,)], weights=[_numbers((24,), 0)[11:]], grads=_second_part)[0]]
        if not _alike([whole.view(-1)] * 2, [vector, torch.cat(halves)]):
            return "moves an entry by its neighbours' gradients too"
        return ""

    def _why_not_from_zeros(self, host_names: Sequence[str]) -> str:
        """Return why entries that start with a state of zeros would not move as in the class; "": they do."""
        others = [name for name in host_names if name != "step"]
        if others:
            return f"keeps {', '.join(others)} for all entries of a tensor together"
        counted: list[float] = []

        def start(optimizer: Optimizer, weights: list[Tensor], step: int) -> None:
            state = optimizer.state[weights[0]]
            counted.append(float(state.get("step", step + 1)))
            if not step:
                made.update(
                    {k: torch.zeros_like(v) if isinstance(v, Tensor) else v and type(v)(0) for k, v in state.items()}
                )

        made: dict[str, Any] = {}
        wanted = self._run([(5,)], watch=start)
        if counted != [1.0, 2.0, 3.0]:
            return "does not count updates one by one"
        weight = _numbers((5,), 0)
        optimizer = self._build(weight)
        optimizer.state[weight] = made
        for step in range(STEPS):
            weight.grad = _numbers((5,), step + 1)
            optimizer.step()
        return "" if _alike([weight], wanted) else "starts with a state that is not zero"

    def _decay(self) -> bool | None:
        """Return True if weight decay acts on the weight, False if it is added to the gradient, None if neither."""
        shape, rate, decay = self._shapes[0], 0.125, 0.25
        options = {"lr": rate, "steps": 2}
        (moved,) = self._run([shape], grads=lambda _, weight: torch.zeros_like(weight), weight_decay=decay, **options)
        if _alike([moved], [_numbers(shape, 0) * (1 - rate * decay) ** 2]):
            return True
        coupled = self._run([shape], grads=lambda _, weight: decay * weight, weight_decay=0.0, **options)
        return False if _alike([moved], coupled) else None

    def _probe(self, shape: tuple[int, ...]) -> Layout:
        if shape == LARGE and not any(len(each) == 2 for each in self._shapes):
            shape = self._shapes[0]
        return probe(self._build, torch.empty(shape))


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return numbers that begin alike in every shape."""
    return (
        torch.randn(64, generator=torch.Generator().manual_seed(seed))[: torch.Size(shape).numel()].view(shape).clone()
    )


def _second_part(step: int, _: Tensor) -> Tensor:
    return _numbers((24,), step + 1)[11:]


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    # Not to the bit: vector units may round the last numbers of a tensor otherwise.
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(some, others, strict=True))


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*before, *after} if repr(before.get(name)) != repr(after.get(name)))


def _outline(layout: Layout) -> Any:
    return {name: (part.like.shape, part.like.dtype, part.is_number) for name, part in layout.parts.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))
