"""Links of the built site: every file and anchor that a page names is there, and none loads a thing from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Found(HTMLParser):
    """Anchors and links of one page."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := given.get(key)))
        links = [value for key in ("href", "src") if (value := given.get(key))]
        self.links += links
        is_loaded = tag in ("script", "img", "iframe") or (tag == "link" and given.get("rel") == "stylesheet")
        self.loaded += links if is_loaded else []


def broken_links(site: Path) -> list[str]:
    """Return a line for each link that leads nowhere, and for what a page would load from another host.

    Addresses elsewhere are not asked: the build is offline.
    """
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        for link in dict.fromkeys(page.links)
        if not leads_somewhere(link, path, pages, site) or (link in page.loaded and is_elsewhere(link))
    ]


def read(path: Path) -> Found:
    """Return what a page holds."""
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def leads_somewhere(link: str, page: Path, pages: dict[Path, Found], site: Path) -> bool:
    """Return True if the target of a link exists, its anchor too."""
    parts = urlsplit(link)
    if is_elsewhere(link):
        return True
    folder = site if parts.path.startswith("/") else page.parent
    target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors


def is_elsewhere(link: str) -> bool:
    """Return True for an address outside the site."""
    parts = urlsplit(link)
    return bool(parts.scheme or parts.netloc)
