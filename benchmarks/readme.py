"""Put the tables of the committed result files into README.md and docs/results.md, and draw the picture of README.md.

python benchmarks/readme.py            # rewrites both pages and docs/images
python benchmarks/readme.py --check    # exits with 1 where a page or picture and the results differ
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import glue
import gsm8k_loss
import gsm8k_masks
import levers
import picture
import sparse_step
import sparsegrad
import step_time
from common import RESULTS, ROOT, fill_section, markdown_table, megabytes, read_result, read_rows

from gradselect.app.report.comparison import Comparison, compare_results
from gradselect.app.report.methods import Method
from gradselect.app.report.read_results import read_results
from gradselect.app.report.scores import Difference, Scores

README, TABLES = ROOT / "README.md", ROOT / "docs" / "results.md"
GIB = 2**30
HEADLINE = ("full", "AdaGradSelect matrices + embedding", "slices 1/4 + embedding", "LoRA r=16 + embedding")
"""Methods of the README's table."""

LAYERS = "AdaGradSelect 3 of 8 + embedding"
PAIRS = [
    ("AdaGradSelect matrices + embedding", "uniform matrices + embedding"),
    ("slices 1/4 + embedding", "uniform slices 1/4 + embedding"),
    ("slices 1/8 + embedding", "uniform slices 1/8 + embedding"),
    (LAYERS, "uniform 3 of 8 + embedding"),
    ("cost-aware 3 of 9", "uniform cuts, 3 of 9"),
    ("cost-aware slices", "uniform cuts, slices"),
    ("AdaGradSelect matrices + embedding", LAYERS),
    ("slices 1/4 + embedding", LAYERS),
    ("slices 1/8 + embedding", LAYERS),
    ("AdaGradSelect 3 of 8", LAYERS),
    ("cost-aware 3 of 9", LAYERS),
    ("cost-aware matrices", "AdaGradSelect matrices + embedding"),
    ("cost-aware slices", "slices 1/8 + embedding"),
    ("AdaGradSelect matrices + embedding", "LoRA r=16 + embedding"),
    ("slices 1/4 + embedding", "LoRA r=16 + embedding"),
    ("slices 1/8 + embedding", "LoRA r=16 + embedding"),
]


def card() -> str:
    """The plan of a training on a card of 12 GiB, kept as benchmarks/results/plan.json.

    gradselect plan recipes/paper/llama-3.2-1b.yaml model.path=suites/shapes/llama-3.2-1b \\
        run.batch_size=1 run.accumulation=16 --fit 12GiB --json > benchmarks/results/plan.json
    """
    plan = read_result(RESULTS / "plan.json")
    full = next(method for method in plan["methods"] if method["name"] == "full")
    ours, theirs = (method["peak_bytes"] / GIB for method in (plan["own"], full))
    return (
        "On a card of 12 GiB, Llama-3.2-1B trains so in bf16 with fp32 masters, by `gradselect plan`: "
        f"{ours:.1f} GiB at the peak where full\nfine-tuning needs {theirs:.1f}, and "
        f"{100 - 100 * plan['own']['relative_time']:.0f} % fewer operations in a step that does not explore."
    )


def quickstart() -> str:
    """The result of `make quickstart`, kept as benchmarks/results/quickstart.json."""
    result = read_result(RESULTS / "quickstart.json")
    state = {name: megabytes(num_bytes) for name, num_bytes in result["state_bytes"].items()}
    right = f"right answers on {result['num_test']} unseen problems"
    before, after = (f"{100 * result[f'accuracy_{when}']:.1f} %" for when in ("before", "after"))
    return (
        f"`make quickstart` took {result['total_seconds']:.0f} s on {result['threads']} cores after installation "
        f"({result['training_seconds']:.0f} s of it training) and gave:\n\n"
    ) + markdown_table(
        ["", "base", "AdaGradSelect, 3 of 8 layers + embedding", "full fine-tuning"],
        [
            [right, before, after, ""],
            ["speed of an exploit step, median of pairs", "", f"{result['speed_up']:.2f}", "1"],
            ["optimizer state on the device, peak MB", "", state["ours"], state["full"]],
        ],
    )


