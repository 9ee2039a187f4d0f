"""Answers of the base model and of each method to a few prompts: who is asked, what is kept, what the report shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_fixtures import BLOCKS, FULL, Runner, make_suite, suite_values, write_place
from report_fixtures import write_all
from train_fixtures import CHAT_TEMPLATE, write_model

from gradselect import UsageError
from gradselect.app.compare import sampling
from gradselect.app.compare.samples import MOST_PROMPTS, Samples, check_samples, read_prompts
from gradselect.app.compare.suite import parse_suite
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.read_results import read_results
from gradselect.app.report.sample_section import MOST_CHARACTERS, cut, sample_parts
from gradselect.app.report.table import Namer
from gradselect.app.results import SampledAnswer, SampleFile, read_sample_file, read_samples, write_samples

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

FILES = ["base.json", "full.lr-0.01.seed-0.json", "uniform-2.lr-0.01.seed-0.json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and two prompts."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    write_model(folder / "model", chat_template=CHAT_TEMPLATE)
    (folder / "prompts.txt").write_text("1+1?\n\nWho are you?\n", "utf-8")
    return folder


def samples_suite(place: Path, **samples: Any) -> Any:
    return make_suite(
        place,
        samples={"prompts": str(place / "prompts.txt"), "chat": True, "max_new_tokens": 5, **samples},
        evaluations={},
        forgetting=None,
        seeds=2,
        methods={"full": {**FULL, "rates": [1e-2]}, "uniform 2": BLOCKS},
    )


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A whole comparison, and the models that were asked."""
    folder, asked = tmp_path_factory.mktemp("finished") / "results", []
    answer = sampling.answer

    def count(samples: Samples, prompts: tuple[str, ...], *, model: Path, **options: Any) -> Any:
        asked.append(model.name)
        return answer(samples, prompts, model=model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "answer", count)
        Runner(patch)(samples_suite(place), folder)
    return folder, asked


