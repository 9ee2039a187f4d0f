"""Break it on purpose: kills, damaged files, hostile input, a long run, a lost process.

    python benchmarks/faults.py kill --kills 200      # SIGKILL at random moments and inside every phase of a save
    python benchmarks/faults.py damage --files 1000   # files flipped, cut, swapped, emptied, zeroed, replaced, removed
    python benchmarks/faults.py fuzz --recipes 10000 --data 2000
    python benchmarks/faults.py soak --steps 2000
    python benchmarks/faults.py ranks
    python benchmarks/faults.py table                 # docs/reliability.md, from benchmarks/results/faults.json

Each adds its outcome to benchmarks/results/faults.json, and exits with 1 where it is not the expected one. A run is a
fork of a process that has imported everything already, so a kill costs a second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import fault_damage  # noqa: E402  # needs the path
import fault_inputs  # noqa: E402
from common import RESULTS, fill_section, markdown_table, read_result, write_result  # noqa: E402
from fault_kills import kill, make_place, ranks, train_once  # noqa: E402
from train_fixtures import ADAGRADSELECT, recipe_values  # noqa: E402

from gradselect import AdaGradSelect, BlockOptimizer, JsonlWriter, Offload, UsageError  # noqa: E402
from gradselect.app.recipe import load_recipe  # noqa: E402

RESULT = RESULTS / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
COMPARED = RESULTS / "small" / "full.lr-0.006.seed-0.score.json.gz"


# Damage --------------------------------------------------------------------------------------------------------------


def damage(place: Path, scratch: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Damage files of each kind in turn, and read them."""
    train_once(place, scratch / "run")
    subjects = list(fault_damage.subjects(place, scratch / "run", result=COMPARED))
    outcomes: dict[str, dict[str, int]] = {}
    failures = []
    for number, subject in enumerate(subjects):
        share = count // len(subjects) + (number < count % len(subjects))
        counted, failed = fault_damage.damage_files(subject, count=share, scratch=scratch / "copy", seed=seed)
        outcomes[subject.name] = dict(counted)
        failures += failed
    return {"count": count, "outcomes": outcomes, "failures": failures}


# Hostile input -------------------------------------------------------------------------------------------------------


def fuzz(place: Path, scratch: Path, *, recipes: int, data: int, seed: int) -> dict[str, Any]:
    """Read recipes and data files with random errors, in this process and in bounded memory."""
    os.chdir(scratch)
    before = _peak_bytes()
    limit = _virtual_bytes() + 4 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    failures: list[str] = []
    outcomes = {
        "recipes": _fuzz_recipes(place, count=recipes, seed=seed, failures=failures),
        "data": _fuzz_data(count=data, seed=seed, failures=failures),
    }
    grown = _peak_bytes() - before
    return {"count": recipes + data, "outcomes": outcomes, "grown_bytes": grown, "failures": failures}


def _fuzz_recipes(place: Path, *, count: int, seed: int, failures: list[str]) -> dict[str, int]:
    values = recipe_values(place, method=ADAGRADSELECT, model={"path": "nowhere"}, data={"path": "nothing.jsonl"})
    outcomes: Counter[str] = Counter()
    for number in range(count):
        content = fault_inputs.fuzzed_recipe(values, random.Random(f"recipe/{seed}/{number}"))
        path = Path("recipe.yaml")
        path.write_bytes(content)
        # The command itself now and then: a valid recipe ends at its data, which do not exist.
        read = _command if number % 20 == 0 else load_recipe
        _judge(lambda read=read, path=path: read(path), f"recipe {number} of seed {seed}", outcomes, failures)
    return dict(outcomes)


def _fuzz_data(*, count: int, seed: int, failures: list[str]) -> dict[str, int]:
    from pydantic import TypeAdapter

    from gradselect.app.inputs.examples import render_examples
    from gradselect.app.recipe.schema import Data

    outcomes: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"data/{seed}/{number}")
        ending, section = draw.choice(fault_inputs.ENDINGS), draw.choice(fault_inputs.SECTIONS)
        path = Path(f"data.{ending}")
        path.write_bytes(fault_inputs.fuzzed_data(ending, draw))
        settings: Any = TypeAdapter(Data).validate_python({**section, "path": str(path)})
        what = f"data {number} of seed {seed}, {ending}, {section['format']}"
        _judge(lambda settings=settings: render_examples(settings, seed=0), what, outcomes, failures)
    return dict(outcomes)


def _judge(read: Callable[[], Any], what: str, outcomes: Counter[str], failures: list[str]) -> None:
    try:
        read()
        outcomes["valid"] += 1
    except UsageError as error:
        if problem := _unclear(str(error)):
            failures.append(f"{what}: {problem}: {str(error)[:300]!r}")
        outcomes["unclear" if problem else "refused"] += 1
    except Exception as error:
        outcomes["crashed"] += 1
        failures.append(f"{what}: {error!r:.300}")


def _unclear(message: str) -> str | None:
    """Return why a person cannot read the message, or None."""
    lines = message.splitlines()
    if not message.strip() or "Traceback" in message:
        return "no message for a person"
    if len(lines) > 25 or max(map(len, lines)) > 2000:
        return "too long"
    return None if all(line.isprintable() for line in lines) else "characters that cannot be shown"


def _command(path: Path) -> None:
    """Run `gradselect train`. Its message becomes an error where the exit code is 2."""
    from gradselect.app.cli import main

    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            main(["train", str(path)])
    except SystemExit as end:
        if end.code != 2:
            raise RuntimeError(f"exit code {end.code}: {shown.getvalue()[:200]}") from None
        raise UsageError(re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())) from None
    raise RuntimeError("a recipe without data has run")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# A long run ----------------------------------------------------------------------------------------------------------


