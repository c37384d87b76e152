"""``online-dpo init``: list the recipes, or write one into a folder as a starting point."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from online_dpo.checkpoints.files import write_text
from online_dpo.cli.parser import WRONG_INPUT, OneLineParser, with_hyphens
from online_dpo.cli.recipes import FOLDER, IN_REPOSITORY, SCHEMA, SCHEMA_LINE, Recipe, read_recipe, recipe_names
from online_dpo.cli.terminal.screen import print_lines

CHANGE = ("model_name_or_path", "dataset_name", "output_dir")
"""Fields that a user changes first."""


def init(words: Sequence[str]) -> int:
    """List the recipes, or write one. Returns the exit code: 0, 1 (it cannot be written) or 2 (wrong input)."""
    arguments = _parser().parse_args(with_hyphens(list(words)))
    if arguments.name is None:
        print_lines(_listing(), indent=_column())
        return 0
    try:
        recipe = _named(arguments.name)
        files = files_of(recipe)
        _check(arguments.to, files, arguments.force)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    try:
        for name, text in files.items():
            target = arguments.to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
    except OSError as problem:
        print(f"error: {problem.filename or arguments.to}: {problem.strerror}", file=sys.stderr)
        return 1
    print_lines(_what_next(recipe, arguments.to, files))
    return 0


def files_of(recipe: Recipe) -> dict[str, str]:
    """All files of a recipe, by their names in the folder that it is written to: their texts.

    Its first line names a schema for editors, which lies beside it: a path into the package would depend on the
    environment, and a web address would need the network.
    """
    text = recipe.text.replace(IN_REPOSITORY, f"{SCHEMA_LINE}{SCHEMA.name}", 1)
    named = {name: (FOLDER / name).read_text(encoding="utf-8") for name in recipe.files}
    return {recipe.file: text, **named, SCHEMA.name: SCHEMA.read_text(encoding="utf-8")}


def _named(name: str) -> Recipe:
    """The recipe of this name; its file's name, and underscores, will do.

    Raises:
        ValueError: there is none.
    """
    names = recipe_names()
    wanted = name.strip().lower().removesuffix(".yaml").replace("_", "-").replace(" ", "-")
    if wanted in names:
        return read_recipe(wanted)
    close = difflib.get_close_matches(wanted, names, n=1) or [known for known in names if wanted and wanted in known]
    hint = f"Did you mean `{close[0]}`?" if close else f"There are: {', '.join(names)}."
    raise ValueError(f"there is no recipe {name!r}. {hint} `online-dpo init` lists them.")


def _check(folder: Path, files: dict[str, str], force: bool) -> None:
    """Check that nothing is lost: a file that is there already has the same text, or ``force`` is given.

    The schema is the package's own; one of another version is replaced.

    Raises:
        ValueError: it cannot be written there, or would replace something.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give another one with --to.")
    for name, text in files.items():
        target = folder / name
        parent = next(above for above in target.parents if above.exists())
        if not parent.is_dir() or target.is_dir():
            taken = target if target.is_dir() else parent
            raise ValueError(f"{taken} is in the way of {target}. Give another folder with --to.")
        if force or name == SCHEMA.name or not target.exists():
            continue
        if target.read_bytes() != text.encode("utf-8"):
            raise ValueError(f"{target} exists. Give another folder with --to, or --force to replace it.")


def _column() -> int:
    return max(map(len, recipe_names())) + 4


def _listing() -> list[str]:
    """A line for each recipe, and how to get one."""
    lines = [f"  {name:<{_column() - 2}}{read_recipe(name).line}" for name in recipe_names()]
    return ["Recipes:", *lines, "", "Write one here: online-dpo init NAME"]


def _what_next(recipe: Recipe, folder: Path, files: dict[str, str]) -> list[str]:
    """What was written, what to change in it, and what to run."""
    change = [name for name in CHANGE if f"\n{name}:" in recipe.text]
    return [
        recipe.what,
        f"Written: {', '.join(str(folder / name) for name in files)}",
        f"Needs: {recipe.needs}",
        f"Change: {', '.join(f'`{name}`' for name in change)} in {folder / recipe.file}.",
        "Then run:",
        *([] if folder == Path() else [f"  cd {shlex.quote(str(folder))}"]),
        *(f"  {command}" for command in recipe.commands),
        f"Expect: {recipe.expect}",
    ]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        called_here={"output": "to", "output_dir": "to", "folder": "to", "dir": "to", "overwrite": "force"},
        prog="online-dpo init",
        description="Write a recipe, a run file for one situation, as a starting point. Without a name: list them.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="recipe to write")
    parser.add_argument("--to", type=Path, metavar="FOLDER", default=Path(), help="folder to write to (default: this)")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser
