"""Rule made from a class of torch.optim."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradselect.parallel import local_part
from gradselect.usage import UsageError

from .rules import AbstractRule, Ages, State
from .torch_state import Layout, flat, probe
from .torch_trial import examine

UPDATES = "num_updates"
"""Counts the updates of a weight; at the first the class makes its own state."""

OURS = ("params", "lr", "weight_decay")
"""Arguments of a class that the optimizer sets."""

FAST = ("fused", "foreach", "capturable")
"""Options of torch's classes that choose kernels."""


class TorchRule(AbstractRule):
    """Update rule made from any `torch.optim.Optimizer` class that keeps its state by parameter.

    Whole tensors move as in the class itself, to the bit. Its state becomes plain tensors: it follows the residency,
    resumes and passes `torch.load(weights_only=True)`, quantised moments of torchao too. `lr` and `weight_decay` are
    those of the optimizer, whose defaults are AdamW's; all other options are the rule's. They are in `param_groups`,
    where schedulers may change them.

    A trial on tiny tensors tells whether the class may be a rule. Refused are classes that need a closure, keep numbers
    for all weights together (schedule-free, Prodigy), couple parameters, or fail in a step. It also tells whether the
    class moves each entry for itself, as Lion and Adam do and Adafactor and Muon do not: only then `SparseOptimizer`
    takes it with a compact mask, and shards may cut its state.

    Args:
        kind: the class, e.g. `torch.optim.Adafactor`.
        options: its keyword arguments except `lr` and `weight_decay`.

    Raises:
        UsageError: says why the class cannot be a rule, or which option it does not know.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> rule = gs.TorchRule(torch.optim.Adafactor, beta2_decay=-0.7)
        >>> optimizer = gs.BlockOptimizer(model, policy=gs.Uniform(count=1), rule=rule, lr=1e-2, weight_decay=0.0)
        >>> optimizer.param_groups[0]["beta2_decay"], rule.works_on_entries
        (-0.7, False)
    """

    def __init__(self, kind: type[Optimizer], /, **options: Any) -> None:
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise UsageError(
                f"TorchRule takes an optimizer class and got {type(kind).__name__}; write "
                "gs.TorchRule(torch.optim.Adafactor), and its options after it"
            )
        for name in OURS:
            if name in options:
                raise UsageError(
                    f"{name} of TorchRule({kind.__name__}, ...) belongs to the optimizer; write it there, e.g. "
                    f"gs.BlockOptimizer(model, policy=..., rule=gs.TorchRule({kind.__name__}), lr=1e-4, "
                    "weight_decay=0.0)"
                )
        self.kind, self.options = kind, options
        self._takes_lr = "lr" in inspect.signature(kind).parameters
        self._layouts: dict[Any, Layout] = {}
        self._host_names = {UPDATES}
        self._stepper: tuple[float, Optimizer] | None = None
        self.findings = examine(kind, self._build, self._build_plain)
        self.hyper_parameters = self.findings.hyper_parameters
        self.works_on_shards = self.findings.is_elementwise
        self.why_whole_tensors = self.findings.why_whole_tensors
        self.state_names = self.findings.state_names
        self._host_names |= set(self.findings.host_names)

    def __repr__(self) -> str:
        return self.identity

    @property
    def name(self) -> str:
        return f"TorchRule({self.kind.__name__})"

    @property
    def identity(self) -> str:
        options = "".join(f", {name}={_text(value)}" for name, value in sorted(self.options.items()))
        return f"TorchRule({self.kind.__module__}.{self.kind.__qualname__}{options})"

    @property
    def works_on_entries(self) -> bool:
        return not self.why_whole_tensors

    @property
    def decouples_decay(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.findings.decouples_decay is None:
            raise UsageError(
                f"{self.kind.__name__} decays weights in a way of its own, neither as AdamW nor as SGD, and a mask on "
                'the gradient has to decay single entries; write mask="update", or rule=gs.AdamWRule()'
            )
        return self.findings.decouples_decay

    def group_options(self) -> dict[str, Any]:
        return dict(self.findings.group_options)

    def check_weight(self, name: str, weight: Tensor) -> None:
        try:
            self._layout(local_part(weight))
        except UsageError as error:
            raise UsageError(f"{name!r} of shape {list(weight.shape)}: {error}; {_advice(weight)}") from None

    def counter_device(self, weight: Tensor) -> torch.device:
        on_device = self.options.get("fused") or self.options.get("capturable")
        return weight.device if on_device and not weight.is_meta else torch.device("cpu")

    def large_names(self, state: Mapping[str, Tensor]) -> list[str]:
        return [name for name in state if name not in self._host_names and name != "master"]

    def make_state(self, weight: Tensor) -> State:
        state: State = {UPDATES: torch.zeros((), dtype=torch.float32)}
        for name, part in self._layout(weight).parts.items():
            device = torch.device("cpu") if part.is_number else weight.device
            if part.is_on_host and not part.is_number:
                device = self.counter_device(weight)
            state[name] = torch.zeros_like(part.like, device=device)
        return state

    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        fresh = [float(state[UPDATES]) == 0.0 for state in states]
        for is_fresh in (True, False):
            chosen = [number for number, each in enumerate(fresh) if each is is_fresh]
            if chosen:
                self._step(
                    [weights[number] for number in chosen],
                    [grads[number] for number in chosen],
                    [states[number] for number in chosen],
                    group=group,
                    is_fresh=is_fresh,
                )

    def update_entries(
        self, weights: Tensor, gradients: Tensor, state: Mapping[str, Tensor], ages: Ages, group: Mapping[str, Any]
    ) -> None:
        every_age = ages.updates.unique() if self.findings.counters else ages.updates[:1]
        if len(every_age) == 1:
            self._move_entries(weights, gradients, dict(state), int(every_age), group)
            return
        for age in every_age.tolist():
            # A class counts updates by tensor: entries of one age are a tensor of their own.
            places = (ages.updates == age).nonzero().view(-1)
            some = {name: each[places] for name, each in state.items()}
            moved = weights[places]
            self._move_entries(moved, gradients[places], some, age, group)
            weights[places] = moved
            for name, each in state.items():
                each[places] = some[name]

    def _move_entries(
        self, weights: Tensor, gradients: Tensor, state: State, age: int, group: Mapping[str, Any]
    ) -> None:
        layout = self._layout(weights)
        for name in self.findings.counters:
            dtype, device = layout.parts[name].like.dtype, self.counter_device(weights)
            state[name] = torch.full((), age - 1, dtype=dtype, device=device)
        self._step([weights], [gradients], [{UPDATES: torch.ones(()), **state}], group=group, is_fresh=False)

    def _step(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        group: Mapping[str, Any],
        is_fresh: bool,
    ) -> None:
        """Let the class take a step on shells of the weights; write its state back into ours.

        At the first update of a weight a new instance makes the state: classes do so in different ways, some from the
        first gradient, some in the constructor.
        """
        shells = [weight.detach() for weight in weights]
        for shell, grad in zip(shells, grads, strict=True):
            shell.grad = grad
        layouts = [self._layout(weight) for weight in weights]
        optimizer = (
            self._build(*shells, lr=_base_rate(group)) if is_fresh else self._reused(_base_rate(group), shells[0])
        )
        optimizer.param_groups = [{**_filled(optimizer.param_groups[0], group), "params": shells}]
        if not is_fresh:
            for shell, state, layout in zip(shells, states, layouts, strict=True):
                optimizer.state[shell] = layout.restore({k: v for k, v in state.items() if k in layout.parts})
        optimizer.step()
        for weight, shell, state, layout in zip(weights, shells, states, layouts, strict=True):
            if shell.data_ptr() != weight.data_ptr():  # the class put a new tensor in the place of the weight
                weight.copy_(shell)
            for name, value in self._said(flat, optimizer.state[shell], layout):
                _write(state[name], value)
            state[UPDATES] += 1
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = []

    def _said(self, function: Any, *arguments: Any) -> Any:
        try:
            return list(function(*arguments))
        except UsageError as error:
            raise UsageError(f"{self.kind.__name__} cannot be a rule: {error}") from None

    def _build(self, *weights: Tensor, lr: float = 1e-3, **replaced: Any) -> Optimizer:
        rate = {"lr": lr} if self._takes_lr else {}
        return self.kind(list(weights), **rate, **{**self.options, **replaced})

    def _build_plain(self, *weights: Tensor) -> Optimizer:
        """Build without fused kernels, which refuse the meta device and some others; the state is the same."""
        return self._build(*weights, **{name: False for name in FAST if self.options.get(name)})

    def _reused(self, lr: float, shell: Tensor) -> Optimizer:
        """Return the instance that steps with state that exists."""
        if self._stepper is None or self._stepper[0] != lr:
            optimizer = self._build(shell, lr=lr)
            optimizer.state.clear()
            self._stepper = (lr, optimizer)
        return self._stepper[1]

    def _layout(self, weight: Tensor) -> Layout:
        key = (tuple(weight.shape), weight.stride(), weight.dtype)
        if key not in self._layouts:
            try:
                layout = probe(self._build_plain, weight)
            except UsageError as error:
                raise UsageError(f"{self.kind.__name__} cannot be a rule: {error}") from None
            except Exception as error:
                raise UsageError(f"{self.kind.__name__} refuses it: {str(error).splitlines()[0]}") from error
            self._host_names |= {name for name, part in layout.parts.items() if part.is_on_host}
            self._layouts[key] = layout
        return self._layouts[key]


def _base_rate(group: Mapping[str, Any]) -> float:
    """Learning rate of the constructor, before schedules; some classes refuse 0."""
    return float(group.get("initial_lr") or group["lr"]) or 1e-3


def _filled(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class's hyper-parameters with our values; a number stays a tensor where the class keeps one."""
    return {
        name: torch.full_like(value, float(ours[name])) if isinstance(value, Tensor) else ours[name]
        for name, value in theirs.items()
        if name in ours and name != "params"
    } | {name: value for name, value in theirs.items() if name not in ours and name != "params"}


def _write(target: Tensor, value: Any) -> None:
    if not isinstance(value, Tensor):
        target.fill_(value)
    elif value is not target and value.data_ptr() != target.data_ptr():
        target.copy_(value)


def _text(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def _advice(weight: Tensor) -> str:
    return (
        "freeze such weights before the optimizer is built: for p in model.parameters(): "
        f"p.requires_grad_(p.requires_grad and p.ndim != {weight.ndim})"
    )


def check_no_torch_class(rule: object) -> None:
    """Refuse an optimizer, or a class of one, where a rule is expected.

    Raises:
        UsageError: says what to write, or why the class cannot be a rule.
    """
    kind = rule if isinstance(rule, type) else type(rule)
    if issubclass(kind, Optimizer):
        TorchRule(kind)
        what = "a class" if kind is rule else "an optimizer of its own"
        raise UsageError(
            f"rule={kind.__name__} is {what} and not a rule; write rule=gs.TorchRule({kind.__name__}), and after the "
            "class its options except lr and weight_decay"
        )
