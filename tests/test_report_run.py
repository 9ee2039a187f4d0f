"""The report of one training run: own runs, plain methods, unfinished and resumed ones, and folders of a Trainer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from test_integration_transformers import build as build_trainer
from test_report import Page, run
from train_fixtures import ADAGRADSELECT, CHAT_TEMPLATE, parse, quiet, write_model, write_sums

import gradselect as gs
from gradselect import UsageError
from gradselect.app.report import run_charts, write_run_report
from gradselect.app.report.read_run import read_training_run
from gradselect.app.results import RunRecord
from gradselect.app.train import train
from gradselect.core import BlockHistory, merge_orders, read_history
from gradselect.files import sealed, sha256
from gradselect.integrations.transformers import SelectionCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

STEPS = 6


def recipe(root: Path, name: str, method: dict, **settings):
    sections = {"validation": str(root / "val.jsonl")}
    options = {"output": str(root / name), "steps": STEPS, "evaluate_every": 2, "save_every": 2, **settings}
    return parse(root, method=method, data=sections, run=options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, its data, and finished runs of three methods."""
    root = tmp_path_factory.mktemp("runs")
    write_model(root / "model", chat_template=CHAT_TEMPLATE)
    write_sums(root / "sums.jsonl")
    write_sums(root / "val.jsonl", rows=4)
    for name, method in {
        "blocks": ADAGRADSELECT,
        "mask": {"name": "id3", "budget": 200},
        "full": {"name": "full"},
    }.items():
        train(recipe(root, name, method), console=quiet(), command=["gradselect", "train", f"{name}.yaml"])
    return root


@pytest.fixture
def unfinished(root, tmp_path) -> Path:
    """The run of blocks as it was when it lost power: two steps after its checkpoint."""
    folder = shutil.copytree(root / "blocks", tmp_path / "unfinished")
    values = json.loads((folder / "run.json").read_text())
    kept = {key: value for key, value in values.items() if key in RunRecord.model_fields} | {"status": "started"}
    (folder / "run.json").write_text(json.dumps(sealed(kept)))
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS}")
    return folder


def evaluation(folder: Path, *, model: Path) -> Path:
    """The files of an evaluation with a right and a wrong answer."""
    items = [
        {"index": 0, "question": "2+4?", "reference": "6", "prediction": "is <b>6</b>", "correct": True},
        {"index": 1, "question": "3+9?", "reference": "12", "prediction": "is 13", "correct": False},
    ]
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    result = {
        "task": "gsm8k",
        "num_items": 2,
        "accuracy": 0.5,
        "interval": [0.1, 0.9],
        "num_correct": 1,
        "num_truncated": 0,
        "seconds": 1.0,
        "data": {},
        "settings": {"model": str(model)},
        "versions": {},
        "items_sha256": sha256(folder / "items.jsonl"),
    }
    (folder / "result.json").write_text(json.dumps(sealed(result)))
    return folder


def test_a_run_of_blocks_has_everything_on_one_page(root, tmp_path, capsys):
    shutil.copytree(root / "blocks", folder := tmp_path / "blocks")
    evaluation(tmp_path / "judged", model=folder)
    assert run(folder) == 0
    page = Page(folder / "report" / "report.html")
    history = read_training_run(folder).blocks
    assert history is not None
    for text in (
        "Training run: blocks",
        "method adagradselect",
        f"Finished: {STEPS:,} of {STEPS:,} steps.",
        "blocks on average",
        f"{sum(history.explored)} of {STEPS} steps explored",
        "tokens/s",
        "Updates by block",
        "explore_steps",
        "gsm8k: accuracy 50.0 %",
        "is <b>6</b>",
        "Validation losses",
        "gradselect train blocks.yaml",
        "epsilon_end",
    ):
        assert text in page.text, text
    titles = {"blocks", "loss", "grad-norm", "learning-rate", "state-bytes", "moved-bytes"}
    assert {path.stem for path in (folder / "report").glob("*.png")} == titles
    assert len(page.pictures) == len(titles)
    assert all(str(picture["src"]).startswith("data:image/png") for picture in page.pictures)
    assert not page.tags & {"script", "link", "iframe"}
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-1] == f"page       {folder}/report/report.html  pictures {len(titles)}"
    assert any(line.startswith("answers    gsm8k: accuracy 50.0 %") for line in lines)


