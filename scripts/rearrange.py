"""Moves modules and definitions, and rewrites every import of them. Mechanical: nothing else changes.

    python scripts/rearrange.py flatten          names are imported from the modules that define them, not from packages
    python scripts/rearrange.py move             whole modules, by MOVES below; also repeatable after a merge
    python scripts/rearrange.py split            definitions, by SPLITS below
    python scripts/rearrange.py names            names and words, by RENAMES and WORDS below

Afterwards `ruff check --fix` takes away imports that are not used, and `ruff format` sorts and breaks lines.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

from rearrange_spec import FIELDS, HELPERS, MOVES, RENAMES, SAID, SAID_IN, SPLITS, TEST_MOVES, WORDS

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PACKAGES = ("online_dpo.rollout", "online_dpo.scoring", "online_dpo.data")
OPEN, CLOSED = ("(", "[", "{"), (")", "]", "}")
PLACES = ("src", "tests", "benchmarks", "recipes")
DOCS = ("docs", "README.md", "pyproject.toml", "Makefile")


def python_files() -> list[Path]:
    return [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]


def path_of(module: str) -> Path:
    path = SRC / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() and not path.with_suffix(".py").is_file() else path.with_suffix(".py")


def is_module(module: str) -> bool:
    path = SRC / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def git_move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "mv", str(old), str(new)], cwd=ROOT, check=True)


def make_packages(path: Path) -> None:
    for folder in path.relative_to(SRC).parents:
        init = SRC / folder / "__init__.py"
        if str(folder) != "." and not init.exists():
            init.parent.mkdir(parents=True, exist_ok=True)
            init.write_text("")


# --- import statements ------------------------------------------------------------------------------------------------


def rewritten_imports(text: str, home) -> str:
    """``text`` with each name of each ``from module import name`` taken from ``home(module, name)``: module, name."""
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    renames: dict[str, str] = {}
    for node in sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and n.level == 0),
        key=lambda n: -n.lineno,
    ):
        assert node.module is not None
        if not (node.module == "online_dpo" or node.module.startswith("online_dpo.")):
            continue
        wanted: dict[str, list[str]] = {}
        changed = False
        for alias in node.names:
            module, name = home(node.module, alias.name)
            changed |= (module, name) != (node.module, alias.name)
            if alias.asname is None and name != alias.name:
                renames[alias.name] = name
            wanted.setdefault(module, []).append(name + (f" as {alias.asname}" if alias.asname else ""))
        if not changed:
            continue
        indent = " " * node.col_offset
        comment = re.search(r"\)?\s*(#.*)$", lines[node.end_lineno - 1].rstrip("\n"))
        made = [f"{indent}from {module} import {', '.join(names)}" for module, names in wanted.items()]
        if comment and len(made) == 1:
            made[0] += f"  {comment.group(1)}"
        lines[node.lineno - 1 : node.end_lineno] = [line + "\n" for line in made]
    text = "".join(lines)
    for old, new in renames.items():
        text = re.sub(rf"(?<![\w.\"'/]){re.escape(old)}\.(?=[A-Za-z_])", f"{new}.", text)
        text = re.sub(rf"(setattr\(){re.escape(old)}(?=,)", rf"\g<1>{new}", text)
    return text


# --- flatten ----------------------------------------------------------------------------------------------------------


def exports(package: str) -> dict[str, str]:
    tree = ast.parse(path_of(package).read_text())
    return {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package)
        for alias in node.names
    }


def flatten() -> None:
    homes = {package: exports(package) for package in PACKAGES}

    def home(module: str, name: str) -> tuple[str, str]:
        return homes.get(module, {}).get(name, module), name

    for path in python_files():
        if path.name == "__init__.py":
            continue
        text = path.read_text()
        new = rewritten_imports(text, home)
        if new != text:
            path.write_text(new)


# --- move -------------------------------------------------------------------------------------------------------------


def move() -> None:
    moves = {f"online_dpo.{old}": f"online_dpo.{new}" for old, new in MOVES.items()}
    pending = {old: new for old, new in moves.items() if (SRC / f"{old.replace('.', '/')}.py").is_file()}
    for old in pending:  # through a place aside: a module may become a package of the same name
        git_move(SRC / f"{old.replace('.', '/')}.py", SRC / f"{old.replace('.', '/')}.py.moving")
    for old, new in pending.items():
        target = SRC / f"{new.replace('.', '/')}.py"
        make_packages(target)
        git_move(SRC / f"{old.replace('.', '/')}.py.moving", target)
    move_tests()

    def home(module: str, name: str) -> tuple[str, str]:
        if module in moves and not is_module(f"{module}.{name}"):
            return moves[module], name
        if f"{module}.{name}" in moves and f"{module}.{name}" != moves[f"{module}.{name}"]:
            new, _, last = moves[f"{module}.{name}"].rpartition(".")
            return new, last
        return module, name

    dotted = sorted(moves, key=len, reverse=True)
    names = [
        re.escape(old) + (r"(?!\.)" if new.startswith(f"{old}.") else "")
        for old, new in ((d, moves[d]) for d in dotted)
    ]
    pattern = re.compile(r"(?<![\w.])(" + "|".join(names) + r")(?!\w)")
    for path in python_files():
        text = path.read_text()
        new = rewritten_imports(text, home)
        new = "".join(
            line
            if re.match(r"\s*(from|import) online_dpo", line)
            else pattern.sub(lambda found: moves[found.group(1)], line)
            for line in new.splitlines(keepends=True)
        )
        for old_name, new_name in HELPERS.items():
            new = re.sub(rf"^(\s*)from {old_name} import", rf"\1from {new_name} import", new, flags=re.M)
            new = re.sub(rf"^(\s*)import {old_name}$", rf"\1from support import {old_name}", new, flags=re.M)
        if new != text:
            path.write_text(new)


def move_tests() -> None:
    for old, new in TEST_MOVES.items():
        if (ROOT / "tests" / old).is_file():
            git_move(ROOT / "tests" / old, ROOT / "tests" / new)


# --- split ------------------------------------------------------------------------------------------------------------


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def start(node: ast.stmt, lines: list[str]) -> int:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return first


def used_names(text: str) -> set[str]:
    tree = ast.parse(text)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w\[\], |.]+", node.value)
        ):
            used |= set(re.findall(r"[A-Za-z_]\w*", node.value))
    return used


def split(module: str, target: str, doc: str, names: list[str]) -> None:
    source = path_of(module)
    lines = source.read_text().splitlines(keepends=True)
    tree = ast.parse("".join(lines))
    body = tree.body
    first = next(i for i, n in enumerate(body) if i > 0 and not isinstance(n, (ast.Import, ast.ImportFrom)))
    if isinstance(body[first], ast.If):  # TYPE_CHECKING
        first += 1
    head_end = body[first - 1].end_lineno
    imports = "".join(lines[body[0].end_lineno : head_end])
    moved: list[str] = []
    kept: list[str] = []
    moved_names: set[str] = set()
    kept_names: set[str] = set()
    goes = False
    for i, node in enumerate(body[first:], first):
        begin = start(node, lines)
        end = start(body[i + 1], lines) if i + 1 < len(body) else len(lines)
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            goes = any(name in names for name in names_of(node))
        (moved if goes else kept).append("".join(lines[begin:end]))
        (moved_names if goes else kept_names).update(names_of(node))
    missing = set(names) - moved_names
    assert not missing, f"{module} does not define {missing}"
    moved_text, kept_text = "".join(moved), "".join(kept)
    back = used_names(moved_text) & kept_names
    forth = used_names(kept_text) & moved_names
    if back and forth:
        print(f"CIRCLE {module} <-> {target}: {sorted(back)} / {sorted(forth)}")
    path = SRC / f"{target.replace('.', '/')}.py"
    make_packages(path)
    extra = f"from {module} import {', '.join(sorted(back))}\n" if back else ""
    if path.is_file():
        text = path.read_text()
        node = ast.parse(text).body[0]
        text_lines = text.splitlines(keepends=True)
        future = next(
            (n.end_lineno for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and n.module == "__future__"),
            node.end_lineno,
        )
        more = "".join(line for line in imports.splitlines(keepends=True) if "__future__" not in line)
        path.write_text(
            "".join(text_lines[:future]) + more + "\n" + extra + "".join(text_lines[future:]) + "\n\n" + moved_text
        )
    else:
        path.write_text(f'"""{doc}"""\n{imports}\n{extra}\n\n{moved_text}')
        subprocess.run(["git", "add", str(path)], cwd=ROOT, check=True)
    onward = f"from {target} import {', '.join(sorted(forth))}\n" if forth else ""
    source.write_text("".join(lines[:head_end]) + onward + "\n\n" + kept_text)

    def home(where: str, name: str) -> tuple[str, str]:
        return (target if where == module and name in moved_names else where), name

    for other in python_files():
        if other in (source, path):
            text = other.read_text()
            if other == source:
                continue
        text = other.read_text()
        new = rewritten_imports(text, home)
        for name in moved_names:
            new = new.replace(f'"{module}.{name}"', f'"{target}.{name}"')
        if new != text:
            other.write_text(new)
    if not kept_text.strip():
        subprocess.run(["git", "rm", "-fq", str(source)], cwd=ROOT, check=True)


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(text: str, is_types: bool, names_here: dict[str, str]) -> str:
    """``names_here`` are the renames of this file."""
    depth: list[int] = []
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = text.splitlines(keepends=True)
    for token in tokens:
        depth.append((depth[-1] if depth else 0) + (token.string in OPEN) - (token.string in CLOSED))
    for i in range(len(tokens) - 1, -1, -1):
        token = tokens[i]
        new = token.string
        if token.type == tokenize.NAME and new in names_here:
            is_attribute = i > 0 and tokens[i - 1].string == "."
            is_keyword = depth[i] > 0 and tokens[i + 1].string == "=" and tokens[i - 1].string in ("(", ",")
            if new in FIELDS and (is_types or is_attribute or is_keyword):
                continue
            if is_attribute and new in ("duel", "chance", "lend"):
                continue
            new = names_here[new]
        elif token.type in (tokenize.STRING, tokenize.COMMENT) and not is_types:
            new = in_words(new)
            if new[0] in "fr":
                new = re.sub(r"\{(said|duel|duels|chance)\b", lambda f: "{" + names_here.get(f[1], f[1]), new)
                new = re.sub(r"\{len\((said|duel|duels)\)", lambda f: "{len(" + names_here.get(f[1], f[1]) + ")", new)
        if new == token.string:
            continue
        (row, begin), (end_row, end) = token.start, token.end
        before, after = lines[row - 1][:begin], lines[end_row - 1][end:]
        lines[row - 1 : end_row] = (before + new + after).splitlines(keepends=True)
    return "".join(lines)


def in_words(text: str) -> str:
    def word(found: re.Match[str]) -> str:
        return WORDS[found.group(0)]

    return re.sub(r"(?<![\w/\"'.])(" + "|".join(WORDS) + r")(?![\w\"'/])", word, text)


def names() -> None:
    for path in python_files():
        text = path.read_text()
        here = RENAMES | (SAID if path.relative_to(ROOT).as_posix() in SAID_IN else {})
        new = renamed(text, path.name == "types.py", here)
        if new != text:
            path.write_text(new)
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        text = path.read_text()
        new = in_words(text)
        if new != text:
            path.write_text(new)


def main() -> None:
    what = sys.argv[1]
    if what == "flatten":
        flatten()
    elif what == "move":
        move()
    elif what == "names":
        names()
    else:
        for module, target, doc, moved in SPLITS:
            if is_module(f"online_dpo.{module}"):
                split(f"online_dpo.{module}", f"online_dpo.{target}", doc, moved)


if __name__ == "__main__":
    main()
