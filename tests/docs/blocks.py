"""The blocks of code of a page, and what is to be done with each. Imports nothing that has to be installed.

A page says of each block what it is by the words behind its fence, and ``<!-- not run: REASON -->`` in the line before
the fence takes a block out. CONTRIBUTING.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

RUN = ("bash", "python", "yaml", "json", "jsonl")
"""Languages that are run or checked. With a title, these and all others are written to a file."""
SHOWN = ("text", "console", "mermaid")
"""Languages that are only to be read."""

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<info>[^`]*)$")
INFO = re.compile(r'(?P<language>\w*)(?: +title="(?P<title>[^"]+)")?')
NOT_RUN = re.compile(r"<!-- *not run\b(?P<reason>.*?)-->")


class PageError(ValueError):
    """A page's blocks do not keep to the convention."""


@dataclass(frozen=True)
class Block:
    """One block: ``line`` is that of its fence, ``reason`` says why it is not run."""

    page: str
    line: int
    language: str
    title: str | None
    code: str
    reason: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.reason is None and (self.title is not None or self.language not in SHOWN)


def pages() -> list[str]:
    """The pages whose blocks are run, from the repository's root."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return ["README.md", *(str(page.relative_to(ROOT)) for page in found)]


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page in their order.

    Raises:
        PageError: a fence without an end, a language that is not known, a reason that is missing or for no block.
    """
    lines = text.splitlines()
    number = 0
    mark: re.Match[str] | None = None
    while number < len(lines):
        line, number = lines[number], number + 1
        if (opened := FENCE.match(line)) is None:
            mark = _mark(page, number, line, mark)
            continue
        end = _end(lines, number, opened["fence"])
        if end is None:
            raise PageError(f"{page}:{number}: a fence without an end")
        code = "\n".join(line.removeprefix(opened["indent"]) for line in lines[number:end]) + "\n"
        yield _block(page, number, opened["info"].strip(), code, mark)
        number, mark = end + 1, None
    if mark is not None:
        raise PageError(f"{page}: `{mark[0]}` stands before no block")


def _mark(page: str, number: int, line: str, before: re.Match[str] | None) -> re.Match[str] | None:
    """The mark in a line that is no fence, or that of a line before, with nothing or comments between."""
    if before is not None and line.strip() and not line.lstrip().startswith("<!--"):
        raise PageError(f"{page}:{number - 1}: `{before[0]}` stands before no block")
    found = NOT_RUN.search(line) if line.lstrip().startswith("<!--") else None
    if found and not re.match(r": *\w", found["reason"]):
        raise PageError(f"{page}:{number}: write why it is not run: `<!-- not run: REASON -->`")
    return found or before


def _end(lines: list[str], start: int, fence: str) -> int | None:
    ends = (number for number in range(start, len(lines)) if lines[number].strip() == fence)
    return next(ends, None)


def _block(page: str, line: int, info: str, code: str, mark: re.Match[str] | None) -> Block:
    words = INFO.fullmatch(info)
    if words is None:
        raise PageError(f'{page}:{line}: behind a fence stand a language and a title="FILE", not `{info}`')
    language, title = words["language"], words["title"]
    if mark is None and title is None and language not in (*RUN, *SHOWN):
        known = ", ".join((*RUN, *SHOWN))
        raise PageError(f"{page}:{line}: `{language}` is none of {known}; `text` is for what is printed")
    if title is not None and (title.startswith("/") or ".." in title):
        raise PageError(f"{page}:{line}: a title is a file of the page's own folder, not {title}")
    reason = mark["reason"].removeprefix(":").strip() if mark else None
    return Block(page, line, language, title, code, reason)


def not_run() -> list[Block]:
    """All blocks that say why they are not run."""
    found = (block for page in pages() for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")))
    return [block for block in found if block.reason is not None]


def names_on_the_hub() -> list[str]:
    """Whatever in pages and recipes may be the name of a model or dataset of the hub."""
    files = [*map(ROOT.joinpath, pages()), *(ROOT / "src").rglob("recipes/*.yaml"), *(ROOT / "recipes").glob("*.yaml")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return sorted(set(re.findall(r"[\w.-]+/[\w.-]+", text)))
