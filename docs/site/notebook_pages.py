"""Pages made of notebooks, with the outputs that are saved in them."""

from __future__ import annotations

import re
from pathlib import Path

from nbconvert import MarkdownExporter


def write_notebook_page(notebook: Path, folder: Path) -> None:
    """Write `folder/NAME.md` and the notebook's pictures beside it."""
    pictures = f"{notebook.stem}_files"
    body, resources = MarkdownExporter().from_filename(str(notebook), resources={"output_files_dir": pictures})
    folder.mkdir(parents=True, exist_ok=True)
    body = re.sub(r"(\]\([\w./-]+)\.ipynb\)", r"\1.md)", body)  # notebooks are pages of the site
    body = body.replace("![png](", "![output of the cell above](")
    (folder / f"{notebook.stem}.md").write_text(with_marked_outputs(body), encoding="utf-8")
    for name, data in resources["outputs"].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def with_marked_outputs(text: str) -> str:
    """Return the page with printed outputs, which nbconvert indents, as blocks of plain text."""
    printed = re.compile(r"(?<=\n\n)(?:    [^\n]*\n|[ \t]*\n(?=    ))+")

    def fenced(found: re.Match[str]) -> str:
        if not found[0].strip():
            return "\n"
        lines = [line.removeprefix("    ") for line in found[0].strip("\n").split("\n")]
        return "```{.text .output}\n" + "\n".join(lines) + "\n```\n"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else printed.sub(fenced, part) for part in parts)