def speed() -> str:
    result = read_result(step_time.RESULT)
    settings, machine = result["settings"], result["machine"]
    size = f"{settings['layers']} layers of width {settings['hidden']}, vocabulary {settings['vocabulary']:,}"
    turns = f"--rounds {settings['rounds']} --warmup {settings['warmup']}"
    reached = ", `of limit` the share of it that was reached" if "limit_reached" in result["methods"][0] else ""
    return (
        f"`python benchmarks/step_time.py {turns}`: a Qwen2-type model of {size}, batch {settings['batch']} x "
        f"{settings['length']}, fp32, {machine['threads']} CPU threads, torch {machine['torch']}. Methods take turns; "
        "the speed-up is the median over rounds against full fine-tuning in the same round. `limit` is what the FLOPs "
        f"allow{reached}.\n\n" + step_time.markdown(result)
    )


def memory() -> str:
    result = read_result(levers.RESULT)
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
    rows = read_rows(gsm8k_loss.RESULT)
    steps, items = rows[0]["steps"], rows[0]["num_items"]
    return (
        "`python benchmarks/gsm8k_loss.py`: a Llama of 3.4 M parameters pretrained on stories, GSM8K's training file, "
        f"{steps} steps of 8, completion-only loss, cosine; loss of the answers of all {items:,} test problems in nats "
        "per token. Rates are compared with the first seed; the second ran at the best one only.\n\n"
        + gsm8k_loss.table(rows)
    )


def equal_time() -> str:
    """The comparison `small-equal-time`: every method trains as long as full fine-tuning."""
    comparison = equal_time_comparison()
    differences = {
        scores.measure.name: {one.first: one for one in pairs} for scores, _, pairs in comparison.differences
    }
    solved, loss = (named(comparison, name) for name in ("solved", "loss"))
    rows = [
        [
            *equal_time_cells(comparison, method.name),
            with_interval(differences["solved"].get(method.name), scale=100, decimals=1),
            f"{loss.estimates[method.name].value:.3f}",
            with_interval(differences["loss"].get(method.name), scale=1, decimals=3),
            megabytes(peak(comparison, method.name)),
        ]
        for method in sorted(comparison.methods, key=lambda method: loss.estimates[method.name].value)
    ]
    seeds = "/".join(str(number) for number in sorted({len(method.runs) for method in comparison.methods}))
    items = solved.estimates["full"].source
    return (
        "`gradselect compare suites/small-equal-time.yaml`: the quickstart's base and problems, 1,000 unseen problems, "
        f"{seeds} seeds, each method at its best of three or four rates, as many steps as take the time of 250 full "
        "ones in a calibration of interleaved rounds. `step`: its time against a full step. "
        f"Differences to full fine-tuning are paired, with 95 % intervals over {items}; bold: more than chance after "
        "Holm's correction. Best loss first.\n\n"
    ) + markdown_table(
        [
            "method",
            "steps",
            "step",
            "rate",
            "solved %",
            "less full",
            "loss",
            "less full",
            "peak MB of weights, gradients, state",
        ],
        rows,
    )


def equal_time_pairs() -> str:
    """Each mechanism against its twin that draws uniformly, against AdaGradSelect on layers, and against LoRA."""
    comparison = equal_time_comparison()
    tables = [named(comparison, name).differences(PAIRS) for name in ("solved", "loss")]
    rows = [
        [
            solved.first,
            solved.second,
            with_interval(solved, scale=100, decimals=1),
            with_interval(loss, scale=1, decimals=3),
            f"{peak(comparison, solved.first) / peak(comparison, solved.second):.2f}",
        ]
        for solved, loss in zip(*tables, strict=True)
    ]
    return markdown_table(["method", "against", "solved %", "loss", "its bytes / the other's"], rows)


