"""Results of suites on a real model: packed for the repository, and written into the pages as tables."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import METHODS, result, results_of, write, write_all

from gradselect.app.draft.rates import RATES
from gradselect.app.results import SampledAnswer, SampleFile, read_result, read_samples, write_samples
from gradselect.usage import UsageError, read_size

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

common = importlib.import_module("common")
compared = importlib.import_module("compared")
pack_results = importlib.import_module("pack_results")
memory = importlib.import_module("real_model_memory")
pages = importlib.import_module("real_model_pages")
picture = importlib.import_module("picture")
questions = importlib.import_module("real_model_questions")
real_model = importlib.import_module("real_model")
scores = importlib.import_module("real_model_scores")

BUDGET = {"text": "time_of: full", "unit": "seconds", "total": 24.0, "step_cost": 0.4, "spread": 0.02, "rounds": 5}
LORA = {
    "LoRA r=256": {"skill": 0.48, "speed": 0.5, "state": 1.5},
    "LoRA r=16": {"skill": 0.4, "speed": 0.9, "state": 0.4},
    "LoRA r=16 + E": {"skill": 0.6, "speed": 0.9, "state": 0.5},
}


def with_budget(values: dict[str, Any], *, steps: int, ratio: float) -> dict[str, Any]:
    values["gradselect"]["budget"] = {**BUDGET, "reference": "full", "steps": steps, "ratio": ratio}
    return values


def make_suite(
    folder: Path, *, name: str = "suite", without: tuple[str, ...] = (), seeds: int = 3, **settings: Any
) -> Any:
    """A suite with results of full fine-tuning, two variants of AdaGradSelect, a uniform twin and LoRA."""
    for method in ("full", "AdaGradSelect 20 %", "AdaGradSelect 10 %", "uniform 20 %"):
        if method not in without:
            for values in results_of(method, seeds=seeds):
                write(folder / name, with_budget(values, steps=70, ratio=round(1 / METHODS[method].get("speed", 1), 2)))
    for method in LORA.keys() - set(without):
        for seed in range(seeds):
            write(folder / name, with_budget(result(method, seed=seed, **LORA[method]), steps=60, ratio=1.1))
    return real_model.Suite(name=name, title="A model", task="It learns.", results=folder, **settings)


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """Rows of the first Markdown table, by their first cell."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])}


# Tables --------------------------------------------------------------------------------------------------------------


def test_a_suite_without_results_leaves_no_trace(tmp_path: Path):
    suite = real_model.Suite(name="smollm2", title="A model", task="It learns.", results=tmp_path)
    assert scores.section(suite) == pages.rates([suite]) == pages.answers([suite]) == ""
    write(tmp_path / "smollm2", result("full", role="rate"))
    assert scores.section(suite) == "", "a search is no result"


def test_every_section_has_its_place_in_a_page():
    readme = importlib.import_module("readme")
    for page, sections in readme.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert all(f"<!-- {name}: begin -->" in text for name in sections)
    assert {suite.name for suite in real_model.SUITES} <= readme.PAGES[readme.TABLES].keys()


def test_scores_costs_and_forgetting_stand_beside_full_fine_tuning(tmp_path: Path):
    suite = make_suite(tmp_path)
    table = rows_of(scores.scores_table(suite.comparison))
    assert table.keys() == {"full", "AdaGradSelect 20 %", "AdaGradSelect 10 %", "uniform 20 %", *LORA}
    ours, full = table["AdaGradSelect 20 %"], table["full"]
    assert (ours["seeds"], ours["steps"], ours["step"], full["step"]) == ("3", "70", "0.72", "1.00")
    (found,) = [one for one in suite.comparison.scores if one.measure.name == "test"]
    value, (low, high) = found.estimates["full"].value, found.estimates["full"].interval
    assert full["test %"] == f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert full["less full's"] == ""
    assert ours["less full's"].count(" to ") == 1
    assert full["forgetting"] == f"{0.1 + 0.1 * 0.62:+.3f}"
    assert full["peak MB"] == "17"
    losses = [float(row["stories loss"]) for row in table.values()]
    assert losses == sorted(losses)


