"""Real engines, each set up once: pytest orders the tests so that only one of them runs at a time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from support import vllm_tools

os.environ.update(vllm_tools.ENVIRONMENT)

from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import tiny

OPTIONS = {"enforce_eager": True, "block_size": vllm_tools.BLOCK}
KINDS = ("transformers", "colocate", "server")


@dataclass
class Setting:
    """An engine of one kind that holds models of one family. ``use`` gives it a model's weights under a new version."""

    kind: str
    family: str
    engine: Engine | None
    server: vllm_tools.ServerProcess | None = None
    version: int = 0
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def use(self, model) -> Engine:
        engine: Engine = self.engine or TransformersEngine(model, tiny.tokenizer())
        self.version = next(self.versions)
        engine.sync(model, self.version)
        return engine


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    process = vllm_tools.ServerProcess("qwen2-tied", tmp_path_factory.mktemp("server"))
    yield process
    process.kill()


@pytest.fixture(scope="session", params=[f"{kind}-{family}" for family in vllm_tools.FAMILIES for kind in KINDS])
def setting(request, tmp_path_factory):
    kind, _, family = request.param.partition("-")
    if kind == "transformers":
        yield Setting(kind, family, None)
    elif kind == "colocate":
        engine = VLLMColocateEngine(vllm_tools.policy(family), tiny.tokenizer(), vllm_tools.arguments(), OPTIONS)
        yield Setting(kind, family, engine)
        engine.close()
    else:
        process = vllm_tools.ServerProcess(family, tmp_path_factory.mktemp("server"))
        engine = VLLMServerEngine([process.url], tiny.tokenizer(), vllm_tools.arguments())
        yield Setting(kind, family, engine, process)
        engine.close()
        process.kill()
