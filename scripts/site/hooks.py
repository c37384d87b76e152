"""What mkdocs does not do by itself, for pages that have to read well on GitHub too.

- The repository's own pages (changelog, security, contributing) are shown under Project.
- Relative links that leave docs/ lead to one of these pages, or to the file on GitHub.
- The page of the blocks that are not run is made from these.
- Alerts of GitHub (``> [!NOTE]``) become admonitions of the theme.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SHOWN = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
"""Pages of the repository's root, and where they stand on the site."""

MADE = (
    "project/not-run.md",
    *(f"reference/{name}.md" for name in ("configuration", "metrics", "command-line")),
)
"""Pages that nobody edits."""

LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
ALERT = re.compile(r"^> \[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\] *\n((?:>.*\n?)+)", re.MULTILINE)
KINDS = {"IMPORTANT": "info", "CAUTION": "danger"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the root's pages, with links that hold from where they stand now."""
    for name, place in SHOWN.items():
        file = File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8"))
        file.edit_uri = f"../{name}"
        files.append(file)
    files.append(File.generated(config, "project/not-run.md", content=not_run_page()))
    return files


def not_run_page() -> str:
    """Each block that is not run, with the reason that stands before it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from docs.blocks import not_run

    rows = [f"| {block.place} | {block.reason} |" for block in not_run()]
    head = "# Blocks that are not run\n\nCI runs every block of code in the README and in these pages but for these."
    return f"{head}\n\n| block | why not |\n|---|---|\n" + "\n".join(rows) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links and alerts of one page into what the site understands."""
    place = page.file.src_uri
    written = next((name for name, shown in SHOWN.items() if shown == place), f"docs/{place}")
    blob = f"{config.repo_url}/blob/main/"

    def lead(match: re.Match[str]) -> str:
        link = match[1].removeprefix(blob) if match[1].removeprefix(blob) in SHOWN else match[1]
        if link != match[1]:
            link = posixpath.relpath(link, posixpath.dirname(written) or ".")
        return rewritten(link, written, place, blob)

    if place in MADE:
        page.edit_url = None
    return ALERT.sub(_admonition, LINK.sub(lead, markdown))


def rewritten(link: str, written: str, place: str, blob: str) -> str:
    """A link of the repository's file ``written`` as it has to be in the site's page ``place``.

    >>> rewritten("docs/index.md#try", "CHANGELOG.md", "project/changelog.md", "https://host/blob/main/")
    '../index.md#try'
    """
    path, mark, heading = link.partition("#")
    if not path or re.match(r"[a-z]+:", link):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(written), path))
    inside = SHOWN.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
    if inside is None:
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{blob.replace('/blob/', f'/{kind}/')}{target}{mark}{heading}"
    return f"{posixpath.relpath(inside, posixpath.dirname(place) or '.')}{mark}{heading}"


def _admonition(match: re.Match[str]) -> str:
    kind = KINDS.get(match[1], match[1].lower())
    lines = [line.removeprefix(">").removeprefix(" ") for line in match[2].splitlines()]
    return f"!!! {kind}\n\n" + "".join(f"    {line}\n" if line else "\n" for line in lines)
