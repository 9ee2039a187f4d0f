"""Tables of the comparison `small-equal-time`: every method trains as long as full fine-tuning."""

from __future__ import annotations

from common import RESULTS, markdown_table, megabytes
from compared import comparison_of, cost_of_a_step, method_of, peak, scores_of, steps_of, with_interval

from gradselect.app.report.comparison import Comparison

FOLDER = RESULTS / "small-equal-time"
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


def all_methods() -> str:
    """All methods, each beside full fine-tuning."""
    comparison = comparison_of(FOLDER)
    differences = {
        scores.measure.name: {one.first: one for one in tested} for scores, _, tested in comparison.differences
    }
    solved, loss = (scores_of(comparison, name) for name in ("solved", "loss"))
    rows = [
        [
            *_cells(comparison, method.name),
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


def pairs() -> str:
    """Each mechanism against its twin that draws uniformly, against AdaGradSelect on layers, and against LoRA."""
    comparison = comparison_of(FOLDER)
    tables = [scores_of(comparison, name).differences(PAIRS) for name in ("solved", "loss")]
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
    """Four rows of it, for the README."""
    comparison = comparison_of(FOLDER)
    rows = [
        [
            *_cells(comparison, name, with_rate=False),
            f"{scores_of(comparison, 'loss').estimates[name].value:.3f}",
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


def _cells(comparison: Comparison, name: str, *, with_rate: bool = True) -> list[str]:
    """Return name, steps, time of a step, rate and solved problems of a method."""
    method = method_of(comparison, name)
    rate = [f"{method.lr:g}"] if with_rate else []
    solved = 100 * scores_of(comparison, "solved").estimates[name].value
    return [name, str(steps_of(method)), cost_of_a_step(method), *rate, f"{solved:.1f}"]