def headline() -> str:
    """Four rows of the comparison at equal time."""
    comparison = equal_time_comparison()
    rows = [
        [
            *equal_time_cells(comparison, name, with_rate=False),
            f"{named(comparison, 'loss').estimates[name].value:.3f}",
            megabytes(peak(comparison, name)),
        ]
        for name in HEADLINE
    ]
    return (
        "`gradselect compare suites/small-equal-time.yaml`: a model of 1.4 M parameters learns word problems; every "
        "method trains as long as full\nfine-tuning, at its best learning rate, with five seeds:\n\n"
    ) + markdown_table(
        [
            "method",
            "steps in the same time",
            "time of a step",
            "solved %",
            "loss",
            "peak MB of weights, gradients, state",
        ],
        rows,
    )


def equal_time_comparison() -> Comparison:
    return comparison_of("small-equal-time")


@functools.cache
def comparison_of(suite: str) -> Comparison:
    """Return the comparison of a suite, which several tables and the picture show."""
    return compare_results(read_results(RESULTS / suite, include_dirty=False))


def blocks_and_quality() -> str:
    """The picture of README.md."""
    return picture.markdown(comparison_of(picture.SUBJECT.suite))


def equal_time_cells(comparison: Comparison, name: str, *, with_rate: bool = True) -> list[str]:
    """Return name, steps, time of a step, rate and solved problems of a method."""
    method = method_of(comparison, name)
    budget = method.runs[0].record.budget
    assert budget is not None
    rate = [f"{method.lr:g}"] if with_rate else []
    solved = 100 * named(comparison, "solved").estimates[name].value
    return [name, str(budget.steps), f"{budget.ratio:.2f}", *rate, f"{solved:.1f}"]


def named(comparison: Comparison, measure: str) -> Scores:
    return next(scores for scores in comparison.scores if scores.measure.name == measure)


def peak(comparison: Comparison, name: str) -> float:
    """Return the largest peak of counted bytes of a method's runs."""
    found = method_of(comparison, name).peak_bytes()
    assert found is not None
    return found


def method_of(comparison: Comparison, name: str) -> Method:
    return next(method for method in comparison.methods if method.name == name)


def with_interval(difference: Difference | None, *, scale: float, decimals: int) -> str:
    """Write a difference with its interval, bold if it is more than chance."""
    if difference is None:
        return ""
    value, low, high = (scale * figure for figure in (difference.value, *difference.interval))
    text = f"{value:+.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"
    return f"**{text}**" if difference.is_significant else text


def accuracy() -> str:
    """The comparison `small`, and AdaGradSelect again with more steps."""
    return (
        "`gradselect compare suites/small.yaml`, and for the row of more steps the same with `recipe.run.steps` set: "
        "the quickstart's base and problems, 1,000 unseen problems, three to five seeds, each method at the rate of "
        "lowest held-out loss of three or four.\n\n"
    ) + score_table("method", "small", "small-325-steps")


def variants() -> str:
    """AdaGradSelect with one setting changed at a time, on the same work."""
    return (
        "`gradselect compare suites/small-variants.yaml`: the same work; AdaGradSelect's 3 of 8 layers and the "
        "embedding with one setting changed, or what stands in its place, all at the rate 0.006.\n\n"
    ) + score_table("variant", "small-variants", "small-variants-290-steps", "small-variants-325-steps")


def score_table(what: str, *folders: str) -> str:
    """Return the methods of the folders of results, the best first."""
    rows = [row for folder in folders for row in scored(RESULTS / folder)]
    headings = [what, "steps", "rate", "solved %, mean (each seed)", "loss", "peak MB of weights, gradients, state"]
    return markdown_table(headings, [cells for _, cells in sorted(rows, reverse=True)])


