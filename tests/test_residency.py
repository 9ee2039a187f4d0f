"""Offload on a device that is as late, or as early, as the contract allows: bitwise equal to the synchronous twin.

`HostileStreams` is a device of ordinary memory. Its `early` streams copy at once; the others copy only when somebody
waits for them. Memory that is read before it is written is NaN or stale. Dropped memory is handed out again at once. A
copy is NaN if its stream did not wait for the computation that wrote the source, or if it uses device memory that
`allocate` did not make, which the computation reuses when it is dropped. The host sees a copy only after it has waited.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_sequential
from torch import Tensor
from torch.nn import functional

import gradselect as gs
from gradselect.core.residency import AbstractMover, _Offloading
from gradselect.core.transfer import AbstractStreams, CudaStreams, HostMemory, Stream, SynchronousStreams, Transfer

WAYS = (Stream.TO_HOST, Stream.TO_DEVICE)
NUM_STEPS = 25


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class HostileStreams(AbstractStreams):
    has_own_memory = True

    def __init__(self, early: Iterable[Stream] = (), *, lockable_bytes: float = math.inf) -> None:
        self._early = tuple(early)
        self._queued: dict[Stream, list[Callable[[], object]]] = {way: [] for way in WAYS}
        self._done = dict.fromkeys(WAYS, 0)
        self._unseen: dict[Stream, set[int]] = {way: set() for way in WAYS}
        self._own: set[int] = set()
        self._dropped: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._arrived: dict[int, tuple[Tensor, Tensor]] = {}
        self._page_locked: set[int] = set()
        self._lockable_bytes = lockable_bytes
        self.held_bytes = self.peak_bytes = self.locked_bytes = self.num_host_waits = 0

    def computed(self, tensors: Iterable[Tensor]) -> None:
        """Note that the computation has written these; the copy streams see it only if they wait."""
        for tensor in tensors:
            for way in WAYS:
                self._unseen[way].add(address(tensor))

    def after(self, later: Stream, earlier: Stream) -> None:
        if later is Stream.COMPUTE:
            self._run(earlier)
        elif earlier is Stream.COMPUTE:
            self._unseen[later].clear()
        else:
            self._unseen[later] &= self._unseen[earlier]
            number = len(self._queued[earlier])
            self._queue(later, lambda: self._run(earlier, number))

    def copy(self, stream: Stream, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            self._copy(stream, target, source)

    def _copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        if stream is Stream.COMPUTE:
            target.copy_(source)
            self.computed([target])
            return
        # Views of the same memory: the caller may drop its tensor, and the memory may be handed out again.
        there, here = target.detach(), source.detach()
        is_own = address(source if stream is Stream.TO_HOST else target) in self._own
        is_right = is_own and not {address(target), address(source)} & self._unseen[stream]
        move = self._move_out if stream is Stream.TO_HOST else self._move_back
        self._queue(stream, lambda: move(there, here if is_right else torch.full_like(here, math.nan)))
        if address(target if stream is Stream.TO_HOST else source) not in self._page_locked:
            self.wait(stream)
            self.num_host_waits += 1

    def allocate(self, likes: Sequence[Tensor]) -> list[Tensor]:
        return [self._allocate(like) for like in likes]

    def _allocate(self, like: Tensor) -> Tensor:
        free = self._dropped[like.nbytes]
        memory = free.pop() if free else torch.full((like.nbytes,), 255, dtype=torch.uint8)
        self._own.add(address(memory))
        tensor = memory.view(like.dtype).as_strided(like.shape, like.stride())
        self.held_bytes += like.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(tensor, self._drop, memory).atexit = False
        return tensor

    def page_locked(self, num_bytes: int) -> Tensor:
        if self.locked_bytes + num_bytes > self._lockable_bytes:
            raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
        self.locked_bytes += num_bytes
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self._page_locked.add(address(memory))
        return memory

    def wait(self, stream: Stream) -> None:
        self._run(stream)
        if stream is Stream.TO_HOST:
            for host, value in self._arrived.values():
                host.copy_(value)
            self._arrived.clear()

    def _move_out(self, host: Tensor, value: Tensor) -> None:
        self._arrived[address(host)] = host, value.clone()

    def _move_back(self, device: Tensor, host: Tensor) -> None:
        device.copy_(self._arrived[address(host)][1] if address(host) in self._arrived else host)

    def _drop(self, memory: Tensor) -> None:
        self.held_bytes -= memory.nbytes
        self._dropped[memory.nbytes].append(memory)

    def _queue(self, stream: Stream, work: Callable[[], object]) -> None:
        self._queued[stream].append(work)
        if stream in self._early:
            self._run(stream)

    def _run(self, stream: Stream, until: int | None = None) -> None:
        queued = self._queued[stream]
        while self._done[stream] < (len(queued) if until is None else until):
            work, queued[self._done[stream]] = queued[self._done[stream]], lambda: None
            self._done[stream] += 1
            work()


@dataclass(frozen=True, kw_only=True)
class HostileOffload(gs.Offload):
    streams: AbstractStreams = field(default_factory=HostileStreams)

    def open(self, device: torch.device) -> AbstractMover:
        transfer = Transfer(self.streams, max_pinned_bytes=self.max_pinned_bytes)
        return _Offloading(transfer, max_device_bytes=self.max_device_bytes)


@dataclass(frozen=True)
class ReportingRule(gs.AdamWRule):
    """Reports to the hostile device what it has written."""

    streams: HostileStreams | None = None

    def update(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
    ) -> None:
        super().update(weights, grads, states, group)
        assert self.streams is not None
        self.streams.computed(tensor for state in states for name, tensor in state.items() if name != "step")


class Run:
    """Model of unequal blocks, and its optimizer; steps clip gradients and may accumulate them."""

    def __init__(self, policy: gs.AbstractPolicy, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.model = tiny_sequential(layers=3).to(dtype)
        self.optimizer = gs.BlockOptimizer(self.model, policy, lr=1e-2, **options)
        self.records: list[gs.StepRecord] = []
        self.optimizer.add_record_hook(self.records.append)

    def steps(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for part in range(self.optimizer.accumulation_steps):
                generator = torch.Generator().manual_seed(1000 * part + number)
                tokens = torch.randint(0, VOCABULARY, (2, 4), generator=generator)
                logits = self.model(tokens)
                functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def hostile(
    policy: gs.AbstractPolicy, streams: HostileStreams, *, limits: Mapping[str, int] | None = None, **options: Any
):
    residency = HostileOffload(streams=streams, **(limits or {}))
    return Run(policy, residency=residency, rule=ReportingRule(streams=streams), **options)


def twin_of(policy: gs.AbstractPolicy, **options: Any) -> Run:
    """Return the same run with synchronous copies."""
    return Run(policy, residency=gs.Offload(), rule=ReportingRule(streams=HostileStreams()), **options)


def through_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_alike(first: Any, second: Any) -> None:
    """Assert that nested dicts and lists of tensors and numbers are bitwise equal."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_alike(value, second[key])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_alike(one, other)
    else:
        assert first == second