def test_the_base_is_asked_once_and_seed_0_of_every_method(place: Path, finished: tuple[Path, list[str]]) -> None:
    folder, asked = finished
    assert asked == ["model", "full.lr-0.01.seed-0", "uniform-2.lr-0.01.seed-0"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == FILES
    base, full, uniform = (read_sample_file(folder / "samples" / name) for name in FILES)
    assert [each.prompt for each in base.answers] == ["1+1?", "Who are you?"]
    assert base.asked == full.asked == uniform.asked
    assert (base.method, full.method, full.lr, full.seed) == (None, "full", 0.01, 0)
    assert not base.answers[0].finished
    # The prompts reach the model inside its template.
    plain = samples_suite(place, chat=False).samples
    answers = sampling.answer(plain, read_prompts(plain), model=place / "model", dtype="float32", device="cpu")
    assert [each.answer for each in answers] != [each.answer for each in base.answers]


def test_the_report_shows_the_answers_of_all(finished: tuple[Path, list[str]]) -> None:
    about, first, _ = sample_parts(compare_results(read_results(finished[0], include_dirty=False)), Namer({}))
    assert "at most 5 tokens" in about.text
    assert "a user's message in the chat template" in about.text
    assert first.table is not None
    rows = {row[0].text: row[1] for row in first.table.rows}
    assert set(rows) == {"Prompt", "base model", "full", "uniform 2"}
    assert rows["Prompt"].text == "1+1?"
    assert rows["base model"].detail == "stopped after 5 tokens"


def test_a_method_that_was_scored_without_these_samples_is_named(
    place: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, copy = Runner(monkeypatch), tmp_path / "results"
    copy.mkdir()
    for file in finished[0].glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "samples").mkdir()
    (copy / "samples" / FILES[1]).write_bytes((finished[0] / "samples" / FILES[1]).read_bytes())
    runner(samples_suite(place), copy)
    assert runner.ran == []
    assert "note       uniform 2 has no answers to samples.prompts: it was scored without them; delete " in runner.said
    assert "note       full" not in runner.said
    runner(samples_suite(place, max_new_tokens=6), copy, only=["full"])
    assert f"full has answers to other samples, in samples/{FILES[1]}; delete " in runner.said


def test_a_model_without_a_template_is_refused_before_anything_trains(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(monkeypatch)
    suite = samples_suite(place)
    plain = suite.recipe.model.model_copy(update={"path": str(write_model(tmp_path / "plain"))})
    suite = suite.model_copy(update={"recipe": suite.recipe.model_copy(update={"model": plain})})
    with pytest.raises(UsageError, match=r"has no chat template; write samples\.chat=false"):
        runner(suite, tmp_path / "results")
    assert runner.ran == []
    assert suite.samples is not None
    check_samples(suite.samples.model_copy(update={"chat": False}), suite.recipe)
    with pytest.raises(UsageError, match="max_new_tokens=64 leaves no room for a prompt"):
        check_samples(suite.samples.model_copy(update={"chat": False, "max_new_tokens": 64}), suite.recipe)


def test_prompts_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb"}\n{"prompt": "c", "topic": "x"}\n', "utf-8")
    samples = Samples(prompts=str(path))
    assert read_prompts(samples) == ("a\nb", "c")
    path.write_text('{"prompt": "a"}\n{"question": "c"}\n', "utf-8")
    with pytest.raises(UsageError, match=r"prompts\.jsonl.*2.*no prompt; write"):
        read_prompts(samples)
    path.write_text('{"prompt": "a"}\n' * (MOST_PROMPTS + 1), "utf-8")
    with pytest.raises(UsageError, match="holds 51 prompts, and samples are for reading"):
        read_prompts(samples)
    with pytest.raises(UsageError, match="no such file"):
        read_prompts(Samples(prompts=str(tmp_path / "none.txt")))
    values = suite_values(tmp_path, samples={"prompts": "x.txt"})
    values["recipe"]["data"] = {"format": "classification", "path": "x.jsonl", "text": "t", "label": "l"}
    with pytest.raises(UsageError, match="classification no model writes answers; leave it out"):
        parse_suite({**values, "methods": {"a": BLOCKS}}, source="suite")


def sample_file(answers: list[str], **identity: Any) -> SampleFile:
    asked = [SampledAnswer(prompt=f"prompt {place}", answer=text, finished=True) for place, text in enumerate(answers)]
    return SampleFile(protocol="p", chat=False, max_new_tokens=60, answers=asked, **identity)


def test_long_and_empty_answers_and_those_to_other_prompts(tmp_path: Path) -> None:
    folder = write_all(tmp_path, "full", "LoRA r=64", "ID3 1 %", seeds=1)
    long = "x" * (MOST_CHARACTERS + 7)
    write_samples(folder / "samples" / "base.json", sample_file([long, ""]))
    write_samples(folder / "samples" / "full.json", sample_file(["a", "b"], method="full", lr=1e-3, seed=0))
    write_samples(folder / "samples" / "lora.json", sample_file(["a"], method="LoRA r=64", lr=1e-3, seed=0))
    (folder / "samples" / "half.json").write_text('{"format": 1', "utf-8")
    results = read_results(folder, include_dirty=False)
    assert [skipped.file for skipped in results.skipped] == ["samples/half.json"]
    about, first, second = sample_parts(compare_results(results), Namer({}))
    assert about.lines == (
        "No answers of ID3 1 %.",
        "Answers to other prompts than those of the base model, so not shown: LoRA r=64.",
    )
    assert first.table is not None
    assert second.table is not None
    assert first.table.rows[1][1].text == "x" * MOST_CHARACTERS + f" [cut here: {len(long)} characters in all]"
    assert [row[1].text for row in second.table.rows] == ["prompt 1", "(empty)", "b"]
    assert cut("  two\n lines ") == "two\n lines"
    assert read_samples(tmp_path / "none").base is None
