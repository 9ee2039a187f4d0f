"""Put the measured tables into README.md, each between its markers, from the committed result files.

python benchmarks/readme.py            # rewrites README.md
python benchmarks/readme.py --check    # exits 1 where the README says something else than the results
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glue
import gsm8k_loss
import gsm8k_masks
import levers
import sparse_step
import sparsegrad
import step_time

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def quickstart() -> str:
    """What `make quickstart` gave, from the file that it writes, kept as benchmarks/results/quickstart.json."""
    result = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    state = {name: num_bytes / 1e6 for name, num_bytes in result["state_bytes"].items()}
    return (
        f"`make quickstart` took {result['total_seconds']:.0f} s on {result['threads']} cores after installation "
        f"({result['training_seconds']:.0f} s of it training) and gave:\n\n"
        "| | base | AdaGradSelect, 3 of 8 layers + embedding | full fine-tuning |\n"
        "|---|---|---|---|\n"
        f"| right answers on {result['num_test']} unseen problems | {100 * result['accuracy_before']:.1f} % "
        f"| {100 * result['accuracy_after']:.1f} % | |\n"
        f"| speed of an exploit step, median of pairs | | {result['speed_up']:.2f} | 1 |\n"
        f"| optimizer state on the device, peak MB | | {state['ours']:.1f} | {state['full']:.1f} |"
    )


def speed() -> str:
    result = json.loads(step_time.RESULT.read_text(encoding="utf-8"))
    settings, machine = result["settings"], result["machine"]
    size = f"{settings['layers']} layers of width {settings['hidden']}, vocabulary {settings['vocabulary']:,}"
    turns = f"--rounds {settings['rounds']} --warmup {settings['warmup']}"
    return (
        f"`python benchmarks/step_time.py {turns}`: a Qwen2-type model of {size}, batch {settings['batch']} x "
        f"{settings['length']}, fp32, {machine['threads']} CPU threads, torch {machine['torch']}. Methods take turns; "
        "the speed-up is the median over rounds against full fine-tuning in the same round. `limit` is what the FLOPs "
        "allow.\n\n" + step_time.markdown(result)
    )


def memory() -> str:
    result = json.loads(levers.RESULT.read_text(encoding="utf-8"))
    settings, model, machine = result["settings"], result["model"], result["machine"]
    return (
        f"`python benchmarks/levers.py --rounds {settings['rounds']} --observed {settings['observed']}`: a "
        f"{model['type']} of {model['layers']} layers of width {model['hidden']}, vocabulary {model['vocabulary']:,}, "
        f"{model['dtype']}, batch {settings['batch']} x {settings['length']}, {machine['threads']} thread of a CPU. "
        "Each line that begins with + adds a lever to the one above. `peak`: all that the device holds, counted, at "
        "the worst moment of a step that trains what was chosen before; `explore step`: of the first, which looks at "
        f"all gradients and has no state yet. Moments are those after {settings['observed']} steps: without offload "
        "they grow as more blocks have had a turn. `speed`: against full fine-tuning in the same round, by the "
        f"processor's time. The chunked loss has tiles of {model['tile']:,} words here, 32,768 in TRL.\n\n"
        + levers.markdown(result)
    )


def learning() -> str:
    rows = gsm8k_loss.read()
    steps, items = rows[0]["steps"], rows[0]["num_items"]
    return (
        "`python benchmarks/gsm8k_loss.py`: a Llama of 3.4 M parameters pretrained on stories, GSM8K's training file, "
        f"{steps} steps of 8, completion-only loss, cosine; loss of the answers of all {items:,} test problems in nats "
        "per token. Rates are compared with the first seed; the second ran at the best one only.\n\n"
        + gsm8k_loss.table(rows)
    )


def accuracy() -> str:
    """The comparison `small`, and AdaGradSelect again with more steps, from their result files."""
    head = (
        "`gradselect compare suites/small.yaml`, and for the row of more steps the same with `recipe.run.steps` set: "
        "the quickstart's base and problems, 1,000 unseen problems, three to five seeds, each method at the rate of "
        "lowest held-out loss of three or four.\n\n"
        "| method | steps | rate | solved %, mean (each seed) | loss | peak MB of weights, gradients, state |\n"
        "|---|---|---|---|---|---|\n"
    )
    return head + score_rows("small", "small-325-steps")


def variants() -> str:
    """AdaGradSelect with one setting changed at a time, on the same work."""
    head = (
        "`gradselect compare suites/small-variants.yaml`: the same work; AdaGradSelect's 3 of 8 layers and the "
        "embedding with one setting changed, or what stands in its place, all at the rate 0.006.\n\n"
        "| variant | steps | rate | solved %, mean (each seed) | loss | peak MB of weights, gradients, state |\n"
        "|---|---|---|---|---|---|\n"
    )
    return head + score_rows("small-variants", "small-variants-290-steps", "small-variants-325-steps")


def score_rows(*folders: str) -> str:
    rows = [row for folder in folders for row in scored(RESULTS / folder)]
    return "\n".join(f"| {' | '.join(cells)} |" for _, cells in sorted(rows, reverse=True))


def scored(folder: Path) -> list[tuple[float, list[str]]]:
    """Mean accuracy and the cells of the table of each method in a folder of results."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.score.json"))]
    rows = []
    for method in dict.fromkeys(result["gradselect"]["method"] for result in results):
        runs = [result for result in results if result["gradselect"]["method"] == method]
        own = [run["gradselect"] for run in runs]
        solved = [100 * one["scores"]["solved"]["value"] for one in own]
        loss = statistics.mean(one["scores"]["loss"]["value"] for one in own)
        cells = [
            *(method, str(runs[0]["run_info"]["train_config"]["run"]["steps"]), f"{own[0]['lr']:g}"),
            f"{statistics.mean(solved):.1f} ({', '.join(f'{value:.1f}' for value in solved)})",
            *(f"{loss:.3f}", f"{max(one['bytes']['peak']['together'] for one in own) / 1e6:.1f}"),
        ]
        rows.append((statistics.mean(solved), cells))
    return rows


