"""`gradselect delta`: what the functions do, a short summary, and exit code 2 without a traceback."""

from __future__ import annotations

import pytest
from delta_support import noise, same_model, with_changes, write_model

from gradselect import delta
from gradselect.app.cli import main


@pytest.fixture
def models(tmp_path):
    weight = noise(1000)
    base = write_model(tmp_path / "base", {"w": weight, "v": noise(10)})
    tuned = write_model(tmp_path / "tuned", {"w": with_changes(weight, range(10)), "v": noise(10)})
    return base, tuned


def run(*words: object) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["delta", *map(str, words)])
    return int(stop.value.code or 0)


def test_diff_apply_and_revert_go_there_and_back(tmp_path, models, capsys):
    base, tuned = models
    assert run("diff", base, tuned, tmp_path / "d") == 0
    said = capsys.readouterr().out
    assert "1 of 2 tensors changed (0 dense, 1 by index and value, 0 whole), 0 small files" in said
    assert "10 of 1,010 entries changed (0.99%)" in said
    assert f"{(tmp_path / 'd').stat().st_size:,} bytes" in said
    assert run("apply", base, tmp_path / "d", tmp_path / "applied") == 0
    assert f"is the tuned model, fingerprint {delta.fingerprint(tuned)}" in capsys.readouterr().out
    assert run("revert", tuned, tmp_path / "d", tmp_path / "reverted") == 0
    assert f"is the base model, fingerprint {delta.fingerprint(base)}" in capsys.readouterr().out
    assert same_model(tmp_path / "applied", tuned)
    assert same_model(tmp_path / "reverted", base)


def test_merge_takes_deltas_in_order_and_a_rule(tmp_path, models, capsys):
    base, tuned = models
    other = write_model(tmp_path / "other", {"w": with_changes(noise(1000), range(5, 20), 2.0), "v": noise(10)})
    delta.diff(base, tuned, tmp_path / "1")
    delta.diff(base, other, tmp_path / "2")
    assert run("merge", base, tmp_path / "1", tmp_path / "2", tmp_path / "m") == 2
    assert "5 entries are changed by more than one delta: 5 of w" in capsys.readouterr().err
    assert run("merge", base, tmp_path / "1", tmp_path / "2", tmp_path / "m", "--overlap", "last") == 0
    assert "20 of 1,010 entries changed" in capsys.readouterr().out


def test_a_summary_says_when_whole_tensors_make_the_file_large(tmp_path, models, capsys):
    base, _ = models
    recast = write_model(tmp_path / "recast", {"w": noise(1000).half(), "v": noise(10)})
    assert run("diff", base, recast, tmp_path / "d") == 0
    assert (
        "1 tensors are new, gone, or of another shape or dtype: both models' are in the file" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("diff", "nowhere", "tuned", "d"), "error: nowhere is no folder"),
        (("apply", "base", "nothing", "out"), "error: there is no delta nothing"),
        (("revert", "base", "base/config.json", "out"), "is no whole safetensors file"),
        (("merge", "base", "nothing", "m", "--overlap", "first"), "overlap='first' is unknown"),
        (("apply", "base", "nothing", "tuned"), "exists already and is not empty"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, models, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err + said.out
