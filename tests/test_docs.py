"""What the docs name is there: files, folders, modules and headings, also after a rename."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILES = [
    path.relative_to(ROOT).as_posix()
    for top in ("runtime_py", "exporters", "toolchain", "tests", "docs", ".github", ".ci")
    for path in (ROOT / top).rglob("*")
    if "__pycache__" not in path.parts
]
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]+)?\)")
_PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*(\.py|\.toml|\.cpp|\.h|\.yml|/)")
_MODULE = re.compile(r"(runtime_py|exporters|toolchain)(\.\w+)+")
# Folders and files that attune writes, or that a user has: not this repository's.
_WRITTEN = {
    *("adapter", "adapters", "android", "ios", "golden", "general", "lexicons"),
    *("jobs", "00001-512", "out"),
    *("cells", "lives", "swaps", "measured", "failed"),
}


def named(pattern: re.Pattern[str], page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [word for word in _CODE.findall(text) if pattern.fullmatch(word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_docs_name(page: Path) -> None:
    """A path names a file by its end: ``executorch/pieces.py`` is enough; ``*`` stands for any."""
    lost = []
    for name in named(_PATH, page):
        wanted = re.escape(name.rstrip("/")).replace(r"\*", r"[\w.-]*")
        if name.rstrip("/") not in _WRITTEN and not any(
            re.search(rf"(^|/){wanted}$", file) for file in FILES
        ):
            lost.append(name)
    assert not lost, f"{page.name} names what is not there: {', '.join(lost)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_the_docs_name(page: Path) -> None:
    lost = [name for name in named(_MODULE, page) if not _is_there(name)]
    assert not lost, f"{page.name} names what is not there: {', '.join(lost)}"


def _is_there(name: str) -> bool:
    """A module, or a name that is written in one."""
    parent, _, last = name.rpartition(".")
    if find_spec(parent) is None:
        return False
    if find_spec(name) is not None:
        return True
    origin = find_spec(parent).origin  # type: ignore[union-attr]
    return origin is not None and last in Path(origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_docs(page: Path) -> None:
    lost = []
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        if not path.exists():
            lost.append(target)
        elif anchor and anchor[1:] not in _anchors(path):
            lost.append(target + anchor)
    assert not lost, f"{page.name} links to what is not there: {', '.join(lost)}"


def _anchors(page: Path) -> set[str]:
    """A heading's anchor as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}
