"""Build the documentation site, strictly and offline: `make docs`.

    python docs/site/build.py           # build/docs/site/index.html

Copies the pages of docs/, writes the API pages, turns the notebooks into pages, gives each file of the repository that
a page links to a page of its own, builds with Zensical, and checks every link and anchor of the result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from api_pages import write_api_pages
from check_links import broken_links
from notebook_pages import write_notebook_page

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent
BUILD = ROOT / "build" / "docs"
PAGES = BUILD / "pages"
LINK = re.compile(r"\[(?P<text>[^\[\]\n]+)\]\((?P<path>(?![a-z]+:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
TEST = re.compile(r"`(tests/\w+\.py::\w+)`")  # long words, which would push the columns beside them together
PICTURES = (".png", ".svg", ".jpg", ".webp")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json", ".jsonl": "json"}


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for name in ("zensical.toml", "docstring_forms.py"):
        shutil.copy(HERE / name, BUILD / name)
    shutil.copy(HERE / "extra.css", PAGES)
    settings = tomllib.loads((HERE / "zensical.toml").read_text(encoding="utf-8"))
    titles = {path: title for title, path in pages_in(settings["project"]["nav"])}
    for page in sorted(DOCS.glob("*.md")):
        (PAGES / page.name).write_text(as_page_of_site(page, page.name, titles), encoding="utf-8")
    for picture in (path for path in DOCS.rglob("*") if path.suffix in PICTURES):
        place = PAGES / picture.relative_to(DOCS)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    for notebook in sorted((DOCS / "notebooks").glob("*.ipynb")):
        write_notebook_page(notebook, PAGES / "notebooks")
    write_api_pages(ROOT / "src" / "gradselect", PAGES / "api")
    check_navigation(set(titles))
    subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=BUILD, check=True)
    if broken := broken_links(BUILD / "site"):
        sys.exit("\n".join(["these links lead nowhere, or a page would load them from another host:", *broken]))
    print(f"built {BUILD / 'site'}; to look at it: python -m http.server --directory {BUILD / 'site'}")


def as_page_of_site(source: Path, place: str, titles: dict[str, str]) -> str:
    """Return a Markdown file as the page at `place`, with its links turned into those of the site.

    A file outside docs/ gets a page that shows it. A link whose text is the name of a page has its title instead.
    """

    def turned(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        inside = target.is_relative_to(DOCS)
        name = target.relative_to(DOCS).as_posix() if inside else page_of_file(target, titles)
        name = f"{name.removesuffix('.ipynb')}.md" if name.endswith(".ipynb") else name
        is_bare = link["text"].strip("`").rpartition("/")[2] == target.name
        text = titles.get(name, link["text"]) if is_bare else link["text"]
        return f"[{text}]({os.path.relpath(name, os.path.dirname(place) or '.')}{link['anchor'] or ''})"

    text = TEST.sub(breakable, source.read_text(encoding="utf-8"))
    return LINK.sub(turned, text)


def breakable(test: re.Match[str]) -> str:
    """Return the name of a test that may be broken between its words, and nowhere else."""
    name = re.sub(r"/|::|_", r"\g<0><wbr>", test[1])
    return f'<code class="test">{name}</code>'


def page_of_file(target: Path, titles: dict[str, str]) -> str:
    """Return the page, made if need be, that shows a file of the repository."""
    if not target.is_file():
        sys.exit(f"a page links {target}, which is no file")
    name = target.relative_to(ROOT).as_posix()
    place = f"files/{name.removesuffix('.md')}.md"
    page = PAGES / place
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.touch()  # a page that links back finds it
        is_page = target.suffix == ".md"
        page.write_text(as_page_of_site(target, place, titles) if is_page else listing(name, target), encoding="utf-8")
    return place


def listing(name: str, target: Path) -> str:
    """Return a page that shows a file."""
    language = LANGUAGES.get(target.suffix, "text")
    return f"# {name}\n\n````{language}\n{target.read_text(encoding='utf-8')}````\n"


def check_navigation(listed: set[str]) -> None:
    """Refuse a page that the navigation forgets, and an entry without a page."""
    there = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    there = {path for path in there if not path.startswith("files/")}
    if listed != there:
        forgotten, vain = sorted(there - listed), sorted(listed - there)
        sys.exit(f"docs/site/zensical.toml: nav lacks {forgotten}, and names {vain}, which are no pages")


def pages_in(nav: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return title and page of each entry of a navigation, in order."""
    found: list[tuple[str, str]] = []
    for title, value in (item for entry in nav for item in entry.items()):
        found += [(title, value)] if isinstance(value, str) else pages_in(value)
    return found


if __name__ == "__main__":
    main()
