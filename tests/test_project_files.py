"""Files that a host of repositories reads: workflow, citation, changelog fragments, pre-commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from project_support import matrix

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has none of these files")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_the_workflow_runs_commands_that_are_there() -> None:
    """And each job of the matrix, on the Python that the matrix gives it."""
    jobs = read(".github/workflows/ci.yml")["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    wanted = {word for step in steps for word in re.findall(r"^make (\S+)", step)}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"lint", "docs", "notebooks", "wheel"} == wanted
    assert wanted <= targets

    listed = {row["job"]: row["python"] for row in jobs["tests"]["strategy"]["matrix"]["include"]}
    assert listed == {name: version for name, (version, _) in matrix().JOBS.items()}


def test_the_citation_names_papers_that_the_code_names() -> None:
    papers = read("CITATION.cff")["references"]
    named = {paper["identifiers"][0]["value"].removeprefix("arXiv:") for paper in papers}
    assert len(named) == len(papers)
    code = " ".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    in_code = set(re.findall(r"(?<!\d)\d{4}\.\d{5}(?!\d)", code))
    assert named <= in_code
    assert {"2512.15764", "2408.14470"} <= named


def test_changelog_fragments_have_a_kind() -> None:
    files = {path.name for path in (ROOT / "changelog.d").iterdir()} - {"README.md"}
    assert [name for name in files if not re.fullmatch(r"[^/]+\.(added|changed|fixed|removed)\.md", name)] == []


def test_templates_and_hooks_are_yaml_of_the_form_that_is_read() -> None:
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        values = read(str(form.relative_to(ROOT)))
        assert form.name == "config.yml" or {"name", "description", "body"} <= values.keys()
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {"ruff", "ruff-format", "import-linter"} <= {hook["id"] for hook in hooks}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "changelog.d/README.md"])
def test_pages_for_contributors_name_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(r"(?<![\w/.-])(?:src|tests|docs|benchmarks)/[\w./-]*\w", text)
    assert [path for path in (*links, *named) if not (ROOT / path).exists()] == []
