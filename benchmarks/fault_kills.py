"""Kill runs, alone at any moment or one of two ranks, resume them, and compare with runs that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from train_fixtures import ADAGRADSELECT, parse, quiet, write_model, write_sums  # needs the path

from gradselect.app.train import train
from gradselect.files.manifest import MANIFEST_NAME, verify

RUN = {"steps": 6, "save_every": 2, "accumulation": 2, "keep_checkpoints": 2}
OF_A_SESSION = re.compile(r"_runtime$|_per_second$|_seconds$|^train_loss$")
"""Keys of a history that differ from process to process; `train_loss` is transformers' mean over its own steps."""


def make_place(folder: Path) -> Path:
    """Write a base model, data and text so small that a run takes a second."""
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    (folder / "known.txt").write_text("one and one is two, and two and two is four.", "utf-8")
    return folder


def train_once(place: Path, output: Path, *, resume: bool = False) -> None:
    """Train with AdaGradSelect: explore and exploit steps, two micro-batches each, a checkpoint every second step."""
    recipe = parse(place, method=ADAGRADSELECT, run={"output": str(output), **RUN})
    train(recipe, console=quiet(), resume=resume)


# Processes -----------------------------------------------------------------------------------------------------------


def start(work: Callable[[], None], *, log: Path) -> int:
    """Fork a process that does `work`. Returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore")
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(child: int, *, within: float = 120.0) -> int:
    """Wait for a fork. Returns its exit code, or minus the number of the signal that ended it.

    Raises:
        TimeoutError: it hung, and was killed.
    """
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end within {within:.0f} s")


def on_writes(root: Path, call: Callable[[int], None]) -> None:
    """Call `call(n)` before the n-th write of this process below `root`: open, rename, removal or sync."""
    count = 0

    def happened() -> None:
        nonlocal count
        count += 1
        call(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree"):
            is_write = True
        else:
            is_write = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if is_write and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(root)):
            happened()

    sync = os.fsync

    def counted_sync(stream: int) -> None:
        happened()
        sync(stream)

    os.fsync = counted_sync
    sys.addaudithook(hook)


# Kills ---------------------------------------------------------------------------------------------------------------


def kill(place: Path, scratch: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Kill runs, half of them at a random moment and half before a random write, then resume each to its end."""
    whole, log = scratch / "whole", scratch / "log.txt"
    num_writes, seconds = _measure(place, whole, log=log)
    expected, draw = contents(whole), random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures = []
    while outcomes["killed"] + len(failures) < count:
        number = outcomes.total()
        output = scratch / f"killed-{number}"
        at = draw.randrange(1, num_writes + 1) if number % 2 else None
        after = draw.uniform(0, seconds)
        outcome = _kill_once(place, output, log=log, at=at, after=after, expected=expected)
        if outcome in ("killed", "too late"):
            outcomes[outcome] += 1
            shutil.rmtree(output)
        else:
            outcomes["failed"] += 1
            failures.append(f"{f'before write {at} of {num_writes}' if at else f'after {after:.3f} s'}: {outcome}")
    return {"count": count, "writes_of_a_run": num_writes, "outcomes": dict(outcomes), "failures": failures}


def _measure(place: Path, output: Path, *, log: Path) -> tuple[int, float]:
    """Return writes and seconds of an undisturbed run, which stays in `output`. Checks that two are bitwise equal."""
    seen, first = output.with_name("writes.txt"), output.with_name("first")

    def counted() -> None:
        on_writes(first, lambda number: seen.write_text(str(number)))
        train_once(place, first)

    codes = [ended(start(counted, log=log))]
    began = time.monotonic()
    codes.append(ended(start(lambda: train_once(place, output), log=log)))
    seconds = time.monotonic() - began
    if codes != [0, 0] or contents(first) != contents(output):
        raise SystemExit(f"two undisturbed runs ended with {codes}, or differ:\n{log.read_text()[-2000:]}")
    return int(seen.read_text()), seconds


def _kill_once(place: Path, output: Path, *, log: Path, at: int | None, after: float, expected: dict[str, Any]) -> str:
    """Kill a run before write `at`, or `after` seconds. Returns "killed", "too late", or else the problem."""
    done = output.with_name(f"{output.name}.saved")

    def doomed() -> None:
        _note_checkpoints(done)
        if at:
            on_writes(output, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == at else None)
        train_once(place, output)

    child = start(doomed, log=log)
    if at is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the id is still its own
    code = ended(child)
    if code not in (0, -signal.SIGKILL):
        return f"it ended with {code}, not by the signal; see {log}"
    if problem := _lost(output, done):
        return problem
    if code == 0:
        return "too late" if contents(output) == expected else "a run that was not killed differs"
    if ended(start(lambda: train_once(place, output, resume=True), log=log)) != 0:
        return f"it could not be resumed: {log.read_text().strip().splitlines()[-1]}"
    return "killed" if contents(output) == expected else f"not the same: {_difference(contents(output), expected)}"