def scored(folder: Path) -> list[tuple[float, list[str]]]:
    """Return mean accuracy and cells of each method in a folder of results."""
    results = [read_result(file) for file in sorted(folder.glob("*.score.json*"))]
    rows = []
    for method in dict.fromkeys(result["gradselect"]["method"] for result in results):
        runs = [result for result in results if result["gradselect"]["method"] == method]
        own = [run["gradselect"] for run in runs]
        solved = [100 * one["scores"]["solved"]["value"] for one in own]
        loss = statistics.mean(one["scores"]["loss"]["value"] for one in own)
        cells = [
            method,
            str(runs[0]["run_info"]["train_config"]["run"]["steps"]),
            f"{own[0]['lr']:g}",
            f"{statistics.mean(solved):.1f} ({', '.join(f'{value:.1f}' for value in solved)})",
            f"{loss:.3f}",
            megabytes(max(one["bytes"]["peak"]["together"] for one in own)),
        ]
        rows.append((statistics.mean(solved), cells))
    return rows


def sparse_speed() -> str:
    result = read_result(sparse_step.RESULT)
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
    result = read_result(sparsegrad.RESULT)
    return (
        "`python benchmarks/sparsegrad.py`: the Llama of 3.4 M parameters on GSM8K's training file; share of the "
        "squared gradient that the largest entries hold, on batches that the bases never saw, and whole training "
        "steps.\n\n" + sparsegrad.markdown(result)
    )


def encoder() -> str:
    rows = read_rows(glue.RESULT)
    steps, batch = rows[0]["steps"], rows[0]["batch"]
    return (
        "Measured by the training loop that `benchmarks/glue.py` had at commit 4332dbb; `gradselect compare "
        "suites/glue/stsb.yaml` (and its siblings) does this work now. A BERT of 1.4 M parameters that "
        "`benchmarks/pretrain_encoder.py` made in 17 "
        f"minutes of one core, {steps} steps of {batch}; scores of the dev files times 100, mean of the seeds (each "
        "seed). The rate of each method is chosen on held-out pairs of STS-B. Pooler and classifier train whole in "
        "every method and are not counted.\n\n" + glue.table(rows)
    )


def masks() -> str:
    rows = read_rows(gsm8k_masks.RESULT)
    steps, items = rows[0]["steps"], rows[0]["num_items"]
    return (
        "`python benchmarks/gsm8k_masks.py`: the same model and data as above, "
        f"{steps} steps of 8, loss of {items:,} test problems; 5 % of the entries for each compact mask. Rates are "
        "compared with the first seed; the second ran at the best one only.\n\n" + gsm8k_loss.table(rows)
    )


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"card": card, "picture": blocks_and_quality, "quickstart": quickstart, "headline": headline},
    TABLES: {
        "small_equal_time": equal_time,
        "small_equal_time_pairs": equal_time_pairs,
        "step_time": speed,
        "levers": memory,
        "gsm8k_loss": learning,
        "small": accuracy,
        "small_variants": variants,
        "sparse_step": sparse_speed,
        "sparsegrad": rotated,
        "gsm8k_masks": masks,
        "glue": encoder,
    },
}


def filled(page: Path) -> str:
    """Return the text of a page with the tables of the results."""
    text = page.read_text(encoding="utf-8")
    for name, section in PAGES[page].items():
        text = fill_section(text, name, section())
    return text


def pictures() -> dict[Path, str]:
    """Return the content of the picture's files; nothing with another matplotlib than that which drew them."""
    if not picture.is_pinned():
        print("the picture is neither drawn nor compared: that needs the matplotlib of constraints.txt")
        return {}
    drawn = picture.draw(comparison_of(picture.SUBJECT.suite))
    return {picture.FILES[scheme]: svg for scheme, svg in drawn.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args().check
    for path, after in {**{page: filled(page) for page in PAGES}, **pictures()}.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(after, encoding="utf-8")
        elif not path.exists() or after != path.read_text(encoding="utf-8"):
            sys.exit(f"{path.name} differs from the result files; run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