def test_without_a_budget_there_is_no_cost_of_a_step(tmp_path: Path):
    values = result("full")
    values["run_info"]["train_config"]["run"] = {"steps": 36}
    write(tmp_path / "steps", values)
    comparison = real_model.Suite(name="steps", title="", task="", results=tmp_path).comparison
    (row,) = rows_of(scores.scores_table(comparison)).values()
    assert "step" not in row
    assert row["steps"] == "36"


def test_the_best_variant_is_chosen_by_its_held_out_loss_and_compared_in_words(tmp_path: Path):
    suite = make_suite(tmp_path, ahead_by={"full": -0.5, "LoRA r=256": 3.0}, without=("LoRA r=16",))
    text = questions.questions(suite)
    assert "Of 2 variants of AdaGradSelect, **AdaGradSelect 20 %** has the lowest held-out loss" in text
    lines = text.splitlines()
    against = {line.split(" | ")[1]: line for line in lines if line.startswith("| AdaGradSelect 20 % |")}
    assert against.keys() == {"full", "LoRA r=256", "LoRA r=16 + E", "uniform 20 %"}
    assert "not told apart" in against["full"]
    assert ", ahead**" in against["LoRA r=256"]
    assert "* 3 points ahead of LoRA r=256 in `test`: yes" in text
    assert "* At most 0.5 points behind full in `test`: not told apart from that" in text
    assert "* Not in these results: LoRA r=16, six by the first gradient, last 6." in text
    assert any(line.startswith("| AdaGradSelect 10 % | LoRA r=16 + E |") for line in lines), "in the same bytes"


def test_variants_are_compared_on_the_rows_that_all_of_them_held_out(tmp_path: Path):
    """Rows of a seed may be easier: a variant with more seeds is neither better nor worse for them."""
    for method, losses in (("more seeds", (0.39, 0.30, 0.31)), ("one seed", (0.38,)), ("failed", (float("nan"),))):
        for seed, loss in enumerate(losses):
            values = with_budget(result(method, seed=seed, settings={"name": "adagradselect"}), steps=60, ratio=1.0)
            values["gradselect"]["validation_loss"] = loss if loss == loss else None
            write(tmp_path / "suite", values)
    suite = real_model.Suite(name="suite", title="A model", task="It learns.", results=tmp_path)
    assert [method.name for method in real_model.variants(suite.comparison)] == ["one seed", "more seeds", "failed"]
    assert "**one seed** has the lowest held-out loss (0.380, over the seeds" in questions.questions(suite)


def test_worse_is_behind_by_every_kind_of_measure(tmp_path: Path):
    suite = make_suite(tmp_path, without=("AdaGradSelect 10 %",))
    for found in real_model.measures(suite.comparison):
        (worse,) = found.differences([("LoRA r=16", "full")])
        (better,) = found.differences([("full", "LoRA r=16")])
        assert questions.verdict(worse, found.measure) == "behind"
        assert questions.verdict(better, found.measure) == "ahead"
    assert questions.verdict(None, found.measure) == "not told apart"


def test_texts_are_scored_by_chrf_which_comes_before_losses(tmp_path: Path):
    for method, chrf in (("full", 60.0), ("adagradselect", 40.0)):
        values = with_budget(result(method, rates=()), steps=60, ratio=1.0)
        own = values["gradselect"]
        own["scores"] = {
            "loss": own["scores"]["stories"],
            "texts": {"metric": "mean_chrf", "value": chrf, "num_items": 90},
        }
        texts = [{"index": index, "score": chrf + index % 3 - 1} for index in range(90)]
        own["items"] = {"loss": own["items"]["stories"], "texts": texts}
        write(tmp_path / "e2e", values)
    suite = real_model.Suite(name="e2e", title="A model", task="It learns.", results=tmp_path)
    table = rows_of(scores.scores_table(suite.comparison))
    assert list(table["full"]) == [
        *("method", "seeds", "steps", "step", "texts chrF", "loss", "less full's", "forgetting", "peak MB"),
    ]
    assert table["full"]["texts chrF"].startswith("60.0 (59.")
    assert "| adagradselect | full | 1 | **-20.0 (-20.0 to -20.0), behind** |" in questions.questions(suite)


def test_a_table_of_one_seed_says_so(tmp_path: Path):
    suite = make_suite(tmp_path, seeds=1)
    assert "There is one seed: an interval is over the test items alone" in scores.section(suite)
    assert "There is one seed: an interval is over the test items alone" in questions.questions(suite)
    for seed in (1, 2):
        write(tmp_path / "suite", with_budget(result("full", seed=seed, **METHODS["full"]), steps=60, ratio=1.0))
    compared.comparison_of.cache_clear()
    assert "Where `seeds` is 1 an interval is over the test items alone" in scores.section(suite)
    assert "There is one seed" in questions.questions(suite), "the pairs share one"


