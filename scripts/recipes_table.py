"""Writes the table of recipes into a page, from their headers.

python scripts/recipes_table.py docs/guides/recipes.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from online_dpo.cli.recipes import read_recipe, recipe_names

BEGIN, END = "<!-- recipes: python scripts/recipes_table.py docs/guides/recipes.md -->", "<!-- end of recipes -->"


def table() -> str:
    """Returns a row for each recipe: its name, what it is for, what it needs."""
    rows = ["| `online-dpo init` | what it is for | needs |", "|---|---|---|"]
    for recipe in map(read_recipe, recipe_names()):
        rows.append(f"| `{recipe.name}` | {recipe.line} | {recipe.needs} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """Returns the page with the present table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"the page has no {BEGIN} ... {END}"
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Writes the page that is named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
