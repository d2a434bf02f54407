"""What mkdocs does not do by itself: folders in the nav, and links to files outside docs/.

A folder in `nav` (ending in /) becomes all its pages, in order of their names. A page in docs/ that
nobody has placed yet stands at the end of Design, so that a new page is never lost. Search puts
pages for users before records of why it is so. A link to a
file of the repository that is no page leads to a copy of it in the site, below files/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?P<head>\]\()(?P<target>[^)\s#]+)(?P<tail>#[^)\s]*)?\)")

#: What a page counts in search by where it is; 1 where nothing is said.
BOOSTS = {
    "faq.md": 2.0,
    "getting-started.md": 2.0,
    "tasks/": 2.0,
    "troubleshooting.md": 2.0,
    "decisions/": 0.02,
    "studies/": 0.05,
    "architecture.md": 0.1,
    "contract.md": 0.2,
}

_copied: set[str] = set()


def on_config(config: Any) -> Any:
    """Fill in folders, and what nobody has placed."""
    docs = Path(config["docs_dir"])
    placed: set[str] = set()
    config["nav"] = [_filled(item, docs, placed) for item in config["nav"]]
    pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*.md")}
    for item in config["nav"]:
        if "Design" in item:
            item["Design"] += sorted(pages - placed)
    _copied.clear()
    return config


def _filled(item: Any, docs: Path, placed: set[str]) -> Any:
    if isinstance(item, dict):
        return {title: _filled(value, docs, placed) for title, value in item.items()}
    if isinstance(item, list):
        return [_filled(value, docs, placed) for value in item]
    if item.endswith("/"):
        pages = sorted(p.relative_to(docs).as_posix() for p in (docs / item).glob("*.md"))
        placed.update(pages)
        return pages
    placed.add(item)
    return item


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ lead to copies of the files; a folder's to its README or page."""
    from mkdocs.structure.files import File

    for start, boost in BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta.setdefault("search", {"boost": boost})
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target, tail = match["target"], match["tail"] or ""
        if "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        inside = posixpath.normpath(posixpath.join("docs", folder, target))
        if inside == "docs" or inside.startswith("docs/"):
            return match[0]
        source = ROOT / inside
        if source.is_dir():
            listed = [source / "README.md", *sorted(source.glob("*.yaml"))]
            source = next((p for p in listed if p.is_file()), source)
        if not source.is_file():
            return match[0]
        name = source.relative_to(ROOT).as_posix()
        uri = f"files/{name}.txt"
        if uri not in _copied:
            _copied.add(uri)
            files.append(File.generated(config, uri, content=source.read_text()))
        return f"]({posixpath.relpath(uri, folder or '.')}{'' if tail else tail})"

    return LINK.sub(moved, markdown)
