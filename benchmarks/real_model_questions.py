"""Questions to a suite on a real model: is AdaGradSelect ahead, of what, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from common import markdown_table, megabytes
from compared import method_of, peak, with_interval
from real_model import (
    FULL,
    LORA_WITH_EMBEDDING,
    ONCE,
    SMALL_LORA,
    WIDE_LORA,
    Suite,
    decimals_of,
    held_out_losses,
    holding_no_more,
    measures,
    seeds_text,
    title_of,
    twin_of,
    variants,
)

from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.scores import Difference, Measure

AGAINST = (FULL, WIDE_LORA, LORA_WITH_EMBEDDING, SMALL_LORA, ONCE, "last 6")


def questions(suite: Suite) -> str:
    """Compare the best variant of AdaGradSelect with what it is asked to beat, and each variant with its twin."""
    comparison = suite.comparison
    ours = variants(comparison)
    if not ours:
        return ""
    best, known = ours[0].name, {method.name for method in comparison.methods}
    asked = (*AGAINST, twin_of(best))
    pairs = [(best, other) for other in asked if other in known]
    small, no_small = _in_the_same_bytes(comparison, ours)
    pairs += [small] if small is not None and small not in pairs else []
    lines = [*_thresholds(suite, pairs), *no_small]
    if missing := [name for name in asked if name not in known]:
        lines.append(f"Not in these results: {', '.join(missing)}.")
    others = [(one.name, twin_of(one.name)) for one in ours if twin_of(one.name) in known and one.name != best]
    parts = [
        _questions_text(ours, seeds=_shared_seeds(comparison, [*pairs, *others])),
        pairs_table(comparison, pairs),
        "\n".join(f"* {line}" for line in lines),
    ]
    if others:
        parts += ["The other variants against their uniform twins:", pairs_table(comparison, others)]
    return "\n\n".join(part for part in parts if part)


def pairs_table(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> str:
    """One row a pair: paired differences by every measure in words too, and how many bytes the first holds."""
    found = measures(comparison)
    tested = [{(one.first, one.second): one for one in scores.differences(pairs)} for scores in found]
    rows = [
        [
            *pair,
            str(len(_seeds(comparison, pair))),
            *(
                with_interval(
                    differences.get(pair),
                    scale=scores.measure.scale,
                    decimals=decimals_of(scores.measure),
                    verdict=verdict(differences.get(pair), scores.measure),
                )
                for scores, differences in zip(found, tested, strict=True)
            ),
            f"{peak(comparison, pair[0]) / peak(comparison, pair[1]):.2f}",
        ]
        for pair in pairs
    ]
    titles = [title_of(scores.measure) for scores in found]
    return markdown_table(["method", "against", "seeds", *titles, "its bytes / the other's"], rows)


def verdict(difference: Difference | None, measure: Measure) -> str:
    """Say in words who is ahead."""
    if difference is None or not difference.is_significant:
        return "not told apart"
    return "ahead" if (difference.value > 0) == measure.higher_is_better else "behind"


def _questions_text(ours: Sequence[Method], *, seeds: Iterable[int]) -> str:
    best = ours[0]
    held_out = held_out_losses(ours)[best.name]
    loss = "" if held_out is None else f" ({held_out:.3f}, over the seeds that all of them have)"
    which = (
        f"Of {len(ours)} variants of AdaGradSelect, **{best.name}** has the lowest held-out loss{loss}; no test item "
        "chose it."
        if len(ours) > 1
        else f"The only variant of AdaGradSelect with a score is **{best.name}**."
    )
    return (
        f"{which} Paired differences, method minus the other, with intervals of 95 %. {seeds_text(seeds)} Bold, and "
        "ahead or behind: more than chance after Holm's correction for the rows of this table. A table of more rows "
        "corrects for more, as that of all pairs in `gradselect report`: the same difference may not be certain there."
    )


def _thresholds(suite: Suite, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Say for the first measure if the difference reaches what was asked."""
    scores = measures(suite.comparison)[0]
    for first, second in pairs:
        points = suite.ahead_by.get(second)
        found = scores.differences([(first, second)]) if points is not None else []
        if points is None or not found:
            continue
        low, high = (scores.measure.scale * limit for limit in found[0].interval)
        what = f"{points:g} points ahead of" if points > 0 else f"At most {-points:g} points behind"
        answer = "yes" if low > points else "no" if high < points else "not told apart from that"
        yield f"{what} {second} in `{scores.measure.name}`: {answer} (interval {low:.1f} to {high:.1f})."


def _in_the_same_bytes(
    comparison: Comparison, ours: Sequence[Method]
) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """Return the best variant that holds no more than LoRA with the embedding, or a line that says that none does."""
    if all(method.name != LORA_WITH_EMBEDDING for method in comparison.methods):
        return None, ()
    most = peak(comparison, LORA_WITH_EMBEDDING)
    if fitting := holding_no_more(comparison, ours, LORA_WITH_EMBEDDING):
        return (fitting[0].name, LORA_WITH_EMBEDDING), ()
    least = min(ours, key=lambda method: peak(comparison, method.name))
    held = megabytes(peak(comparison, least.name), digits=0)
    return None, (
        f"No variant of AdaGradSelect here holds as little as {LORA_WITH_EMBEDDING} ({megabytes(most, digits=0)} MB): "
        f"{least.name} holds least, {held} MB.",
    )


def _seeds(comparison: Comparison, pair: tuple[str, str]) -> set[int]:
    first, second = (set(method_of(comparison, name).seeds) for name in pair)
    return first & second


def _shared_seeds(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> list[int]:
    return [len(_seeds(comparison, pair)) for pair in pairs]
