"""A clone with uncommitted changes: which files they are in is said, for results of such a clone stay out of tables."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gradselect.app.compare import git_state

FILES = ("src/gradselect/app/__init__.py", "suites/quick.yaml", "README.md")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a checkout of a library of three files."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("", encoding="utf-8")
    who = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "m")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(git_state, "PACKAGE", tmp_path / "src" / "gradselect" / "app")
    return tmp_path


def test_changed_files_are_named_with_what_to_do(clone: Path) -> None:
    said: list[str] = []
    source = git_state.WatchedSource(said.append)
    (clone / "suites" / "mine.yaml").write_text("name: mine", encoding="utf-8")
    source.look()
    assert not source.state.dirty
    for file in FILES[1:]:
        (clone / file).write_text("changed", encoding="utf-8")
    source.look()
    source.look()
    (line,) = said
    assert source.state.changed == ("README.md", "suites/quick.yaml")
    assert "the clone differs from its last commit (README.md, suites/quick.yaml): results are marked dirty" in line
    assert "keep a suite or recipe of your own in a new file" in line
    assert "--include-dirty" in line