def test_one_seed_of_a_uniform_twin_is_said_too(tmp_path: Path):
    suite = make_suite(tmp_path)
    assert "They are over items and seeds." in questions.questions(suite)
    write(tmp_path / "suite", with_budget(result("uniform 10 %"), steps=70, ratio=0.8))
    compared.comparison_of.cache_clear()
    text = questions.questions(suite)
    assert "| AdaGradSelect 10 % | uniform 10 % | 1 |" in text
    assert "Where `seeds` is 1 an interval is over the test items alone" in text


def test_what_is_missing_is_said(tmp_path: Path):
    suite = make_suite(tmp_path, without=("AdaGradSelect 20 %", "AdaGradSelect 10 %"))
    write(tmp_path / "suite", with_budget(result("DoRA", role="rate"), steps=60, ratio=1.1))
    broken = with_budget(result("GMT", role="score"), steps=60, ratio=1.1)
    broken["train_info"]["status"] = "failed"
    write(tmp_path / "suite", broken)
    text = scores.section(suite)
    assert "* No score yet, only a search of the rate: DoRA." in text
    assert "* Failed: GMT." in text
    assert "variants" not in text, "no question without a variant of AdaGradSelect"


def test_rates_show_the_grid_the_best_one_its_edge_and_what_short_runs_mistook(tmp_path: Path):
    for lr, share, loss in (
        (1e-4, 0.25, 2.0),
        (2e-4, 0.25, 1.5),
        (4e-4, 0.25, 1.6),
        (2e-4, 1.0, 1.2),
        (4e-4, 1.0, 1.1),
    ):
        values = result("full", lr=lr, role="rate", rates=(1e-4, 2e-4, 4e-4))
        values["gradselect"] |= {"share": share, "validation_loss": loss}
        write(tmp_path / "suite", values).rename(tmp_path / "suite" / f"full.{lr}.{share}.rate.json")
    write(tmp_path / "suite", result("full", lr=4e-4, rates=(1e-4, 2e-4, 4e-4)))
    suite = real_model.Suite(name="suite", title="A model", task="It learns.", results=tmp_path)
    row = rows_of(pages.rates([suite]))["full"]
    assert row["rate: held-out loss"] == "1e-4: 2.000, 2e-4: 1.500 → 1.200, **4e-4: 1.600 → 1.100**"
    assert (row["edge"], row["another order"]) == ("highest tried", "2e-4 ahead of 4e-4 at 25 %")


def sample(folder: Path, name: str, *, method: str | None, answer: str, prompts: int = 4) -> None:
    asked = [SampledAnswer(prompt=f"Prompt {place}", answer=answer, finished=False) for place in range(prompts)]
    lr, seed = (None, None) if method is None else (1e-3, 0)
    values = {"protocol": "a", "method": method, "lr": lr, "seed": seed, "chat": True, "max_new_tokens": 80}
    write_samples(folder / "samples" / name, SampleFile(**values, answers=asked))


def test_answers_stand_below_one_another_as_plain_text(tmp_path: Path):
    suite = make_suite(tmp_path)
    assert pages.answers([suite]) == ""
    sample(tmp_path / "suite", "base.json", method=None, answer="yes | no\n\n# <b>1</b> *a* [b](c)")
    for method in ("full", "AdaGradSelect 10 %", "LoRA r=16", "uniform 20 %"):
        sample(tmp_path / "suite", f"{method[:6]}.json", method=method, answer="word " * 200)
    compared.comparison_of.cache_clear()
    text = pages.answers([suite])
    assert [f"> Prompt {place}" in text for place in range(4)] == [True, False, False, True]
    assert r"| base model | yes \| no<br>\# &lt;b&gt;1&lt;/b&gt; \*a\* &#91;b&#93;(c) [not finished] |" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in lines[1:5]]
    assert shown == ["base model", "full", "AdaGradSelect 10 %", "LoRA r=16"], "the best variant that has answers"
    assert max(map(len, lines)) < pages.LONGEST + 100
    assert "999 characters in all" in text


