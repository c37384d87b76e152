"""Kernels of a compiled decoding step, from the code that Inductor writes for a GPU, without one.

    python benchmarks/compiled_layers.py --lora no yes

It needs a build of torch for CUDA, whose Triton writes the kernels; no card, since the code is not run. Where the
compiler asks for the card's properties, it gets those of an H100. What is counted are the calls in the code of one
layer, kernels and products, times the number of layers; the calls in the code of the draw; and the operations of a step
that are not compiled (`decoding_operations.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from decoding_operations import Case, CountedOperations, DirectSteps, move_to_fake_gpu, on_a_fake_gpu, policy
from measure import versions

from online_dpo.rollout.builtin import compiled_steps
from online_dpo.rollout.builtin.compiled_steps import StepCompiler
from online_dpo.rollout.builtin.static_decoding import StaticBuffers, StaticDecoder
from online_dpo.rollout.params import SamplingParams

CALL = re.compile(r"(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.\w+)(?=\()")
FOLDING = {"joint_graph_constant_folding": False, "pattern_matcher": False, "fx_graph_cache": False}
"""Inductor's passes that compute with tensors on the card, off. They would leave fewer kernels, if anything."""


class Written(Exception):
    """The code has been written, and need not be loaded."""


@contextmanager
def properties_of_an_h100() -> Iterator[None]:
    """Inside, the compiler finds a card."""
    from torch._inductor.runtime.hints import DeviceProperties

    card = {"major": 9, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32}
    hints = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, **card)
    seen = types.SimpleNamespace(name="H100", minor=0, multi_processor_count=132, total_memory=80 * 2**30, **card)
    replaced: dict[str, Any] = {
        "torch.cuda.get_device_properties": lambda *_: seen,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda._lazy_init": lambda *_: None,
        "torch.cuda._exchange_device": lambda *_: 0,
        "torch.cuda._maybe_exchange_device": lambda *_: 0,
        "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "none",
        "torch._inductor.scheduler.has_triton": lambda *_: True,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: hints))
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        yield


def writing(codes: list[str]) -> Callable[..., Any]:
    """A backend for `torch.compile` that writes Inductor's code for a GPU into the list, and runs nothing."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    def write(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        def keep(code: str) -> None:
            codes.append(code)
            raise Written

        before = len(codes)
        with properties_of_an_h100(), mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)):
            try:
                compile_fx_inner(graph, inputs, **options)
            except Exception:
                if len(codes) == before:
                    raise
        output = next(node for node in graph.graph.nodes if node.op == "output")
        return lambda *_: [None if node is None else node.meta["val"] for node in output.args[0]]

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        is_layer = any(node.op == "call_function" and "softmax" in str(node.target) for node in graph.graph.nodes)
        own = compiled_steps.LAYER_OPTIONS if is_layer else {}
        with config.patch({**FOLDING, **own}):
            return compile_fx(graph, inputs, inner_compile=write)

    return backend


class CompiledSteps(DirectSteps):
    """Runs steps as they are when they are captured after they were compiled."""

    def run(self, key: Any, step: Callable[[], Any], device: torch.device) -> Any:
        return self.compiler.ready(step)()


def written_code(case: Case) -> list[str]:
    """The codes of a step: of its layers, in the order in which they are compiled, and of the draw."""
    codes: list[str] = []
    model = policy(replace(case, layers=2))
    compiler = StepCompiler(wanted=True)
    with (
        mock.patch.object(compiled_steps, "BACKEND", writing(codes)),
        on_a_fake_gpu(case.weights == "autocast"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        move_to_fake_gpu(model)
        buffers = StaticBuffers()
        buffers.graphs = CompiledSteps(CountedOperations())
        buffers.graphs.compiler = compiler
        decoder = StaticDecoder(model, [[5] * case.prompt] * case.groups, case.completions, 2 * case.width, buffers)
        rows = case.groups * case.completions
        with buffers.linears.in_use(model):
            decoder.prefill()
            decoder.kv_cache.written = case.width - 1
            token_B, uniform_B = torch.zeros(rows, dtype=torch.long, device="cuda"), torch.zeros(rows, device="cuda")
            decoder.sample(token_B, uniform_B, SamplingParams(case.width, (1,)), None)
    assert compiler.wanted, "it was compiled"
    return codes


def calls(code: str) -> list[str]:
    """The kernels and products that a code launches, in their order."""
    return CALL.findall(code[code.index("def call(") :])


def kernels(case: Case, uncompiled: int) -> dict[str, Any]:
    """The kernels of a compiled step.

    Args:
        uncompiled: operations of a step beside its layers and the draw.
    """
    *layers, draw = written_code(case)
    assert len(layers) == 1, "one code serves all layers"
    of_layer, of_draw = calls(layers[0]), calls(draw)
    return {
        "layer": len(of_layer),
        "draw": len(of_draw),
        "uncompiled": uncompiled,
        "step": case.shape.layers * len(of_layer) + len(of_draw) + uncompiled,
        "layer_calls": of_layer,
        "draw_calls": of_draw,
    }


def beside_layers(case: Case) -> int:
    """Operations of a step that belong to no layer, without those of the draw."""
    from decoding_operations import count

    two, three = (count(replace(case, layers=layers))["operations"] for layers in (2, 3))
    return two - 2 * (three - two) - draw_operations(case)


def draw_operations(case: Case) -> int:
    """Operations of the draw, as it is."""
    from online_dpo.rollout.builtin.sampling import draw_tokens

    with on_a_fake_gpu(case.weights == "autocast"), CountedOperations() as counted:
        rows = case.groups * case.completions
        draw_tokens(
            torch.empty(rows, case.shape.vocabulary, dtype=torch.bfloat16, device="cuda"),
            torch.empty(rows, device="cuda"),
        )
    return counted.total - 2  # the two that are made here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen2.5-0.5b"])
    parser.add_argument("--weights", nargs="+", default=["autocast", "bf16"])
    parser.add_argument("--lora", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.backends.cuda.is_built():
        parser.error("this build of torch has no Triton; take one for CUDA, it needs no card")
    results = []
    for model, weights, lora in product(options.model, options.weights, options.lora):
        case = Case(model, weights, lora == "yes")
        found = kernels(case, beside_layers(case))
        print(
            f"{case.model}, {weights}, {'LoRA' if case.lora else 'no LoRA'}: {found['layer']} a layer, "
            f"{found['draw']} for the draw, {found['uncompiled']} uncompiled: {found['step']} a step"
        )
        results.append({"model": case.model, "weights": weights, "lora": case.lora, **found})
    if options.json is not None:
        options.json.write_text(json.dumps({"versions": versions(), "steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
