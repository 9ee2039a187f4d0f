"""Methods of the literature at equal budgets, suites/seeds: scores, state and steps beside LoRA's, for docs/results.md.

The steps are of a calibration, which takes the methods in turn on a machine that does nothing else:

    gradselect compare suites/seeds/decoder.yaml budget.time_of=LoRA --calibrate-only \\
        --results runs/compare/seeds-decoder-steps
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common import markdown_table, megabytes
from compared import with_interval
from real_model import Suite, measures, title_of, value_of

from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.scores import Difference, Scores
from gradselect.app.results import Calibration, read_calibration

LORAS = ("LoRA", "LoRA r=4")
"""The LoRA that the other methods stand beside, as the suites name it."""
PUBLISHED = {
    "seeds-mrpc": "Published on the development set: 89.5 for the MiniLM of 12 layers, of which this encoder keeps "
    "every second one, and 87.3 for BERT-base beside it (Wang et al., arXiv 2002.10957; table of the model's card).",
    "seeds-stsb": "Published for the same encoder: a Pearson correlation of 0.826 on its evaluation set after five "
    "epochs at a rate of 2e-5 (model card of joheras/stsb-all-MiniLM-L6-v2).",
}
"""Scores of others for encoders of this kind, by suite."""
OVER = {
    "items": "Where `seeds` is 1 they are over the test items alone, and leave out what another seed changes.",
    "": "Where `seeds` is 1 there is none.",
    "items and seeds": "Where there are several seeds they are over items and seeds.",
    "seeds": "Where there are several seeds they are Student's t over the seeds, for this score is no mean over items.",
}
"""Sentence on intervals, by the source of the estimates; the empty one has no interval."""
STEPS = "-steps"
"""Behind the name of a suite: the folder of its calibration."""


SUITES = (
    Suite(
        name="seeds-decoder",
        title="Methods of the literature on a small decoder",
        task="The quickstart's Llama of 1.4 million weights learns word problems in 250 steps. A LoRA of rank 2 has "
        "34,816 entries, and every method trains as many where it lets one choose.",
    ),
    Suite(
        name="salience",
        title="Saliences of static masks",
        task="On the same model and task every mask trains 69,632 entries of the linear layers, as many as a LoRA of "
        "rank 4 has. SPEFT (arXiv 2412.13488) found the plain gradient as good as any salience, better than a mask "
        "that is refreshed, and better than LoRA.",
    ),
    *(
        Suite(
            name=f"seeds-{task}",
            title=f"Methods of the literature on {name}",
            task=f"MiniLM-L6, an encoder of 22.7 million weights, learns {name} of GLUE in three epochs, with the head "
            "whole in every method. Beside it a LoRA of rank 2 has 82,944 entries, and every method trains as many "
            "where it lets one choose.",
        )
        for task, name in {"mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B", "cola": "CoLA"}.items()
    ),
)


def file_of(suite: Suite) -> str:
    """Return the file of `seeds-decoder`: suites/seeds/decoder.yaml."""
    return f"suites/{suite.name.replace('-', '/', 1)}.yaml"


def calibration_of(suite: Suite) -> Calibration | None:
    """Return the calibration of the suite's steps, if it was packed."""
    folder = suite.results / f"{suite.name}{STEPS}"
    return read_calibration(folder) if folder.is_dir() else None


def section(suite: Suite) -> str:
    """Return heading, scores and how to read them; nothing before there are results."""
    if not suite.is_shown:
        return ""
    comparison = suite.comparison
    return "\n\n".join(
        [
            f"### {suite.title}",
            f"`gradselect compare {file_of(suite)}`. {suite.task}",
            scores_table(comparison, calibration_of(suite)),
            "\n".join(f"* {line}" for line in _notes(comparison, suite)),
        ]
    )


