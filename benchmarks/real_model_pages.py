"""Rates that were found, and answers to chat prompts, of the suites on a real model: for docs/real-model.md."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from common import markdown_table
from real_model import FULL, LORA_WITH_EMBEDDING, SMALL_LORA, SUITES, Suite, variants

from gradselect.app.report import number_format as words
from gradselect.app.report.comparison import Comparison
from gradselect.app.report.methods import Method
from gradselect.app.report.sample_section import answers_of, cut
from gradselect.app.report.score_tables import EDGES
from gradselect.app.results import Rung, SampledAnswer, SampleFile, reversals, rungs_of

LONGEST = 400
"""Characters of an answer that the page shows."""

EVERY = 3
"""Every third prompt is shown, from the first on: no answer decided which."""


# Rates ----------------------------------------------------------------------------------------------------


def rates(suites: Sequence[Suite] = SUITES) -> str:
    """Return the search of each method's rate in each suite that has results; nothing before there are any."""
    shown = [suite for suite in suites if suite.is_shown]
    if not shown:
        return ""
    text = (
        "## Rates found\n\nHeld-out loss of each rate, with the first seed: after a short run of the search, and after "
        "the arrow of a run of all steps, for the rates that went on. Bold: the rate that the tables are made with. "
        "`edge`: a better rate may lie beyond the grid. `another order`: rates that the short runs had put in another "
        "order than the whole ones; a rate that was dropped cannot show it."
    )
    return "\n\n".join([text, *(f"`{suite.name}`:\n\n{rates_table(suite.comparison)}" for suite in shown)])


def rates_table(comparison: Comparison) -> str:
    runs = (*comparison.results.runs, *comparison.results.failed)
    methods = {method.name: method for method in comparison.methods}
    searched = list(dict.fromkeys([*methods, *sorted({run.record.method for run in runs})]))
    rows = []
    for name in searched:
        if rungs := rungs_of(runs, name):
            method = methods.get(name)
            best = method.lr if method else None
            edge = EDGES.get(method.edge or "", "") if method else "no score yet"
            rows.append([name, _grid(rungs, best), edge, _reversals(rungs)])
    return markdown_table(["method", "rate: held-out loss", "edge", "another order"], rows)


def _grid(rungs: Sequence[Rung], best: float | None) -> str:
    cells = []
    for lr in sorted({lr for rung in rungs for lr in rung.losses}):
        losses = [rung.losses[lr] for rung in rungs if lr in rung.losses]
        text = " → ".join("failed" if loss is None else f"{loss:.3f}" for loss in losses)
        cell = f"{words.rate(lr)}: {text}"
        cells.append(f"**{cell}**" if lr == best else cell)
    return ", ".join(cells)


def _reversals(rungs: Sequence[Rung]) -> str:
    return ", ".join(
        f"{words.rate(pair.ahead)} ahead of {words.rate(pair.behind)} at {100 * pair.share:.0f} %"
        for pair in reversals(rungs)
    )


# Answers ----------------------------------------------------------------------------------------------------


def answers(suites: Sequence[Suite] = SUITES) -> str:
    """Return answers before and after the training, of the first suite that has some; nothing before there are any."""
    for suite in (suite for suite in suites if suite.is_shown):
        comparison = suite.comparison
        base, files = comparison.results.samples.base, answers_of(comparison)
        names = [name for name in _shown(comparison) if name in files and base and files[name].asked == base.asked]
        if base is None or not names:
            continue
        others = [other.name for other in suites if other.is_shown and other.comparison.results.samples.base]
        text = (
            f"## Answers before and after\n\nGreedy answers in the chat template to every third prompt of "
            f"`suites/chat-prompts.jsonl`, with at most {base.max_new_tokens} tokens; of each method the model of the "
            f"first seed, in `{suite.name}`. Texts of more than {LONGEST} characters are cut here. All prompts and "
            f"methods are in the report of each suite ({', '.join(f'`{name}`' for name in others)})."
        )
        chosen = {"base model": base, **{name: files[name] for name in names}}
        return "\n\n".join([text, *(_prompt(chosen, place) for place in range(0, len(base.answers), EVERY))])
    return ""


def _shown(comparison: Comparison) -> list[str]:
    """Return full fine-tuning, the best variant of AdaGradSelect that has answers, and LoRA."""
    known = answers_of(comparison)
    ours: list[Method] = [method for method in variants(comparison) if method.name in known]
    lora = SMALL_LORA if SMALL_LORA in known else LORA_WITH_EMBEDDING
    return [FULL, *(method.name for method in ours[:1]), lora]


def _prompt(files: dict[str, SampleFile], place: int) -> str:
    prompt = next(iter(files.values())).answers[place].prompt
    rows = [[name, _answer(file.answers[place])] for name, file in files.items()]
    return f"> {in_a_cell(prompt)}\n\n{markdown_table(['', 'answer'], rows)}"


def _answer(answer: SampledAnswer) -> str:
    text = in_a_cell(cut(answer.answer, most=LONGEST)) or "(empty)"
    return text if answer.finished else f"{text} [not finished]"


def in_a_cell(text: str) -> str:
    """Return a text of a model as plain text in one cell of a Markdown table; brackets as entities: no link."""
    plain = html.escape(re.sub(r"\s*\n\s*", "\n", text.strip()), quote=False)
    escaped = re.sub(r"([\\`*_|#~$])", r"\\\1", plain).replace("[", "&#91;").replace("]", "&#93;")
    return escaped.replace("\n", "<br>")