def assert_twins(ours: Run, twin: Run) -> None:
    assert ours.records == twin.records
    assert ours.optimizer.memory() == twin.optimizer.memory()
    assert_alike(dict(ours.model.state_dict()), dict(twin.model.state_dict()))
    assert_alike(ours.optimizer.state_dict(), twin.optimizer.state_dict())


POLICIES = {
    "adagradselect": lambda: gs.AdaGradSelect(count=2, explore_steps=8, delta=9.0),
    "gradient norm, refreshed": lambda: gs.GradNormTopK(count=3, refresh=3, temperature=2.0),
    "uniform": lambda: gs.Uniform(count=3),
    "cyclic": lambda: gs.Cyclic(every=1),
    "misa": lambda: gs.MISA(share=0.3, every=1),
    "fixed": lambda: gs.Fixed(("layer.1", "norm")),
}
ADVERSARIES = list(itertools.chain.from_iterable(itertools.combinations(WAYS, number) for number in range(3)))


@pytest.mark.parametrize("early", ADVERSARIES, ids=lambda early: "+".join(way.value for way in early) or "late")
@pytest.mark.parametrize("name", POLICIES)
def test_no_order_that_the_device_may_take_changes_a_bit(name: str, early: tuple[Stream, ...]) -> None:
    """Explore and exploit steps, masters, clipping, accumulation; saved and loaded in between."""
    streams = HostileStreams(early)
    options = {"accumulation_steps": 1 + len(early) % 2}
    ours, twin = hostile(POLICIES[name](), streams, **options), twin_of(POLICIES[name](), **options)
    for start in range(0, NUM_STEPS, 5):
        for run in (ours, twin):
            run.steps(range(start, start + 5))
        assert_twins(ours, twin)
        if start == 10:
            for run in (ours, twin):
                run.optimizer.load_state_dict(run.optimizer.state_dict())
            assert_twins(ours, twin)
    num_switches = sum(record.moved_bytes > 0 for record in ours.records)
    assert num_switches == 0 if name == "fixed" else num_switches > NUM_STEPS // 5


