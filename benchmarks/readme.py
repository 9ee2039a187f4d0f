"""Put the tables of committed result files into README.md and pages of docs, and draw their picture.

Results of a comparison come into benchmarks/results by `python benchmarks/pack_results.py`. The sections of suites on
a real model, see real_model.py, and of suites/seeds, see seed_methods.py, are empty until their results are there.

python benchmarks/readme.py            # rewrites the pages and docs/images
python benchmarks/readme.py --check    # exits with 1 where a page or picture and the results differ
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equal_time
import glue
import gsm8k_loss
import gsm8k_masks
import levers
import picture
import real_model_scores
import seed_methods
import sparse_step
import sparsegrad
import step_time
from common import RESULTS, ROOT, fill_section, markdown_table, megabytes, read_result, read_rows
from gpu import SHAPES
from real_model import SUITES
from real_model_pages import answers, rates

from gradselect import AdaGradSelect

README = ROOT / "README.md"
START, QUICKSTART, CHOOSE, TABLES, REAL_MODEL = (
    ROOT / "docs" / f"{name}.md" for name in ("index", "quickstart", "choose", "results", "real-model")
)
GIB = 2**30


def card() -> str:
    """The plan of a training on a card of 12 GiB, kept as benchmarks/results/plan.json.

    gradselect plan recipes/paper/llama-3.2-1b.yaml method.preset=null model.path=suites/shapes/llama-3.2-1b \\
        run.batch_size=1 run.accumulation=16 --fit 12GiB --json > benchmarks/results/plan.json
    """
    plan = read_result(RESULTS / "plan.json")
    others = {method["name"]: method for method in plan["methods"]}
    rows = {
        "full fine-tuning": others["full"],
        "**AdaGradSelect**, a fifth of the layers": plan["own"],
        "LoRA, rank 16": others["lora rank 16"],
    }
    on_card = read_result(RESULTS / "gpu" / "llama-3.2-1b.json")
    full, selected, lora = (
        f"{max(row['bytes'][kind] for kind in ('peak', 'explore') if kind in row['bytes']) / GIB:.1f} GiB and "
        f"{1000 * statistics.median(row['seconds']):.0f} ms"
        for name in ("full AdamW", "AdaGradSelect 20 %, offload", "LoRA r=32")
        for row in on_card["rows"]
        if row["name"] == name
    )
    (planned,) = (
        f"{row['planned'] / GIB:.1f}" for row in on_card["rows"] if row["name"] == "AdaGradSelect 20 %, offload"
    )
    explored = AdaGradSelect(explore_steps=250).expected_explore_steps(1000) / 1000
    return (
        "Llama-3.2-1B in bf16, 16 rows of 512 tokens a step, one row at a time, by `gradselect plan`:\n\n"
        + markdown_table(
            ["", "peak on the card, GiB", "state in host memory, GiB", "operations of a step"],
            [
                [name, *(f"{size / GIB:.1f}" for size in sizes_of(method)), f"{method['relative_time']:.2f}"]
                for name, method in rows.items()
            ],
        )
        + (
            "\n\nA step of AdaGradSelect that looks at all gradients has "
            f"{plan['own']['steps']['explore']['relative_time']:.2f}; by default about {100 * explored:.0f} % of the "
            f"steps do so. Measured on one {on_card['machine']['device']}, 8 rows at a time: full {full} a step, "
            f"AdaGradSelect {selected} in its first steps (for a long run {planned} GiB are planned), LoRA of rank 32 "
            f"{lora} ([results](docs/results.md#on-a-gpu))."
        )
    )


def planned() -> str:
    """Every method of the same plan."""
    plan = read_result(RESULTS / "plan.json")
    methods = [method for method in plan["methods"] if "peak_bytes" in method]
    return (
        "Llama-3.2-1B in bf16, 16 rows of 512 tokens a step, one row at a time, by `gradselect plan`; times are "
        "operations of a step that does not explore:\n\n"
    ) + markdown_table(
        ["method", "peak on the card, GiB", "state in host memory, GiB", "time"],
        [
            [method["name"], *(f"{size / GIB:.1f}" for size in sizes_of(method)), f"{method['relative_time']:.2f}"]
            for method in methods
        ],
    )


def sizes_of(method: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes at the peak on the device, and those of state on the host."""
    return method["peak_bytes"], method["bytes"]["state_on_host"]


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
        ["", "base model", "AdaGradSelect, 3 of 8 layers + embedding", "full fine-tuning"],
        [
            [right, before, after, ""],
            ["speed of a step that does not explore", "", f"{result['speed_up']:.2f}", "1"],
            ["optimizer state on the device, peak MB", "", state["ours"], state["full"]],
        ],
    )


def headline() -> str:
    """Four methods at equal time, on the real model once its results are there."""
    return real_model_scores.headline() or equal_time.headline()


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


def on_gpu() -> str:
    """The shapes of published models on a GPU, each with a sentence on what was measured."""
    parts = []
    for shape in sorted(SHAPES):
        result = read_result(RESULTS / "gpu" / f"{shape}.json")
        settings, machine, model = result["settings"], result["machine"], result["model"]
        parts.append(
            f"**{shape}**, random weights, {model['dtype']} with fp32 masters, batch {settings['batch']} x "
            f"{settings['length']}, on one {machine['device']} with torch {machine['torch']}: `python "
            f"benchmarks/levers.py --preset {settings['preset']} --rounds {settings['rounds']}`.\n\n"
            + levers.markdown(result)
        )
    return "\n\n".join(parts)


def learning() -> str:
    rows = read_rows(gsm8k_loss.RESULT)
    steps, items = rows[0]["steps"], rows[0]["num_items"]
    return (
        "`python benchmarks/gsm8k_loss.py`: a Llama of 3.4 M parameters pretrained on stories, GSM8K's training file, "
        f"{steps} steps of 8, completion-only loss, cosine; loss of the answers of all {items:,} test problems in nats "
        "per token. Rates are compared with the first seed; the second ran at the best one only.\n\n"
        + gsm8k_loss.table(rows)
    )


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
    README: {
        "card": card,
        "picture": functools.partial(picture.markdown, README),
        "headline": headline,
    },
    QUICKSTART: {"quickstart": quickstart},
    CHOOSE: {"planned": planned},
    START: {"picture": functools.partial(picture.markdown, START)},
    TABLES: {
        **{suite.name: functools.partial(real_model_scores.section, suite) for suite in SUITES},
        "small_equal_time": equal_time.all_methods,
        "small_equal_time_pairs": equal_time.pairs,
        "step_time": speed,
        "levers": memory,
        "gpu": on_gpu,
        "gsm8k_loss": learning,
        "small": accuracy,
        "small_variants": variants,
        "sparse_step": sparse_speed,
        "sparsegrad": rotated,
        "gsm8k_masks": masks,
        "glue": encoder,
        **{suite.name: functools.partial(seed_methods.section, suite) for suite in seed_methods.SUITES},
    },
    REAL_MODEL: {"rates": rates, "answers": answers},
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
    return {picture.FILES[scheme]: svg for scheme, svg in picture.draw(picture.subject()).items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args(words).check
    for path, after in {**{page: filled(page) for page in PAGES}, **pictures()}.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(after, encoding="utf-8")
        elif not path.exists() or after != path.read_text(encoding="utf-8"):
            sys.exit(f"{path.name} differs from the result files; run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