def soak(place: Path, scratch: Path, *, steps: int) -> dict[str, Any]:
    """Switch blocks at every step: from a fifth of the steps on, bytes, open files and threads must not grow."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    policy = AdaGradSelect(count=2, explore_steps=steps // 2, every=1)
    optimizer = BlockOptimizer(model, policy=policy, residency=Offload(), lr=1e-4)
    optimizer.add_record_hook(JsonlWriter(scratch / "records.jsonl"))
    generator, samples = torch.Generator().manual_seed(0), []
    for step in range(steps):
        batch = torch.randint(0, 256, (2, 16), generator=generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 20) == 0:
            samples.append({"step": step + 1, **_held(), "state": _state_bytes(optimizer)})
    warm, last = samples[3], samples[-1]
    grown = {name: max(sample[name] for sample in samples[4:]) - warm[name] for name in ("bytes", "files", "threads")}
    allowed = {"bytes": 2**20, "files": 0, "threads": 0}
    failures = [f"{name}: {grown[name]:+,} after warm-up" for name in allowed if grown[name] > allowed[name]]
    return {"count": steps, "warm": warm, "last": last, "grown": grown, "failures": failures}


def _state_bytes(optimizer: BlockOptimizer) -> int:
    assert optimizer.last_record is not None
    return optimizer.last_record.state_bytes


def _held() -> dict[str, int]:
    """Resident bytes, open files and threads of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return {
        "bytes": resident,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


FAULTS = {"kill": kill, "damage": damage, "fuzz": fuzz, "soak": soak, "ranks": ranks}

# The table -----------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[str, str]] = {
    "kill": (
        "SIGKILL at a random moment, or before a random write, rename, removal or sync",
        "resumed, it ends bitwise as if nothing had happened: weights, optimizer state, records; no checkpoint is lost "
        "but the one being written",
    ),
    "damage": (
        "a file of a checkpoint, delta, model, result: a bit flipped, a page zeroed, cut, swapped, emptied, replaced, "
        "removed",
        "refused with a message that names the file, or what is read is what was written",
    ),
    "fuzz": (
        "recipes and data files with wrong values, types, encodings, tags, aliases, depths, lengths",
        "read, or refused with one message (exit code 2); memory bounded",
    ),
    "soak": ("another selection at every step", "bytes, open files and threads as after warm-up"),
    "ranks": ("SIGKILL to one of two processes", "the other ends by itself; both go on from the last checkpoint"),
}


def table(results: dict[str, Any]) -> str:
    """Return a line for each fault: what is expected, and the outcome."""
    return markdown_table(
        ["fault", "expected", "tried", "seen"],
        [
            [fault, expected, f"{results[name]['count']:,}", _seen(name, results[name])]
            for name, (fault, expected) in ROWS.items()
            if name in results
        ],
    )


def _seen(name: str, result: dict[str, Any]) -> str:
    outcome = f"{len(result['failures'])} failures" if result["failures"] else "as expected"
    return f"{outcome}{_details(name, result)}"


def _details(name: str, result: dict[str, Any]) -> str:
    match name:
        case "kill":
            return f"; {result['outcomes'].get('too late', 0)} more came after the end"
        case "damage":
            counts = sum((Counter(outcomes) for outcomes in result["outcomes"].values()), Counter())
            return f": {counts['detected']:,} refused, {counts['harmless']:,} harmless"
        case "fuzz":
            counts = sum((Counter(outcomes) for outcomes in result["outcomes"].values()), Counter())
            grown = result["grown_bytes"] / 2**20
            return f": {counts['refused']:,} refused, {counts['valid']:,} valid; {grown:,.0f} MiB more at the peak"
        case "soak":
            return f": {result['grown']['bytes'] / 1024:+,.0f} KiB"
    return ""


def put_table(results: dict[str, Any]) -> None:
    """Write the table between its markers in docs/reliability.md."""
    PAGE.write_text(fill_section(PAGE.read_text("utf-8"), "faults", table(results)), "utf-8")


def run_fault(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one fault in a folder of its own, which stays where something failed."""
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    place = make_place(scratch / "place")
    options = {
        "kill": {"count": arguments.kills, "seed": arguments.seed},
        "damage": {"count": arguments.files, "seed": arguments.seed},
        "fuzz": {"recipes": arguments.recipes, "data": arguments.data, "seed": arguments.seed},
        "soak": {"steps": arguments.steps},
        "ranks": {"seed": arguments.seed},
    }
    began = time.monotonic()
    here = Path.cwd()
    result = FAULTS[name](place, scratch, **options[name])
    os.chdir(here)
    if not result["failures"]:
        shutil.rmtree(scratch)
    return {**result, "seed": arguments.seed, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*ROWS, "table"], metavar="NAME", help=", ".join([*ROWS, "table"]))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--data", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to add the outcome to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import gradselect.app.train.run  # noqa: F401  # before the forks, which share it

    gc.freeze()  # each run collects garbage: it need not look at what imports made
    is_good = True
    results = read_result(arguments.result) if arguments.result.exists() else {}
    # Forks come first: a training in this process would leave state behind.
    for name in sorted(arguments.names, key=lambda name: name not in ("kill", "ranks")):
        if name == "table":
            put_table(results)
            continue
        results[name] = run_fault(name, arguments)
        is_good = is_good and not results[name]["failures"]
        write_result(arguments.result, results)
        print(
            f"{name}: {results[name]['count']:,} in {results[name]['seconds']} s, {results[name].get('outcomes', '')}"
        )
        print("\n".join(results[name]["failures"]))
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