def sparse_speed() -> str:
    result = json.loads(sparse_step.RESULT.read_text(encoding="utf-8"))
    settings, machine = result["settings"], result["machine"]
    return (
        f"`python benchmarks/sparse_step.py --rounds {settings['rounds']} --warmup {settings['warmup']} --threads "
        f"{machine['threads']}`: decoders with random weights, fp32, batch {settings['batch']} x {settings['length']}, "
        f"a budget of {100 * settings['density']:g} % over {settings['steps']:,} steps; methods take turns, medians. "
        "`direct`: time in the optimizer's backward hooks and in `step`; `difference`: forward, backward and step less "
        "forward and backward without an optimizer. `live`: weights, gradients and state at their peak, counted.\n\n"
        + sparse_step.markdown(result)
    )


def rotated() -> str:
    result = json.loads(sparsegrad.RESULT.read_text(encoding="utf-8"))
    return (
        "`python benchmarks/sparsegrad.py`: the Llama of 3.4 M parameters on GSM8K's training file; share of the "
        "squared gradient that the largest entries hold, on batches that the bases never saw, and whole training "
        "steps.\n\n" + sparsegrad.markdown(result)
    )


def encoder() -> str:
    rows = glue.read()
    steps, batch = rows[0]["steps"], rows[0]["batch"]
    return (
        "`python benchmarks/glue.py`: a BERT of 1.4 M parameters that `benchmarks/pretrain_encoder.py` made in 17 "
        f"minutes of one core, {steps} steps of {batch}; scores of the dev files times 100, mean of the seeds (each "
        "seed). The rate of each method is chosen on held-out pairs of STS-B. Pooler and classifier train whole in "
        "every method and are not counted.\n\n" + glue.table(rows)
    )


def masks() -> str:
    rows = gsm8k_masks.read()
    steps, items = rows[0]["steps"], rows[0]["num_items"]
    return (
        "`python benchmarks/gsm8k_masks.py`: the same model and data as above, "
        f"{steps} steps of 8, loss of {items:,} test problems; 5 % of the entries for each compact mask. Rates are "
        "compared with the first seed; the second ran at the best one only.\n\n" + gsm8k_loss.table(rows)
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "step_time": speed,
    "levers": memory,
    "gsm8k_loss": learning,
    "small": accuracy,
    "small_variants": variants,
    "sparse_step": sparse_speed,
    "sparsegrad": rotated,
    "gsm8k_masks": masks,
    "glue": encoder,
}


def filled(text: str) -> str:
    """The README's text with every section as the results have it."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), name
        replacement: Any = f"{begin}\n{section()}\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if check:
        sys.exit(int(before != after))
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