def _note_checkpoints(done: Path) -> None:
    """Note in `done` the checkpoints that were saved completely."""
    from gradselect.app.train.trainer import RunTrainer

    save = RunTrainer._save_checkpoint

    def noted(self: RunTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        with done.open("a") as file:
            file.write(f"{self.state.global_step}\n")

    RunTrainer._save_checkpoint = noted  # pyright: ignore[reportAttributeAccessIssue]


def _lost(output: Path, done: Path) -> str | None:
    """Return the problem if a saved checkpoint is missing, or one that is there is damaged."""
    there = {int(path.name.removeprefix("step-")): path for path in (output / "checkpoints").glob("step-*")}
    for path in there.values():
        if problem := verify(path):
            return f"{path.name} is not whole: {problem}"
    saved = [int(line) for line in done.read_text().split()] if done.exists() else []
    lost = [step for step in saved[-RUN["keep_checkpoints"] :] if step not in there and max(there, default=0) <= step]
    return f"step-{lost[0]} is lost" if lost else None


def contents(output: Path) -> dict[str, Any]:
    """Return what must be equal however often a run was killed: every file to the byte, without times."""
    files: dict[str, Any] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        match path.name:
            case "run.json" | "trainer_state.json":
                state = json.loads(path.read_text("utf-8"))
                history = state.get("log_history", state.get("history", []))
                files[name] = [{key: log[key] for key in log if not OF_A_SESSION.search(key)} for log in history]
            case "optimizer.pt" | "scheduler.pt":
                files[name] = _plain(torch.load(path, weights_only=True))
            case here if here in (MANIFEST_NAME, "training_args.bin", "recipe.yaml", "messages.log"):
                files[name] = "there" if here != "messages.log" else None
            case _:
                files[name] = path.read_bytes()
    return {name: value for name, value in files.items() if value is not None}


def _plain(value: Any) -> Any:
    """Replace tensors by their bytes: NaN equals itself, 0.0 differs from -0.0."""
    match value:
        case torch.Tensor():
            return (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
        case dict():
            return {key: _plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
    return value


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    return "; ".join(f"{name}{_first_entry(found.get(name), expected.get(name))}" for name in different)


def _first_entry(found: Any, expected: Any) -> str:
    """Describe the first logs of two histories that differ."""
    if not (isinstance(found, list) and isinstance(expected, list)):
        return ""
    if len(found) != len(expected):
        return f": {len(found)} logs, and {len(expected)}"
    pairs = next((pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]), ({}, {}))
    keys = sorted(key for key in pairs[0].keys() | pairs[1].keys() if pairs[0].get(key) != pairs[1].get(key))
    return f": {', '.join(f'{key} is {pairs[0].get(key)!r}, was {pairs[1].get(key)!r}' for key in keys)}"


# Two ranks -----------------------------------------------------------------------------------------------------------


def ranks(place: Path, scratch: Path, *, seed: int) -> dict[str, Any]:
    """Kill one of two ranks after the first checkpoint: the other must end too, and both must resume from there."""
    log, failures = scratch / "log.txt", []
    codes = [ended(child) for child in _start_ranks(place, scratch / "whole", log=log)]
    if codes != [0, 0]:
        raise SystemExit(f"two undisturbed ranks ended with {codes}:\n{log.read_text()[-2000:]}")
    expected = contents(scratch / "whole")
    for victim in (0, 1):
        output = scratch / f"victim-{victim}"
        children = _start_ranks(place, output, log=log)
        until = time.monotonic() + 120
        while not any((output / "checkpoints").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(children[victim], signal.SIGKILL)
        try:
            survivor = [ended(child, within=60) for child in children][1 - victim]
        except TimeoutError as error:
            failures.append(f"rank {victim} killed: {error}")
            continue
        if survivor == 0:
            failures.append(f"rank {victim} killed: the other ended with 0")
        if problem := _lost(output, output.with_name("none")):
            failures.append(f"rank {victim} killed: {problem}")
        codes = [ended(child) for child in _start_ranks(place, output, log=log, resume=True)]
        if codes != [0, 0] or contents(output) != expected:
            what = f"resumed with {codes}" if codes != [0, 0] else _difference(contents(output), expected)
            failures.append(f"rank {victim} killed: {what}")
    return {"count": 2, "failures": failures}


def _start_ranks(place: Path, output: Path, *, log: Path, resume: bool = False) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train_once(place, output, resume=resume)

    return [start(lambda rank=rank: work(rank), log=log) for rank in range(2)]