def test_the_readme_shows_the_real_model_as_soon_as_it_has_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suite = make_suite(tmp_path)
    monkeypatch.setattr(scores, "SUITES", (real_model.Suite(name="none", title="", task="", results=tmp_path),))
    assert scores.headline() == ""
    monkeypatch.setattr(scores, "SUITES", (suite,))
    text = scores.headline()
    ours, loras = ["AdaGradSelect 20 %", "AdaGradSelect 10 %"], ["LoRA r=16", "LoRA r=16 + E", "LoRA r=256"]
    assert list(rows_of(text)) == ["full", *ours, *loras]
    assert "Of 2 variants of AdaGradSelect the one of the lowest held-out loss, and the one among those that" in text
    assert "3 seeds, with 95 % intervals:" in text
    mixed = make_suite(tmp_path, name="mixed")
    for seed in range(3, 5):
        write(tmp_path / "mixed", with_budget(result("LoRA r=256", seed=seed, **LORA["LoRA r=256"]), steps=60, ratio=1))
    monkeypatch.setattr(scores, "SUITES", (mixed,))
    assert "3 to 5 seeds, with 95 % intervals:" in scores.headline()
    alone = make_suite(tmp_path, name="alone", seeds=1)
    monkeypatch.setattr(scores, "SUITES", (alone,))
    assert "1 seed, with 95 % intervals over the test items alone:" in scores.headline()
    monkeypatch.setattr(scores, "SUITES", (alone, suite))
    assert scores.headline() == text, "several seeds before the first suite"


def test_the_picture_says_one_seed_and_needs_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    some, one = (make_suite(tmp_path, name=name, seeds=seeds) for name, seeds in (("some", 3), ("one", 1)))
    for suite, is_said in ((some, False), (one, True)):
        monkeypatch.setattr(picture, "subject", lambda suite=suite: picture.of_real_model(suite))
        assert ("over the test items alone where there is one seed" in picture.markdown(common.ROOT / "R")) == is_said
    monkeypatch.undo()
    without = make_suite(tmp_path, name="none", without=("AdaGradSelect 20 %", "AdaGradSelect 10 %"))
    monkeypatch.setattr(picture, "SUITES", (without,))
    assert picture.subject.__wrapped__() is picture.SMALL


def test_the_picture_tells_fixed_columns_from_those_that_gradients_select(tmp_path: Path):
    write(tmp_path, result("fixed slices 1/8", settings={"name": "paca", "parts": 8}))
    write(tmp_path, result("slices 1/8", settings={"name": "adagradselect", "parts": 8}))
    marks = {method.name: picture.mark_of(method) for method in compared.comparison_of(tmp_path).methods}
    assert {name: mark.is_hollow for name, mark in marks.items()} == {"fixed slices 1/8": True, "slices 1/8": False}


# Packing -------------------------------------------------------------------------------------------------------------


