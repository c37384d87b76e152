"""Real engines and servers, each set up once: pytest orders the tests so that only one engine samples at a time."""

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
from online_dpo.rollout.vllm import client
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


@pytest.fixture(scope="session", autouse=True)
def short_pauses():
    """A server on one machine is soon there: to look for it every 5 seconds would cost some at each start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "LONGEST_PAUSE", 0.5)
        yield


@pytest.fixture(scope="session")
def server_of(tmp_path_factory):
    """The one server with a policy of this family, for all tests that leave it running."""
    processes = {}

    def get(family):
        if family not in processes:
            processes[family] = vllm_tools.ServerProcess(family, tmp_path_factory.mktemp("server"))
        return processes[family]

    yield get
    for process in processes.values():
        process.kill()


@pytest.fixture(scope="session")
def server(server_of):
    return server_of("qwen2-tied")


@pytest.fixture(scope="session")
def adapter_server(tmp_path_factory):
    """A server that is sent adapters alone."""
    folder = tmp_path_factory.mktemp("adapter-server")
    process = vllm_tools.ServerProcess("qwen2-tied", folder, seed=0, options=["--lora-rank", "4"])
    yield process
    process.kill()


@pytest.fixture(scope="session", params=[f"{kind}-{family}" for family in vllm_tools.FAMILIES for kind in KINDS])
def setting(request, server_of):
    kind, _, family = request.param.partition("-")
    if kind == "transformers":
        yield Setting(kind, family, None)
    elif kind == "colocate":
        engine = VLLMColocateEngine(vllm_tools.policy(family), tiny.tokenizer(), vllm_tools.arguments(), OPTIONS)
        yield Setting(kind, family, engine)
        engine.close()
    else:
        process = server_of(family)
        engine = VLLMServerEngine([process.url], tiny.tokenizer(), vllm_tools.arguments())
        yield Setting(kind, family, engine, process)
        engine.close()