def test_the_selection_on_the_page_is_that_of_the_records(root):
    found = read_training_run(root / "blocks")
    history = found.blocks
    assert history is not None
    recorded = [json.loads(line) for line in (root / "blocks" / "records.jsonl").read_text().splitlines()]
    assert history.selected == [tuple(record["selected"]) for record in recorded]
    selection = json.loads((root / "blocks" / "run.json").read_text())["selection"]
    assert list(history.blocks) == selection["blocks"]
    assert list(history.updates.values()) == selection["updates"]
    assert [step for step, _ in found.losses] == list(range(1, STEPS + 1))
    assert [step for step, _ in found.validation["validation"]] == [2, 4, 6]


def test_without_its_records_the_picture_comes_from_run_json(root, tmp_path):
    folder = shutil.copytree(root / "blocks", tmp_path / "blocks")
    with_records = read_training_run(folder).blocks
    (folder / "records.jsonl").unlink()
    without = read_training_run(folder).blocks
    assert with_records is not None
    assert without is not None
    assert (without.selected, without.explored) == (with_records.selected, with_records.explored)


def test_a_mask_shows_entries_over_the_steps(root, tmp_path):
    summary = write_run_report(root / "mask", output=tmp_path / "out")
    page = Page(summary.page)
    assert "200 of 14,512 (1.38 %) entries train at the last step" in page.text
    assert "Entries by tensor at the last step" in page.text
    assert "model.embed_tokens.weight" in page.text
    assert (tmp_path / "out" / "entries.png").is_file()


def test_a_plain_method_has_losses_and_costs_but_no_selection(root, tmp_path):
    page = Page(write_run_report(root / "full", output=tmp_path / "out").page)
    assert "Time of a step" in page.text
    assert "Selected" not in page.text
    assert "no selection records" not in page.text


def test_a_trainer_of_preferences_is_named(root, tmp_path):
    folder = shutil.copytree(root / "full", tmp_path / "run")
    values = json.loads((folder / "run.json").read_text())
    values["recipe"]["trainer"] = {"name": "dpo", "beta": 0.1, "precompute_reference": False}
    values["history"] = [{"step": step, "loss": 0.7, "rewards/margins": -0.1 * step, "reward": 0.25} for step in (1, 2)]
    (folder / "run.json").write_text(json.dumps(sealed(values)))
    report = write_run_report(folder)
    assert "trainer    dpo  beta 0.1" in report.lines
    assert "reward     Reward 0.250 at step 1, 0.250 at step 2." in report.lines
    assert {"reward.png", "rewards-margins.png"} <= {picture.name for picture in report.pictures}
    assert "trainer dpo" in Page(report.page).text
    plain = write_run_report(root / "full", output=tmp_path / "out")
    assert not any(line.startswith("trainer") for line in plain.lines)


def test_an_unfinished_run_says_how_far_its_files_go(unfinished, tmp_path):
    summary = write_run_report(unfinished)
    page = Page(summary.page)
    assert f"Not finished: {STEPS} of {STEPS} steps" in page.text
    assert f"Losses up to the newest checkpoint, step 4; selection up to step {STEPS}" in page.text
    assert "The run has not finished: times, bytes and the last losses are written at its end." in page.text
    assert [step for step, _ in read_training_run(unfinished).losses] == [1, 2, 3, 4]
    found = read_training_run(unfinished).blocks
    assert found is not None
    assert found.blocks[0] == "embedding"
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "records.jsonl").unlink()
    assert "No checkpoint yet, so losses are unknown." in Page(write_run_report(unfinished).page).text


def test_a_resumed_run_says_where_and_of_which_part_its_times_are(root, unfinished):
    train(recipe(root, "unfinished", ADAGRADSELECT, output=str(unfinished)), resume=True, console=quiet())
    text = Page(write_run_report(unfinished).page).text
    assert f"Finished: {STEPS} of {STEPS} steps, resumed from step-4." in text
    assert "in the last session" in text
    assert "Of the last session, after the resume." in text
    history = read_training_run(unfinished).blocks
    assert history is not None
    assert history.steps == list(range(STEPS))


def test_a_folder_of_a_trainer(tmp_path):
    jsonl = tmp_path / "selection.jsonl"
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build_trainer(
        tmp_path, gs.Uniform(fraction=0.4, seed=0), callbacks=[SelectionCallback(jsonl=jsonl)], **settings
    )
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        summary = write_run_report(folder, output=tmp_path / "out")
        text = Page(summary.page).text
        assert "method Uniform" in text
        assert "fraction 0.4" in " ".join(summary.lines)
        assert "Finished: 4 of 4 steps." in text
        assert "Validation loss" in text
        assert {path.stem for path in summary.pictures} >= {"blocks", "loss", "state-bytes"}
    jsonl.rename(tmp_path / "elsewhere")
    assert "name their file: --records FILE" in Page(write_run_report(tmp_path).page).text
    named = write_run_report(tmp_path, records=tmp_path / "elsewhere", output=tmp_path / "out")
    assert "blocks" in {path.stem for path in named.pictures}
    for name in ("one.jsonl", "two.jsonl"):
        shutil.copy(tmp_path / "elsewhere", tmp_path / name)
    with pytest.raises(UsageError, match=r"one\.jsonl, two\.jsonl\); choose one: --records FILE"):
        write_run_report(tmp_path)


