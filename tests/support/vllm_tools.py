"""Models that vLLM's CPU kernels accept, real vLLM servers, and a proxy that makes them fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from online_dpo import OnlineDPOConfig
from online_dpo.types import Group
from support import tiny
from support.processes import free_port

MAX_LENGTH = 96
BLOCK = 32  # of the KV cache; a prompt is found in the prefix cache from this length on
FAMILIES = {"qwen2-tied": ("qwen2", True), "llama-untied": ("llama", False)}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def policy(family: str, seed: int = 0, sharpness: float = 3.0, **overrides: object) -> PreTrainedModel:
    """4 heads of 32: the smallest size of a head that vLLM's CPU attention knows."""
    name, tied = FAMILIES[family]
    shape = {"hidden_size": 128, "intermediate_size": 96, "tie_word_embeddings": tied, **overrides}
    return tiny.causal_lm(name, seed, sharpness, **shape)


def lora_policy(family: str, seed: int = 0) -> nn.Module:
    """A policy whose adapter has been trained: both of its matrices are far from 0."""
    model = get_peft_model(policy(family), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    change_weights(model, seed, only_trainable=True)
    return model.eval()


def change_weights(model: nn.Module, seed: int, only_trainable: bool = False) -> None:
    """A large step for every weight, as an optimizer would make it: in place."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trainable:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def arguments(**overrides: object) -> OnlineDPOConfig:
    fields = dict(output_dir="unused", use_cpu=True, report_to=[], max_length=MAX_LENGTH, max_new_tokens=14)
    return OnlineDPOConfig(**{**fields, **overrides})


def largest_error(model: nn.Module, groups: Sequence[Group]) -> float:
    """Between the engine's log-probabilities and those of a plain forward pass, sequence by sequence."""
    largest = 0.0
    with torch.no_grad():
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
                logps = model(input_ids=ids).logits.log_softmax(-1)[0, len(group.prompt.token_ids) - 1 : -1]
                expected = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                largest = max(largest, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return largest


class Launched:
    """A server in a process of its own, on a port that stays the same when it is restarted."""

    def __init__(self, folder: Path) -> None:
        self.model, self.log = folder / "model", folder / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command()],
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )

    def kill(self) -> None:
        """At once, with all of its children, as when a machine is lost."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server had ended by itself:\n{self.log.read_text()[-5000:]}")
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


class ServerProcess(Launched):
    """`online-dpo serve` with a policy."""

    def __init__(self, family: str, folder: Path, seed: int = 77, options: Sequence[str] = ()) -> None:
        self.options = list(options)
        policy(family, seed=seed).save_pretrained(
            folder / "model"
        )  # with the default, weights that no test samples from
        tiny.tokenizer().save_pretrained(folder / "model")
        super().__init__(folder)

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--dtype", "float32", "--max-model-len", str(MAX_LENGTH), *self.options]
        return ["online_dpo", "serve", str(self.model), *options, "--", "--enforce-eager", "--block-size", str(BLOCK)]


@dataclass
class Proxy:
    """Passes requests on to a server, after ``fault(path)``, which may sleep or answer with a status of its own."""

    target: str
    fault: Callable[[str], int | None] = lambda path: None
    paths: list[str] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.pass_on(None)

            def do_POST(self) -> None:
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body: bytes | None) -> None:
                proxy.paths.append(self.path)
                status = proxy.fault(self.path)
                answer = b"broken on purpose"
                if status is None:
                    request = urllib.request.Request(
                        proxy.target + self.path, body, {"Content-Type": "application/json"}
                    )
                    try:
                        with urllib.request.urlopen(request) as got:
                            status, answer = got.status, got.read()
                    except urllib.error.HTTPError as error:
                        status, answer = error.code, error.read()
                    except OSError:  # the server is gone: so are we
                        self.close_connection = True
                        return
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None: ...

        return Handler
