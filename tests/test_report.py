"""The report: what stands in the page, what is left out aloud, and that the same results give the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fixtures import METHODS, block_selection, result, results_of, write, write_all

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.report import write_report
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.findings import findings
from gradselect.app.report.read_results import read_results
from gradselect.app.report.score_tables import results_table
from gradselect.app.report.sections import build_page
from gradselect.app.report.table import Namer
from gradselect.app.results import SampledAnswer, SampleFile, write_samples

FEW = ("full", "AdaGradSelect 20 %", "ID3 1 %")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Page(HTMLParser):
    """Tags, the attributes of pictures, and all text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(self.source)
        self.text = " ".join(self.text.replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Few methods, with everything that has to be left out beside them."""
    folder = write_all(tmp_path_factory.mktemp("results"), *FEW, seeds=2)
    (folder / "half.json").write_text('{"run_info": {"created', encoding="utf-8")
    failed = result("full", seed=7)
    failed["train_info"]["status"] = "failed"
    failed["run_info"]["error_msg"] = "the loss is nan at step <40>"
    failed["gradselect"] |= dict.fromkeys(("seconds", "bytes", "flop", "validation_loss", "selection"))
    write(folder, failed)
    dirty = result("full", seed=9)
    dirty["gradselect"]["dirty"] = True
    write(folder, dirty)
    for name, run in (("base", {}), ("full", {"method": "full", "lr": 1e-3, "seed": 0})):
        answer = SampledAnswer(prompt="Who are you?", answer=f"I am <{name}>.\nHello.", finished=True)
        content = SampleFile(protocol="p", chat=True, max_new_tokens=60, answers=[answer], **run)
        write_samples(folder / "samples" / f"{name}.json", content)
    return folder


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """The report, made in this process."""
    output = tmp_path_factory.mktemp("first")
    assert run(results, "--output", output) == 0
    return output


@pytest.fixture(scope="module")
def page(written):
    return Page(written / "report.html")


def make(results: Path, output: Path) -> Path:
    """Make the report in a process of its own, which hashes strings in another way."""
    code = "import sys; from gradselect.app.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "report", str(results), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, env={**ENVIRONMENT, "PYTHONHASHSEED": "random"})
    return output


def run(*words: object) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, words)])
    return int(stop.value.code or 0)


def comparison_of(folder: Path):
    return compare_results(read_results(folder, include_dirty=False))


def headline(folder: Path) -> dict[str, dict[str, str]]:
    """Text of the cells of the headline table by method and column."""
    comparison = comparison_of(folder)
    table = results_table(comparison.methods, scores=comparison.scores, full=comparison.full, name=Namer({}))
    titles = [column.title for column in table.columns]
    return {
        row[0].text: {
            title: f"{cell.text} {cell.detail}".strip().replace("\N{NO-BREAK SPACE}", " ")
            for title, cell in zip(titles, row, strict=True)
        }
        for row in table.rows
    }


def test_the_same_results_give_the_same_bytes_in_another_process(results, written, tmp_path):
    again = make(results, tmp_path / "again")
    files = sorted(path.name for path in written.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert "report.html" in files
    assert len(files) > 8
    for name in files:
        assert (written / name).read_bytes() == (again / name).read_bytes(), name


def test_answers_to_samples_stand_below_one_another(page):
    answers = "Prompt Who are you? base model I am <base>. Hello. full I am <full>. Hello."
    assert answers in page.text
    assert "No answers of AdaGradSelect 20 % and ID3 1 %." in page.text


def test_pictures_carry_neither_date_nor_version(written):
    for picture in written.glob("*.png"):
        assert b"tEXt" not in picture.read_bytes(), picture.name


def test_the_page_needs_nothing_from_outside(page):
    assert not {"script", "link", "iframe"} & page.tags
    for address in ('src="http', 'href="http', "url(", "@import"):
        assert address not in page.source
    assert page.pictures
    for picture in page.pictures:
        assert (picture["src"] or "").startswith("data:image/png;base64,")


def test_every_picture_says_its_content_in_words(page):
    for picture in page.pictures:
        assert len(picture["alt"] or "") > 60
    assert any("full: " in (picture["alt"] or "") for picture in page.pictures)


def test_the_page_names_what_was_left_out_and_why(page):
    assert "half.json" in page.text
    assert "damaged or half-written" in page.text
    assert "the loss is nan at step <40>" in page.text
    assert "<40>" not in page.source
    assert "1 run of a tree that differed from its commit" in page.text


def test_the_page_holds_versions_commands_rates_and_masks(page):
    for text in (
        "2.13.0",
        "gradselect compare suites/quick.yaml",
        "1e-3",
        "14,096",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert text in page.text, text


def test_the_headline_table_relates_speed_and_bytes_to_full(tmp_path):
    cells = headline(write_all(tmp_path, *FEW))
    assert cells["full"]["Speed-up"] == "1.00\N{MULTIPLICATION SIGN}"
    # 12 of 60 steps explore at 400 ms, the others take 400 / 1.38 ms.
    typical = (12 * 400 + 48 * 400 / 1.38) / 60
    ours = cells["AdaGradSelect 20 %"]
    assert ours["Step"] == f"{typical:.0f} ms"
    assert ours["Speed-up"] == f"{400 / typical:.2f}\N{MULTIPLICATION SIGN}"
    assert ours["FLOP limit"] == "1.43\N{MULTIPLICATION SIGN}"
    assert ours["Of the limit"] == f"{100 * 400 / typical / 1.43:.0f} %"
    assert ours["Average bytes"].endswith(f"{100 * 1.7 / 3:.0f} % of full")
    assert ours["Seeds"] == "3"
    assert cells["ID3 1 %"]["FLOP limit"] == "\N{EN DASH}"


def test_a_best_rate_at_the_edge_of_its_grid_is_marked(tmp_path):
    write(tmp_path, result("full"))
    write(tmp_path, result("high", lr=3e-3))
    write(tmp_path, result("low", lr=3e-4))
    write(tmp_path, result("single", rates=(1e-3,)))
    write(tmp_path, result("widened", lr=3e-3))
    write(tmp_path, result("widened", lr=1e-2, role="rate", rates=(1e-3, 3e-3, 1e-2)))
    cells = headline(tmp_path)
    assert cells["widened"]["Best rate"] == "3e-3"
    assert cells["full"]["Best rate"] == "1e-3"
    assert cells["high"]["Best rate"] == "3e-3 highest tried"
    assert cells["low"]["Best rate"] == "3e-4 lowest tried"
    assert cells["single"]["Best rate"] == "1e-3 only one tried"
    said = " ".join(findings(comparison_of(tmp_path)))
    assert "edge of the grid, so a better one may lie beyond it: high and low" in said


def test_runs_scored_at_a_worse_rate_are_left_out_and_counted(tmp_path):
    write_all(tmp_path, "full")
    write(tmp_path, result("full", lr=3e-3, skill=0.1, settings={"name": "full"}))
    comparison = comparison_of(tmp_path)
    assert [run.record.lr for run in comparison.methods[0].runs] == [1e-3] * 3
    assert [run.record.lr for run in comparison.others] == [3e-3]


def test_dirty_results_are_taken_in_when_asked(tmp_path):
    values = result("full", settings={"name": "full"})
    values["gradselect"]["dirty"] = True
    write(tmp_path, values)
    with pytest.raises(UsageError, match="--include-dirty"):
        read_results(tmp_path, include_dirty=False)
    taken = read_results(tmp_path, include_dirty=True)
    assert len(taken.runs) == 1
    assert not taken.dirty


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values.pop("gradselect"), "no part 'gradselect'"),
        (lambda values: values["gradselect"].update(format=2), "format 2"),
        (lambda values: values["gradselect"].update(lr="fast"), "gradselect.lr"),
        (lambda values: values["gradselect"].pop("seed"), "gradselect.seed"),
        (
            lambda values: values["gradselect"]["curves"]["train"]["loss"].pop(),
            "gradselect.curves.train: 60 steps",
        ),
        (lambda values: values["gradselect"]["selection"]["updates"].pop(), "10 blocks, 9 update counts"),
        (lambda values: values["gradselect"]["selection"]["selected"].append([10]), "explore marks"),
        (lambda values: values["gradselect"]["selection"]["selected"][0].append(10), "beyond the 10"),
    ],
)
def test_a_damaged_file_is_skipped_with_its_reason(tmp_path, change, reason):
    write(tmp_path, result("full"))
    values = result("other", selection=block_selection(steps=60, count=2, seed=0, explores=True))
    change(values)
    (tmp_path / "bad.json").write_text(json.dumps(values), encoding="utf-8")
    found = read_results(tmp_path, include_dirty=False)
    assert len(found.runs) == 1
    assert [skipped.file for skipped in found.skipped] == ["bad.json"]
    assert reason in found.skipped[0].reason


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"a": 1'])
def test_what_is_no_json_object_is_skipped(tmp_path, content):
    write(tmp_path, result("full"))
    (tmp_path / "bad.json").write_bytes(content)
    assert [skipped.file for skipped in read_results(tmp_path, include_dirty=False).skipped] == ["bad.json"]


def test_the_best_rate_is_chosen_over_the_seeds_that_all_rates_have(tmp_path):
    """Seed 0 holds out harder rows; the rate with two more seeds would win by its easier ones."""
    for lr, seed, loss in [(1e-3, 0, 0.42), (1e-3, 1, 0.36), (1e-3, 2, 0.36), (3e-3, 0, 0.40)]:
        values = result("full", lr=lr, seed=seed)
        values["gradselect"]["validation_loss"] = loss
        write(tmp_path, values)
    assert headline(tmp_path)["full"]["Best rate"].startswith("3e-3")


def test_packed_results_are_read_as_the_plain_ones(tmp_path):
    path = write(tmp_path, result("full"))
    plain = read_results(tmp_path, include_dirty=False).runs
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    packed = read_results(tmp_path, include_dirty=False)
    assert [run.content for run in packed.runs] == [run.content for run in plain]
    assert packed.skipped == ()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"{}", lambda data: data[:12] + b"x" + data[13:]]
)
def test_a_damaged_packed_file_is_skipped(tmp_path, damage):
    path = write(tmp_path, result("full"))
    path.with_name("bad.json.gz").write_bytes(damage(gzip.compress(path.read_bytes())))
    (skipped,) = read_results(tmp_path, include_dirty=False).skipped
    assert skipped.file == "bad.json.gz"
    assert "damaged" in skipped.reason


def test_a_run_that_stands_in_two_files_counts_once(tmp_path):
    path = write(tmp_path, result("full"))
    (tmp_path / "z-copy.json").write_bytes(path.read_bytes())
    found = read_results(tmp_path, include_dirty=False)
    assert len(found.runs) == 1
    assert f"the same run as {path.name}" in found.skipped[0].reason


def test_mixed_protocols_are_refused_with_the_key_and_both_values(tmp_path, capsys):
    write(tmp_path, result("full"))
    other = result("other")
    other["gradselect"]["protocol"] = "another"
    other["gradselect"]["protocol_settings"] = {
        "recipe": {"model": {"path": "quickstart/base"}, "run": {"steps": 400, "batch_size": 16}},
        "evaluations": {"test": {"task": "gsm8k", "limit": 200}},
    }
    write(tmp_path, other)
    assert run(tmp_path) == 2
    said = capsys.readouterr().err
    assert "recipe.run.steps: 60 and 400" in said
    assert "batch_size" not in said
    assert not (tmp_path / "report").exists()


def test_no_results_say_what_to_type(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "gradselect compare suites/quick.yaml" in capsys.readouterr().err
    assert run(tmp_path / "nowhere") == 2
    assert "gradselect compare suites/quick.yaml" in capsys.readouterr().err
    (tmp_path / "half.json").write_text("{", encoding="utf-8")
    assert run(tmp_path) == 2
    assert "half.json: damaged or half-written" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path):
    write(tmp_path, result("full"))
    (tmp_path / "page").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="name a folder"):
        write_report(tmp_path, output=tmp_path / "page")


def test_speed_and_memory_alone_make_a_page(tmp_path, capsys):
    """A suite without evaluations has neither scores nor items."""
    for name in ("full", "uniform 20 %"):
        values = results_of(name, seeds=1)[-1]
        empty = dict.fromkeys(("scores", "items", "forgetting", "validation_loss", "curves"))
        write(tmp_path, {**values, "gradselect": values["gradselect"] | empty})
    assert run(tmp_path, "--output", tmp_path / "out") == 0
    assert "runs 2, pictures" in capsys.readouterr().out
    page = Page(tmp_path / "out" / "report.html")
    assert "Speed-up" in page.text
    assert "accuracy" not in page.text
    assert (tmp_path / "out" / "step-parts.png").is_file()
    assert not (tmp_path / "out" / "score-time.png").exists()


def test_a_search_alone_makes_a_page(tmp_path):
    write(tmp_path, result("full", role="rate"))
    page = build_page(read_results(tmp_path, include_dirty=False))
    assert [section.key for section in page.sections] == ["results", "rates", "protocol"]
    assert "No method has a scored run yet" in page.sections[0].parts[0].text


def test_without_full_fine_tuning_nothing_is_relative_to_it(tmp_path):
    write_all(tmp_path, "LoRA r=64", "ID3 1 %", seeds=2)
    assert "Speed-up" not in headline(tmp_path)["LoRA r=64"]
    comparison = comparison_of(tmp_path)
    assert comparison.differences[0][1] == comparison.scores[0].best()


def test_methods_that_differ_in_signs_alone_have_files_of_their_own(tmp_path):
    chosen = block_selection(steps=20, count=2, seed=0, explores=False)
    for name in ("uniform 20 %", "uniform 20", "uniform-20"):
        write(tmp_path, result(name, selection=chosen, steps=20, num_items=5)).rename(tmp_path / f"{name}.json")
    page = build_page(read_results(tmp_path, include_dirty=False))
    names = [chart.name for chart in page.charts]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("blocks-uniform-20") for name in names) == 3


def test_a_method_looks_the_same_in_every_chart_and_like_no_other(tmp_path):
    for place in range(24):
        write(tmp_path, result(f"method {place}", num_items=5))
    marks = comparison_of(tmp_path).marks
    looks = {(mark.shape, mark.is_hollow) for mark in marks.values()}
    assert len(looks) == len(marks) == 24
    svgs = {mark.svg() for mark in marks.values()}
    assert len(svgs) == 24


def test_every_made_up_method_has_a_mark_of_its_own_without_colour(tmp_path):
    assert len(METHODS) == 6
    marks = comparison_of(write_all(tmp_path, seeds=1)).marks
    assert len({(mark.shape, mark.is_hollow, str(mark.dash)) for mark in marks.values()}) == len(METHODS)
    assert marks["full"].shape == "o"