def scores_table(comparison: Comparison, calibration: Calibration | None) -> str:
    """One row a method, the lowest loss first: entries, scores, loss against LoRA's, bytes, time of a step."""
    found = measures(comparison)
    lesser = _lesser(comparison)
    headings = ["method", "seeds", "entries", *(title_of(scores.measure) for scores in found)]
    headings += [
        *(["less LoRA's"] if lesser else []),
        "state MB",
        "peak MB",
        *([] if calibration is None else ["step"]),
    ]

    def cells(method: Method) -> list[str]:
        state = [method.peak_bytes(f"state_on_{place}") for place in ("device", "host")]
        peak = method.peak_bytes()
        return [
            method.name,
            str(len(method.seeds)),
            f"{method.runs[0].content.train_info.num_trainable_params:,}",
            *(value_of(scores, method.name, interval=scores is found[0]) for scores in found),
            *([with_interval(lesser.get(method.name), scale=1, decimals=3)] if lesser else []),
            megabytes(sum(size or 0 for size in state), digits=2),
            "" if peak is None else megabytes(peak, digits=1),
            *([] if calibration is None else [_step(calibration, method.name)]),
        ]

    ordered = sorted(comparison.methods, key=lambda method: found[-1].order(method.name))
    return markdown_table(headings, map(cells, ordered))


def _timing(calibration: Calibration, suite: Suite) -> str:
    """Return how the steps were timed, and how far the rounds of a method lie apart."""
    rounds = sorted({own.num_rounds for own in calibration.methods.values() if own.num_rounds})
    spreads = sorted(own.spread for own in calibration.methods.values() if own.spread is not None)
    return (
        f"`step`: its time against LoRA's, the median of {rounds[0]} to {rounds[-1]} rounds, which take the methods in "
        f"turn, on {calibration.machine.get('threads')} threads of a CPU ({calibration.machine.get('processor')}), by "
        f"`gradselect compare {file_of(suite)} budget.time_of=LoRA --calibrate-only`. Rounds of one method lie apart "
        f"by {100 * spreads[len(spreads) // 2]:.0f} % of its median (the middle one of the methods), and by up to "
        f"{100 * spreads[-1]:.0f} %, so small differences say nothing. Steps of other kinds count by their share of "
        "a run."
    )


def _step(calibration: Calibration, name: str) -> str:
    own = calibration.methods.get(name)
    return "" if own is None or own.ratio is None else f"{own.ratio:.2f}"


def _lesser(comparison: Comparison) -> dict[str, Difference]:
    """Return how much lower the loss of each method is than LoRA's; empty without LoRA or a loss."""
    lora = next((method.name for method in comparison.methods if method.name in LORAS), None)
    last = measures(comparison)[-1]
    return {} if lora is None or last.measure.higher_is_better else {one.first: one for one in last.against(lora)}


def _about_entries(methods: Sequence[Method]) -> str:
    """Return what the column counts: result files name the blocks that trained, but not their sizes."""
    blocks = "; of methods of blocks all that moved in the run" if any(method.blocks for method in methods) else ""
    return f"`entries`: the most that train at a step, of masks that choose anew too{blocks}."


def _about_intervals(shown: Scores) -> str:
    """Return what the intervals of the first score are over, which are the only ones in the table."""
    sources = {"" if one.interval is None else one.source for one in shown.estimates.values()}
    return " ".join(["Intervals are of 95 %.", *(text for source, text in OVER.items() if source in sources)])


def _notes(comparison: Comparison, suite: Suite) -> Iterator[str]:
    yield "Each method is at its rate of the lowest held-out loss. The best first, by the last of the scores."
    if suite.name in PUBLISHED:
        yield PUBLISHED[suite.name]
    yield (
        f"{_about_entries(comparison.methods)} `state MB`: masters are not in it, moments are. `peak MB`: weights, "
        "gradients, masters and state, counted."
    )
    shown = measures(comparison)[0]
    if all(one.interval is None for one in shown.estimates.values()):
        yield "One seed, and this score has no interval of its own: what is told apart, it cannot say."
    else:
        yield _about_intervals(shown)
    if _lesser(comparison):
        yield "`less LoRA's`: paired difference of the loss; bold: more than chance after Holm's correction."
    if (calibration := calibration_of(suite)) is not None:
        yield _timing(calibration, suite)
    edges = [f"{method.name} ({method.edge})" for method in comparison.methods if method.edge]
    if edges:
        yield f"At the edge of its grid of rates, so a better one may lie beyond: {', '.join(edges)}."
