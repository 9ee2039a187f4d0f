"""Shells complete commands and options of `gradselect`, and torch is not loaded for it."""

from __future__ import annotations

import sys

import pytest

from gradselect.app.cli import main


def completed(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, shell: str = "bash"
) -> list[str]:
    """Return what a shell would offer for the last word of a line."""
    words = line.split(" ")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gradselect"])
    monkeypatch.setenv("_GRADSELECT_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    return capsys.readouterr().out.split("\n")


def test_commands_are_completed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    offered = completed("gradselect ", capsys, monkeypatch)
    assert {"train", "doctor", "quickstart", "launch", "delta"} <= set(offered)
    assert set(filter(None, completed("gradselect pl", capsys, monkeypatch))) == {"plan", "plugin-path"}


def test_commands_of_commands_and_options_are_completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(filter(None, completed("gradselect delta a", capsys, monkeypatch))) == {"apply"}
    assert "--resume" in completed("gradselect train recipe.yaml --r", capsys, monkeypatch)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_in_their_form(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any("quickstart" in line for line in completed("gradselect qui", capsys, monkeypatch, shell=shell))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_GRADSELECT_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 0
    assert "_GRADSELECT_COMPLETE" in capsys.readouterr().out