@pytest.mark.parametrize(("name", "early"), [("adagradselect", ()), ("uniform", (Stream.TO_HOST,)), ("cyclic", ())])
def test_saved_at_any_step_it_resumes_bitwise(name: str, early: tuple[Stream, ...]) -> None:
    def start() -> Run:
        return hostile(POLICIES[name](), HostileStreams(early))

    whole, saved = start(), []
    for step in range(12):
        whole.steps([step])
        saved.append((through_torch(whole.optimizer.state_dict()), copy.deepcopy(whole.model.state_dict())))
    for step in (1, 4, 10):
        resumed = start()
        resumed.steps(range(20, 24))  # so that loading replaces states, some of them while they are copied
        resumed.records.clear()
        resumed.model.load_state_dict(saved[step][1])
        resumed.optimizer.load_state_dict(saved[step][0])
        resumed.steps(range(step + 1, 12))
        assert resumed.records == whole.records[step + 1 :]
        assert_alike(through_torch(resumed.optimizer.state_dict()), saved[-1][0])
        assert_alike(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_masters_are_refreshed_wherever_they_are_on_their_way_to() -> None:
    streams = HostileStreams()
    ours, twin = hostile(gs.Uniform(count=3), streams), twin_of(gs.Uniform(count=3))
    for start in (0, 10):
        for run in (ours, twin):
            run.steps(range(start, start + 10))
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(1.25)
            run.optimizer.refresh_masters()
    assert_twins(ours, twin)


def test_the_model_may_go_elsewhere_and_come_back() -> None:
    """The model may move to the host to be saved; optimizer state stays, as with torch's optimizers."""
    ours, twin = hostile(gs.Uniform(count=3), HostileStreams()), twin_of(gs.Uniform(count=3))
    for run in (ours, twin):
        run.steps(range(6))
        assert run.optimizer._states._open is not None
        run.optimizer._states._open = torch.device("meta"), *run.optimizer._states._open[1:]
        run.optimizer.state_dict()
        run.steps(range(6, 16))
    assert_twins(ours, twin)


class FullDevice(HostileStreams):
    """Has no memory for the allocation whose number is `fails_at`, counted down from there."""

    fails_at = 0

    def allocate(self, likes: Sequence[Tensor]) -> list[Tensor]:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().allocate(likes)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_out_of_memory_within_a_switch_a_loop_that_goes_on_ends_in_the_same_bits(fails_at: int) -> None:
    """The step is done; blocks that had moved counted as where they had been, and were copied from there."""
    streams = FullDevice()
    ours, twin = hostile(gs.Uniform(count=3), streams), twin_of(gs.Uniform(count=3))
    for run in (ours, twin):
        run.steps(range(10))
    streams.fails_at, num_failed = fails_at, 0
    for step in range(10, 20):
        twin.steps([step])
        try:
            ours.steps([step])
        except torch.OutOfMemoryError:
            ours.optimizer.zero_grad()
            num_failed += 1
    assert num_failed == 1
    assert_alike(dict(ours.model.state_dict()), dict(twin.model.state_dict()))
    assert ours.optimizer.memory() == twin.optimizer.memory()


def test_out_of_memory_at_the_first_update_of_a_block_leaves_no_state_outside_of_the_pool() -> None:
    streams = FullDevice()
    run = hostile(gs.Fixed(("layer.1",)), streams)
    streams.fails_at = 2
    with pytest.raises(torch.OutOfMemoryError):
        run.steps([0])
    held = [tensor for state in run.optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert held
    assert all(address(tensor) in streams._own for tensor in held)


# Memory on the device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adagradselect", "uniform", "cyclic"])
def test_the_device_never_holds_more_than_the_largest_selection(name: str) -> None:
    streams = HostileStreams()
    run = hostile(POLICIES[name](), streams)
    run.steps(range(NUM_STEPS))
    assert streams.peak_bytes == max(record.state_bytes for record in run.records)


def test_room_on_the_device_lets_what_comes_go_first() -> None:
    """All three layers have been selected. With room for two, the third is fetched before the second leaves."""
    peaks = {}
    for limit in (1, 2):
        streams = HostileStreams()
        block = 12 * sum(parameter.numel() for parameter in Run(gs.All()).model[1].parameters())
        policy = gs.Cyclic(every=1, among=("layer.*",))
        run = hostile(policy, streams, limits={"max_device_bytes": limit * block})
        run.steps(range(12))
        peaks[limit] = streams.peak_bytes // block
    assert peaks == {1: 1, 2: 2}


def test_a_selection_that_does_not_fit_is_refused_with_the_bytes_it_takes() -> None:
    policy = gs.Fixed(("layer.1", "layer.2"))
    needed = Run(policy)
    needed.steps(range(1))
    num_bytes = needed.records[-1].state_bytes
    Run(policy, residency=gs.Offload(max_device_bytes=num_bytes)).steps(range(1))
    with pytest.raises(gs.UsageError, match=rf"layer.1, layer.2 .* write max_device_bytes={num_bytes} or more"):
        Run(policy, residency=gs.Offload(max_device_bytes=num_bytes - 1))


@pytest.mark.parametrize("limits", [{"max_device_bytes": 0}, {"max_device_bytes": "12GiB"}, {"max_pinned_bytes": -1}])
def test_a_limit_that_is_none_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(gs.UsageError, match=r"must be a whole number >= ., of bytes"):
        gs.Offload(**limits)


# Memory on the host --------------------------------------------------------------------------------------------------


def test_host_memory_is_page_locked_once_and_used_again(caplog: pytest.LogCaptureFixture) -> None:
    """Also when loaded states replace existing ones, whose memory then no longer counts."""
    policy, streams = gs.Cyclic(every=1, among=("layer.*",)), HostileStreams()
    run = hostile(policy, streams)
    locked = []
    for step in range(12):
        run.steps([step])
        locked.append(streams.locked_bytes)
    assert locked[4] > 0
    assert locked[5:] == [locked[5]] * 7
    again = hostile(policy, HostileStreams(), limits={"max_pinned_bytes": locked[-1]})
    for step in range(4):
        again.steps(range(8 * step, 8 * step + 8))
        again.optimizer.load_state_dict(again.optimizer.state_dict())
    assert not caplog.messages


@pytest.mark.parametrize(
    ("streams", "limits", "reason"),
    [
        (HostileStreams(lockable_bytes=20_000), {}, "failed (CUDA error: out of memory)"),
        (HostileStreams(), {"max_pinned_bytes": 20_000}, "max_pinned_bytes=20000 is reached"),
        (HostileStreams(), {"max_pinned_bytes": 0}, None),
    ],
)
def test_short_of_page_locked_memory_it_goes_on_with_pageable_and_says_so_once(
    streams: HostileStreams, limits: dict[str, int], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ours, twin = hostile(gs.Uniform(count=3), streams, limits=limits), Run(gs.Uniform(count=3))
        for run in (ours, twin):
            run.steps(range(NUM_STEPS))
    assert_alike(dict(ours.model.state_dict()), dict(twin.model.state_dict()))
    assert streams.num_host_waits > 0
    assert len(caplog.messages) == (reason is not None)
    assert reason is None or reason in caplog.text


@pytest.mark.parametrize(
    "like", [torch.ones(2, 3), torch.ones(2, 3).T, torch.ones(4, 6)[:, ::2]], ids=["rows", "columns", "with gaps"]
)
def test_host_memory_has_the_layout_that_torch_would_give(like: Tensor) -> None:
    taken = HostMemory(HostileStreams(), max_pinned_bytes=None).take(like)
    assert (taken.shape, taken.stride()) == (like.shape, torch.empty_like(like).stride())


# The order itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", ADVERSARIES, ids=str)
def test_memory_that_the_computation_has_done_with_is_written_to_only_then(early: tuple[Stream, ...]) -> None:
    """A state is dropped right after its update, nothing leaves, and incoming state takes its memory."""
    streams = HostileStreams(early)
    transfer = Transfer(streams, max_pinned_bytes=None)
    away, here = {"exp_avg": torch.ones(4)}, {"exp_avg": torch.zeros(4)}
    for state in (away, here):
        transfer.adopt(state, ["exp_avg"])
    transfer.begin()
    transfer.send([(away, ["exp_avg"])])
    transfer.settle()
    streams.computed(here.values())
    here.clear()
    transfer.begin()
    transfer.fetch([(away, ["exp_avg"])])
    transfer.settle()
    assert torch.equal(away["exp_avg"], torch.ones(4))


@pytest.mark.parametrize("early", ADVERSARIES, ids=str)
def test_what_has_not_come_yet_may_leave_again(early: tuple[Stream, ...]) -> None:
    """Two switches with no update in between."""
    transfer = Transfer(HostileStreams(early), max_pinned_bytes=None)
    states = [{"exp_avg": torch.full((4,), value)} for value in (1.0, 2.0)]
    for state in states:
        transfer.adopt(state, ["exp_avg"])
    for leaving, coming in [(states[:1], []), *[(states[1:], states[:1]), (states[:1], states[1:])] * 3]:
        transfer.begin()
        for state in leaving:
            transfer.send([(state, ["exp_avg"])])
        for state in coming:
            transfer.fetch([(state, ["exp_avg"])])
    transfer.wait()
    assert [state["exp_avg"].tolist() for state in states] == [[1.0] * 4, [2.0] * 4]


def test_a_device_that_copies_at_once_takes_the_same_path() -> None:
    streams = SynchronousStreams(torch.device("cpu"))
    streams.has_own_memory = True
    ours, twin = Run(gs.Uniform(count=3), residency=HostileOffload(streams=streams)), Run(gs.Uniform(count=3))
    for run in (ours, twin):
        run.steps(range(10))
    assert_alike(dict(ours.model.state_dict()), dict(twin.model.state_dict()))
    assert ours.optimizer.memory()["state_on_host"] > 0


def test_on_cuda_the_later_lane_waits_for_the_earlier_and_copies_run_on_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Visible without a GPU: which stream waits for which, and where copies are queued: those of a block at once."""
    said: list[str] = []
    streams = iter(("out", "back"))

    class FakeStream:
        def __init__(self, device: torch.device | None = None, name: str | None = None) -> None:
            self.name = name or next(streams)

        def wait_stream(self, other: FakeStream) -> None:
            said.append(f"{self.name} after {other.name}")

        def synchronize(self) -> None:
            said.append(f"host waits for {self.name}")

    def within(stream: FakeStream) -> contextlib.AbstractContextManager[None]:
        said.append(f"on {stream.name}")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(name="compute"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    transfer = Transfer(CudaStreams(torch.device("cpu")), max_pinned_bytes=0)
    names = ["exp_avg", "exp_avg_sq"]
    state = {name: torch.ones(4) for name in names}
    transfer.adopt(state, names)
    transfer.begin()
    transfer.send([(state, names)])
    transfer.fetch([(state, names)])
    transfer.wait()
    assert said == [
        *("on back", "compute after back", "on compute"),
        *("out after compute", "back after compute", "on out", "back after out", "on back", "on back"),
        *("compute after back", "host waits for out"),
    ]
    assert all(torch.equal(state[name], torch.ones(4)) for name in names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; benchmarks/offload.py is the long run")
def test_on_a_gpu_it_is_bitwise_the_run_that_moves_nothing() -> None:
    weights = []
    for residency in (gs.Offload(), gs.Keep()):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, device="cuda") for _ in range(6)))
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), residency=residency)
        for _ in range(60):
            model(torch.ones(1, 2048, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(dict(model.state_dict()))
    assert_alike(*weights)
