"""The recipes of the package: run files for one situation each, and the files that they name.

A recipe begins with comments that say what it is, what it needs, its command and what to expect. They are read here,
for `online-dpo init`, for the page of recipes, and by the tests that run each command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"
SCHEMA = FOLDER.parent / "run.schema.json"
SCHEMA_LINE = "# yaml-language-server: $schema="
IN_REPOSITORY = f"{SCHEMA_LINE}../src/online_dpo/{SCHEMA.name}"
"""The first line of a recipe in the folder `recipes` of the repository, which `FOLDER` leads to there."""
PARTS = ("What", "Needs", "Command", "Expect")
_FILE = re.compile(r"[\w./-]+\.\w+")


@dataclass(frozen=True)
class Recipe:
    """A recipe: the four parts of its header as text, and the files that it names beside itself.

    ``what`` begins with a sentence that says what it is for. ``files`` are relative to the folder of the recipes.
    """

    name: str
    text: str
    what: str
    needs: str
    commands: tuple[str, ...]
    expect: str
    files: tuple[str, ...]

    @property
    def line(self) -> str:
        """What it is for, in its first sentence."""
        return re.split(r"(?<=\.)\s", self.what, maxsplit=1)[0]

    @property
    def file(self) -> str:
        """The name of its run file."""
        return f"{self.name}.yaml"


def recipe_names() -> list[str]:
    """The names of all recipes, in the order of the alphabet."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str, folder: Path = FOLDER) -> Recipe:
    """Read a recipe, of the package if no other folder is given.

    Raises:
        ValueError: its header does not have the form that all recipes have.
    """
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.partition("\n\n")[0].splitlines()
    parts = _parts(name, header)
    named = [word for word in _FILE.findall(text.removeprefix(header[0])) if "/" in word or word.endswith(".sbatch")]
    return Recipe(
        name=name,
        text=text,
        what=" ".join(parts["What"]),
        needs=" ".join(parts["Needs"]),
        commands=tuple(parts["Command"]),
        expect=" ".join(parts["Expect"]),
        files=tuple(dict.fromkeys(word for word in named if (folder / word).is_file())),
    )


def _parts(name: str, header: list[str]) -> dict[str, list[str]]:
    """The lines of each part: headings follow ``# ``, their lines ``#   ``."""
    if header[:2] != [IN_REPOSITORY, "#"]:
        raise ValueError(f"The recipe {name} has to begin with `{IN_REPOSITORY}` and `#`.")
    parts: dict[str, list[str]] = {}
    for line in header[2:]:
        if line[:4] == "#   " and parts:
            parts[next(reversed(parts))].append(line[4:].strip())
        else:
            parts[line.removeprefix("# ")] = []
    if tuple(parts) != PARTS or not all(parts.values()):
        raise ValueError(f"The header of the recipe {name} has to have the parts {', '.join(PARTS)}, with text each.")
    return parts
