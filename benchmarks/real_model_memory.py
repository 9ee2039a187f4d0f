"""Best method within a limit of bytes, from the results of a suite at equal time."""

from __future__ import annotations

from collections.abc import Sequence

from common import markdown_table, megabytes
from compared import peak, with_interval
from real_model import held_out_losses, measures, title_of, value_of
from real_model_questions import verdict

from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.usage import read_size

LIMITS = ("0.6GB", "0.81GB", "1.2GB")
"""LoRA r=16 with the embedding holds 0.8002 GB of SmolLM2-135M, so the second limit is a hundredth above 0.8."""

ADAPTERS = {"lora", "rslora", "dora"}


def limits(comparison: Comparison) -> str:
    """Return the table of limits with how to read it; nothing if no limit has methods to choose from."""
    if not (table := limits_table(comparison)):
        return ""
    return (
        "For each limit of memory: the method of the lowest held-out loss among those whose weights, gradients, "
        "masters and state fit it, over the seeds that they share. Ahead or behind: more than chance, after Holm's "
        f"correction for its differences to all other methods.\n\n{table}"
    )


def limits_table(comparison: Comparison, limits: Sequence[str] = LIMITS) -> str:
    """One row a limit: the method of the lowest held-out loss that holds no more, against the best adapter that fits.

    A limit that fewer than two methods meet has no row. No test item chooses.
    """
    found = measures(comparison)
    titles = [title_of(scores.measure) for scores in (found[0], found[-1])]
    rows = []
    for limit in limits:
        fitting = [method for method in comparison.methods if peak(comparison, method.name) <= read_size(limit)]
        if len(fitting) < 2:
            continue
        best = _best(fitting)
        adapters = [method for method in fitting if _is_adapter(method)]
        other = _best(adapters) if adapters else best
        # To all others, for the correction: a pair must not have another verdict here than in the table of pairs.
        others = [method.name for method in comparison.methods if method is not best]
        differences = found[-1].differences([(best.name, name) for name in others])
        difference = next((one for one in differences if one.second == other.name), None)
        against = with_interval(difference, scale=1, decimals=3, verdict=verdict(difference, found[-1].measure))
        rows.append(
            [
                limit.replace("GB", " GB"),
                str(len(fitting)),
                best.name,
                megabytes(peak(comparison, best.name), digits=0),
                *(value_of(scores, best.name, interval=scores is found[0]) for scores in (found[0], found[-1])),
                other.name if other is not best else "",
                against,
            ]
        )
    headings = ["at most", "methods", "lowest held-out loss", "peak MB", *titles, "best LoRA there", "loss less its"]
    return markdown_table(headings, rows) if rows else ""


def _best(methods: Sequence[Method]) -> Method:
    losses = held_out_losses(methods)
    return min(methods, key=lambda method: (losses[method.name] is None, losses[method.name], method.name))


def _is_adapter(method: Method) -> bool:
    return method.runs[0].record.method_settings.get("name") in ADAPTERS
