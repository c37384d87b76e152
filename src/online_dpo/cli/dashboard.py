"""``online-dpo dashboard``: look at runs in a browser. This module checks the arguments."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from online_dpo.cli.parser import WRONG_INPUT, OneLineParser, with_hyphens

PORT = 8765
DEFAULT_FOLDER = Path("runs")
CALLED_HERE = {"logdir": "folder", "bind": "host", "address": "host", "no_open": "no_browser", "browser": "open"}


def dashboard(words: Sequence[str]) -> int:
    """Serve the dashboard until it is interrupted. Returns the exit code: 0, or 2 (wrong input)."""
    given = _parser().parse_args(with_hyphens(list(words)))
    folders = given.folders or [DEFAULT_FOLDER]
    if problem := _problem(folders, given.port):
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    from online_dpo.dashboard.server import ServerOptions, serve

    return serve(ServerOptions(folders, given.host, given.port, given.open))


def _problem(folders: Sequence[Path], port: int) -> str | None:
    missing = [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the dashboard needs {', '.join(missing)}: pip install 'online-dpo[dashboard]'"
    for folder in folders:
        if folder.is_file():
            return f"{folder} is a file. Give a run's output folder, or a folder that has runs below it."
        if not folder.is_dir():
            return (
                f"there is no folder {folder}. Give a run's output folder, or a folder that has runs below it: "
                "online-dpo dashboard FOLDER"
            )
    return None if 0 <= port <= 65535 else f"--port must be from 0 to 65535; it is {port}."


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        called_here=CALLED_HERE,
        prog="online-dpo dashboard",
        description="Look at runs in a browser: charts, pairs, judges, also while they train.",
        epilog="It reads the files that runs write into their output folders, and sends nothing anywhere.",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help=f"output folders of runs, or folders that have runs below them (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen on; 0: any free one (default: {PORT})")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, which only this machine reaches)",
    )
    browser = parser.add_mutually_exclusive_group()
    browser.add_argument("--open", action="store_true", default=None, help="open it in a browser")
    browser.add_argument(
        "--no-browser",
        dest="open",
        action="store_false",
        default=None,
        help="do not open a browser (default: open one where there is a desktop)",
    )
    return parser