def test_records_alone_give_their_picture(root, tmp_path, capsys):
    shutil.copy(root / "blocks" / "records.jsonl", tmp_path / "selection.jsonl")
    assert run(tmp_path / "selection.jsonl", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert f"{STEPS} steps are recorded." in out
    assert (tmp_path / "out" / "blocks.png").is_file()
    folder = tmp_path / "trainer"
    folder.mkdir()
    shutil.copy(tmp_path / "selection.jsonl", folder)
    assert "or by trainer.save_state()" in Page(write_run_report(folder).page).text


def test_a_line_that_is_no_record_is_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "2+2?"}\n')
    assert run(tmp_path / "rows.jsonl") == 2
    assert "rows.jsonl, line 1: no selection record" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_not_called_damaged(root, capsys):
    assert run(root / "model") == 2
    message = capsys.readouterr().err
    assert "damaged" not in message
    assert "no run and no results in" in message
    assert "config.json" in message
    assert "trainer_state.json" in message
    assert not (root / "model" / "report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--include-dirty"], "is for the results of a suite"),
        (["--records", "nowhere.jsonl"], "records='nowhere.jsonl': no such file"),
        (["--evaluation", "nowhere"], "nowhere/result.json"),
    ],
)
def test_options_that_do_not_fit(root, capsys, words, message):
    assert run(root / "full", *words) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_evaluation_is_left_out_aloud(root, tmp_path):
    folder = shutil.copytree(root / "full", tmp_path / "full")
    damaged = evaluation(folder / "judged", model=folder) / "items.jsonl"
    damaged.write_text(damaged.read_text().replace("13", "12"))
    text = Page(write_run_report(folder).page).text
    assert "Evaluation left out:" in text
    assert "gsm8k" not in text


def test_the_same_run_gives_the_same_bytes(root, tmp_path):
    first, second = (write_run_report(root / "blocks", output=tmp_path / name) for name in ("one", "two"))
    for one, other in zip((first.page, *first.pictures), (second.page, *second.pictures), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_thousands_of_steps_of_hundreds_of_blocks(tmp_path):
    generator, names = random.Random(0), [f"layer.{place}" for place in range(300)]
    with (tmp_path / "selection.jsonl").open("w") as file:
        for step in range(3000):
            selected = sorted(generator.sample(range(300), 30))
            record = {"step": step, "selected": [names[place] for place in selected], "explored": step < 100}
            file.write(json.dumps({**record, "state_bytes": 10**9 + step, "moved_bytes": step}) + "\n")
    summary = write_run_report(tmp_path / "selection.jsonl", output=tmp_path / "out")
    assert "3,000 steps are recorded." in " ".join(summary.lines)
    assert summary.page.stat().st_size < 2_000_000
    history = read_history(tmp_path / "selection.jsonl")
    assert isinstance(history, BlockHistory)
    assert list(history.blocks) == names


def test_an_unfinished_last_line_is_not_read_and_steps_that_ran_again_count_once(tmp_path):
    lines = [{"step": step, "selected": [name], "explored": False} for step, name in [(0, "a"), (1, "a"), (1, "b")]]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "sel'
    (tmp_path / "records.jsonl").write_text(text)
    history = read_history(tmp_path / "records.jsonl")
    assert isinstance(history, BlockHistory)
    assert history.selected == [("a",), ("b",)]


def test_orders_of_different_models_are_merged_too():
    assert merge_orders([("b", "a"), ("a", "b")]) == ("a", "b")
    assert merge_orders([("layer.1",), ("layer.0",), ("head",), ("embedding",)]) == (
        "embedding",
        "layer.0",
        "layer.1",
        "head",
    )


def test_a_curve_below_zero_is_not_cut_off(monkeypatch):
    limits = []
    monkeypatch.setattr(run_charts, "to_png", lambda figure: limits.append(figure.axes[0].get_ylim()) or b"")
    curves = ([-2.0, -1.0], [-1.0, 3.0], [1.0, 3.0], [0.0, 0.0])
    for y in curves:
        run_charts._one_line("Margin", [1, 2], y, name="margin")
    for (low, high), y in zip(limits, curves, strict=True):
        assert low <= min(y) <= max(y) <= high
        assert low <= 0 <= high