def run_pack(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_results.py", *map(str, arguments)])
    pack_results.main()


def test_packed_results_are_the_same_and_packing_again_changes_nothing(tmp_path: Path, monkeypatch, capsys):
    folder = write_all(tmp_path / "quick", "full", "uniform 20 %")
    dirty = copy.deepcopy(result("dirty"))
    dirty["gradselect"]["dirty"] = True
    write(folder, dirty)
    sample(folder, "base.json", method=None, answer="yes")
    sample(folder, "dirty.json", method="dirty", answer="no")
    (folder / "work").mkdir()
    (folder / "work" / "log.json").write_text("{")
    run_pack(monkeypatch, folder, "--out", tmp_path / "out")
    assert "13 files" in (said := capsys.readouterr().out)
    assert "1 left out: uncommitted changes" in said
    names = {path.relative_to(tmp_path / "out" / "quick").as_posix() for path in (tmp_path / "out").rglob("*.json.gz")}
    assert len(names) == 13
    assert "samples/base.json.gz" in names
    for name in names - {"samples/base.json.gz"}:
        path = tmp_path / "out" / "quick" / name
        assert read_result(path).content == read_result(folder / name.removesuffix(".gz")).content
    assert read_samples(tmp_path / "out" / "quick").base == read_samples(folder).base
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json.gz")}
    run_pack(monkeypatch, tmp_path / "out" / "quick", "--out", tmp_path / "again")
    run_pack(monkeypatch, folder, "--out", tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[1].endswith("0 of them new or changed; 1 left out: uncommitted changes")
    assert before == {path: path.read_bytes() for path in before}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / "quick").glob("*.gz")} == {
        path.name: data for path, data in before.items() if path.parent.name == "quick"
    }


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "x.json").write_text('{"gradselect": '), "half-written"),
        (lambda folder: write(folder, result(f"{Path.cwd()}/x")), "a folder of this machine"),
        (lambda folder: write(folder, result(f"file://{Path.cwd()}")), "a folder of this machine"),
    ],
    ids=["damaged", "path", "address"],
)
def test_what_may_not_be_committed_is_refused_and_nothing_is_written(
    tmp_path: Path, harm, message, monkeypatch, capsys
):
    folder = write_all(tmp_path / "quick", "full")
    harm(folder)
    with pytest.raises(SystemExit):
        run_pack(monkeypatch, folder, "--out", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_limit_and_files_of_other_runs_are_refused(tmp_path: Path, monkeypatch, capsys):
    folder = write_all(tmp_path / "quick", "full")
    with pytest.raises(SystemExit):
        run_pack(monkeypatch, folder, "--out", tmp_path / "out", "--limit", "1kB")
    assert "more than --limit 1kB; pack fewer methods" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run_pack(monkeypatch, folder, "--out", tmp_path / "out")
    gone = next(folder.glob("*.score.json"))
    gone.unlink()
    with pytest.raises(SystemExit):
        run_pack(monkeypatch, folder, "--out", tmp_path / "out")
    assert f"holds 1 files that are not to be packed: {gone.name}.gz" in capsys.readouterr().err
    run_pack(monkeypatch, folder, "--out", tmp_path / "out", "--replace")
    assert not (tmp_path / "out" / "quick" / f"{gone.name}.gz").exists()


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no results; give a folder such as runs/compare/smollm2"):
        pack_results.pack(tmp_path / "none", tmp_path / "out")


def test_the_committed_results_of_the_real_model_are_small():
    folders = [suite.folder for suite in real_model.SUITES]
    total = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert total <= read_size(pack_results.LIMIT)


def test_default_rates_are_half_of_the_best_ones_here():
    """The defaults follow the results: new ones with another best rate have to change them."""
    (suite,) = [suite for suite in real_model.SUITES if suite.name == "smollm2"]
    best = {method.name: method.runs[0].record.lr for method in suite.comparison.methods}
    assert RATES["full"] == best["full"] / 2
    assert RATES["blocks"] == best["AdaGradSelect 20 %"] / 2


def test_the_best_method_within_a_limit_is_chosen_by_held_out_loss(tmp_path: Path) -> None:
    comparison = make_suite(tmp_path).comparison
    held = {method.name: method.peak_bytes() for method in comparison.methods}
    least, *_, most = sorted(held.values())
    losses = real_model.held_out_losses(comparison.methods)
    table = rows_of(memory.limits_table(comparison, [f"{most:.0f}B", f"{most - 1:.0f}B", f"{least:.0f}B"]))
    assert table.keys() == {f"{most:.0f}B", f"{most - 1:.0f}B"}  # one method alone is no comparison
    for limit, row in table.items():
        fitting = [name for name, count in held.items() if count <= float(limit.removesuffix("B"))]
        assert row["methods"] == str(len(fitting))
        assert row["lowest held-out loss"] == min(fitting, key=losses.__getitem__)
        adapters = [name for name in fitting if name.startswith("LoRA")]
        assert row["best LoRA there"] in {min(adapters, key=losses.__getitem__), ""}


@pytest.mark.parametrize(
    "suite", [suite for suite in real_model.SUITES if suite.is_shown], ids=lambda suite: suite.name
)
def test_a_pair_has_one_verdict_in_all_tables(suite: Any) -> None:
    """The table of limits tested each pair by itself: it was ahead there, and not told apart among the pairs."""
    loss = real_model.measures(suite.comparison)[-1]
    for row in rows_of(memory.limits_table(suite.comparison)).values():
        best, other = row["lowest held-out loss"], row["best LoRA there"]
        if not other:
            continue
        pairs = [(best, method.name) for method in suite.comparison.methods if method.name != best]
        (pair,) = [one for one in loss.differences(pairs) if one.second == other]
        assert questions.verdict(pair, loss.measure) in row["loss less its"].strip("*").split(", ")[-1]
