"""Runs the blocks of a page in the page's order, in a folder of the page.

The folder begins as if `online-dpo quickstart` had been run there, with tiny models, and holds ``run.yaml`` (the same
run, for pages that speak of your run file). `online-dpo`, `python` and `torchrun` are forks of a warmed process;
settings that keep a training short are appended there. Installing, cloning and making is checked rather than done:
`docs.command` has the rules.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from docs.blocks import ROOT, Block, blocks_of
from docs.command import DONE, FAILED, read_line, send
from support.processes import environment

LIMIT = float(os.environ.get("DOCS_LIMIT", "300"))
"""Seconds that a block may take: to end what hangs, not to measure."""
EXPECTED = re.compile(r"\|\||\$\?|\bif ")
"""In a block that looks at exit codes itself, commands may fail."""
COMMANDS = ("online-dpo", "python", "torchrun", "pip", "git", "make")


class PageFailed(AssertionError):
    """Blocks of a page did not do what a reader would expect."""


class BlockFailed(PageFailed):
    """A block did not do what a reader would expect."""

    def __init__(self, block: Block, what: str, printed: str = "") -> None:
        shown = "\n".join(printed.strip().splitlines()[-60:])
        super().__init__(f"{block.place}: {what}\n--- the block\n{block.code}--- what it printed\n{shown}")


@dataclass
class Stage:
    """Where pages are run: the warm process, the folder that each page begins with, and the addresses."""

    ground: Path
    warm: Path
    bin: Path
    addresses: dict[str, str]
    variables: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        return environment(
            DOCS_WARM=str(self.warm),
            DOCS_ENDPOINT=self.addresses["http://localhost:8000/v1"],
            OPENAI_API_KEY="for-tests",
            PATH=os.pathsep.join([str(self.bin), os.environ["PATH"]]),
            **self.variables,
        )

    def filled_in(self, code: str) -> str:
        """With the addresses of this machine's servers in place of a page's."""
        for address, here in self.addresses.items():
            code = code.replace(address, here).replace(address.replace("localhost", "127.0.0.1"), here)
        return code

    def run_page(self, page: str, folder: Path, text: str | None = None) -> int:
        """Runs all blocks of a page, and returns how many.

        Raises:
            PageFailed: with page, line, block and what was printed, for each block that failed.
        """
        blocks = list(blocks_of(page, (ROOT / page).read_text(encoding="utf-8") if text is None else text))
        started = time.monotonic()
        shutil.copytree(self.ground, folder, symlinks=True)
        failures: list[BlockFailed] = []
        with PageRun(self, folder) as run:
            for block in filter(lambda block: block.is_run, blocks):
                try:
                    run.do(block)
                except BlockFailed as failure:  # those after it are run all the same: all that is wrong, at once
                    failures.append(failure)
        self.seconds[page] = time.monotonic() - started
        if len(failures) > 1:
            raise PageFailed("\n\n".join(map(str, failures)))
        if failures:
            raise failures[0]
        return sum(block.is_run for block in blocks)


class PageRun:
    """One page that is being run: its folder, and the process with its Python names."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self._stage, self._folder = stage, folder
        self._namespace: socket.socket | None = None
        self._log, self._failed = (folder.with_name(folder.name + end) for end in (".printed", ".failed"))

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, *error: object) -> None:
        if self._namespace is not None:
            self._namespace.close()

    def do(self, block: Block) -> None:
        code = self._stage.filled_in(block.code)
        if block.title is not None:
            file = self._folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        if block.language == "python" and block.title is not None:
            self._bash(block, f'python -c \'import runpy; runpy.run_path("{block.title}", run_name="imported")\'')
        elif block.language == "python":
            self._python(block, code)
        elif block.language == "bash":
            self._bash(block, code if block.title is None else f"bash -n {block.title}")
        elif block.title is None and block.language == "yaml":
            self._fragment(block, code)
        elif block.language in ("json", "jsonl", "yaml"):
            self._parse(block, code)

    def _environment(self) -> dict[str, str]:
        return self._stage.environment() | {"DOCS_FAILED": str(self._failed)}

    def _parse(self, block: Block, code: str) -> None:
        try:
            if block.language == "yaml":
                yaml.safe_load(code)
            else:
                for text in [code] if block.language == "json" else filter(str.strip, code.splitlines()):
                    json.loads(text)
        except ValueError as error:
            raise BlockFailed(block, f"no {block.language}: {error}") from error
        except yaml.YAMLError as error:
            raise BlockFailed(block, f"no yaml: {error}") from error

    def _fragment(self, block: Block, code: str) -> None:
        """A part of a run file: with the rest of the quickstart's, it has to pass the checks before a run."""
        self._parse(block, code)
        fragment = yaml.safe_load(code)
        if not isinstance(fragment, dict):
            raise BlockFailed(block, "a fragment of a run file has keys")
        rest = yaml.safe_load((self._folder / "run.yaml").read_text())
        if ("judge" in fragment or "reward_funcs" in fragment) and "judge_top" not in fragment:
            rest.pop("reward_model_path", None)
        if "eval_judge" in fragment or "eval_reward_model_path" in fragment:
            rest.pop("eval_reward_funcs", None)
        file = self._folder / f"fragment-{block.line}.yaml"
        file.write_text(yaml.safe_dump({**rest, **fragment}))
        with self._ask(block, "check", [file.name], on_cluster="ray" in fragment) as client:
            if self._answer(block, client) != "0":
                raise BlockFailed(block, "the fragment is wrong", self._log.read_text())

    def _python(self, block: Block, code: str) -> None:
        """The next block of the page's namespace; a process that is stuck or gone gets no further one."""
        namespace = self._namespace or self._ask(block, "namespace", [])
        self._namespace = None
        self._log.write_text("")
        answer = ""
        try:
            request = {"page": block.page, "line": block.line, "code": code}
            namespace.sendall(json.dumps(request).encode() + b"\n")
            answer = self._answer(block, namespace)
        finally:
            if answer in (DONE, FAILED):
                self._namespace = namespace
            else:
                namespace.close()
        if answer != DONE:
            what = "an exception" if answer == FAILED else f"it has ended Python with exit code {answer}"
            raise BlockFailed(block, what, self._log.read_text())

    def _ask(self, block: Block, kind: str, words: list[str], **more: Any) -> socket.socket:
        """A fork of the warm process, which prints into the log."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(LIMIT)
        client.connect(str(self._stage.warm))
        request = {"kind": kind, "words": words, "folder": str(self._folder), "environment": self._environment()}
        self._log.write_text("")
        with open(os.devnull) as nothing, self._log.open("a") as log:
            send(client, {**request, **more}, [nothing.fileno(), log.fileno(), log.fileno()])
        self._answer(block, client)
        return client

    def _answer(self, block: Block, client: socket.socket) -> str:
        try:
            return read_line(client)
        except TimeoutError:
            raise BlockFailed(block, f"not at an end after {LIMIT:g} s", self._log.read_text()) from None

    def _bash(self, block: Block, code: str) -> None:
        self._log.write_text("")
        self._failed.write_text("")
        with self._log.open("a") as log:
            process = subprocess.Popen(
                ["bash", "-e", "-u", "-x", "-o", "pipefail", "-c", code],
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            code_of_exit = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise BlockFailed(block, f"not at an end after {LIMIT:g} s", self._log.read_text()) from None
        finally:
            end_group(process)
        if code_of_exit:
            raise BlockFailed(block, f"exit code {code_of_exit}", self._log.read_text())
        if (failed := self._failed.read_text()) and not EXPECTED.search(code):
            raise BlockFailed(block, f"what it does not look at has failed: {failed}", self._log.read_text())


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends what a block has left in the background; forks of the warm process end with their clients."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def warmed(folder: Path, hub_names: Iterable[str]) -> Iterator[Path]:
    """The warm process, as the path of its socket. Beside it are ``ground`` and the cache of the hub."""
    path = folder / "warm"
    variables = hub_variables(folder / "hub")
    with (folder / "warm.printed").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "docs.warm", str(path), *hub_names],
            env=environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", **variables),
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_it_serves(path, process)
        yield path
    finally:
        process.kill()
        process.wait()


def hub_variables(folder: Path) -> dict[str, str]:
    """Where the hub's models and datasets are (`support.hub`), and that there is no other."""
    caches = {
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    return {**caches, "HF_HUB_OFFLINE": "1"}


def wait_until_it_serves(path: Path, process: subprocess.Popen[Any]) -> None:
    started = time.monotonic()
    while not path.exists():
        if process.poll() is not None or time.monotonic() - started > 2 * LIMIT:
            raise RuntimeError(path.with_name("warm.printed").read_text())
        time.sleep(0.05)


def write_commands(folder: Path) -> Path:
    """A folder for the path, with the commands that pages use."""
    folder.mkdir()
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{ROOT}/tests/docs/command.py" {name} "$@"\n')
        file.chmod(0o755)
    (folder / "python3").symlink_to("python")
    return folder
