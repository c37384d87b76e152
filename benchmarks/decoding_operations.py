"""Operations and bytes of one static decoding step on a GPU, counted without one: what a captured graph launches.

    python benchmarks/decoding_operations.py --model qwen2.5-0.5b --groups 16 --completions 4 --width 64 512

Tensors are fake: they have a device ("cuda"), a dtype and a shape, but no memory, so the models have their real sizes.
An operation that is not a view is at least one kernel. Bytes are those of the tensors that an operation reads and
writes, as if no cache of the GPU held any of them. The floor is what a step cannot do without: each weight once, in the
dtype that the model computes in, the keys and values of each prompt and of each completion once, and the logits of one
row of each sequence, written once.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from measure import versions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from workloads import MODELS, Shape, make_policy

from online_dpo.rollout.builtin.batch import Batch
from online_dpo.rollout.builtin.cuda_graphs import StepGraphs
from online_dpo.rollout.builtin.static_decoding import StaticBuffers, StaticDecoder
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Prompt

WEIGHTS = ("autocast", "bf16")
"""fp32 weights under bf16 autocast, as `bf16: true` trains them; or weights that are bf16 themselves."""

aten = torch.ops.aten
NO_KERNEL = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.lift_fresh.default,
    aten.detach.default,
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm"}
REDUCTIONS = {"sum", "mean", "amax", "argmax", "_softmax", "cumsum", "logsumexp", "any", "_fused_rms_norm"}
LOOKUPS = {"gather", "index", "index_select", "embedding", "searchsorted"}
COPIES = {"clone", "cat", "copy_", "_to_copy", "index_copy_", "index_put_", "constant_pad_nd", "slice_scatter"}
WRITES_A_PART = {"index_copy_": 3, "index_put_": 2, "copy_": 1}
"""Operations that write as much as one of their arguments has, and which."""


def kind_of(func: Any, args: tuple[Any, ...], result: Any) -> str:
    """The kind of operation: products of matrices, casts, copies, lookups, reductions, or element by element."""
    name = func._schema.name.removeprefix("aten::")
    if name in PRODUCTS or "attention" in name:
        return "products"
    if name in ("copy_", "_to_copy"):
        source = args[1] if name == "copy_" else args[0]
        return "casts" if source.dtype != result.dtype else "copies"
    named = {"copies": COPIES, "lookups": LOOKUPS, "reductions": REDUCTIONS}
    return next((kind for kind, names in named.items() if name in names), "elementwise")


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; a dimension that is expanded is read once."""
    strides = tensor.stride()
    return tensor.itemsize * prod(n for n, stride in zip(tensor.shape, strides, strict=True) if stride != 0)


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """The bytes that an operation reads and writes."""
    name = func._schema.name.removeprefix("aten::")
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
    if name in WRITES_A_PART:
        source = args[WRITES_A_PART[name]]
        return sum(size(x) for x in inputs if x is not args[0]), source.numel() * args[0].itemsize
    written = sum(size(x) for x in outputs)
    if name in LOOKUPS and name != "searchsorted":
        return sum(size(x) for x in inputs if not x.is_floating_point()) + written, written
    return sum(size(x) for x in inputs), written


class CountedOperations(TorchDispatchMode):
    """Counts the operations that are run inside and are not views, and the bytes they read and write, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All operations."""
        return self.operations.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in NO_KERNEL or is_view(func) or func._schema.name.startswith("prim::"):
            return result
        kind = kind_of(func, args, result)
        read, written = moved(func, args, kwargs or {}, result)
        self.operations[kind] += 1
        self.bytes_read[kind] += read
        self.bytes_written[kind] += written
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return result


def is_view(func: Any) -> bool:
    """Whether an operation returns its argument's memory, unchanged."""
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


class DirectSteps(StepGraphs):
    """Runs steps one by one, on whatever device: a graph would need a GPU.

    Args:
        count: inside it, what belongs to a graph is run.
    """

    def __init__(self, count: CountedOperations) -> None:
        super().__init__()
        self._count = count

    def run(self, key: Any, step: Callable[[], Any], device: torch.device) -> Any:
        with self._count:
            return step()


@dataclass(frozen=True)
class Case:
    """What is counted: a step of ``groups`` prompts of ``prompt`` tokens each, with ``completions`` sequences of each
    prompt, whose cache has ``width`` slots.
    """

    model: str
    weights: str = "autocast"
    lora: bool = False
    groups: int = 16
    completions: int = 4
    prompt: int = 128
    width: int = 256
    layers: int | None = None

    @property
    def shape(self) -> Shape:
        """The model's shape, with ``layers`` layers if given."""
        shape = MODELS[self.model]
        return shape if self.layers is None else replace(shape, layers=self.layers)


class WithoutDeviceGuard(TorchFunctionMode):
    """Inside, a build of torch without CUDA can do with fake tensors on a GPU what it refuses otherwise: index, copy
    into a tensor and from the CPU, invert one and make one contiguous.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            target, value = indexed(*args[:2]), args[2]
            return aten.copy_.default(target, value) if isinstance(value, torch.Tensor) else target.fill_(value)
        if func is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.to and isinstance(args[-1], torch.device):
            return aten._to_copy.default(args[0], device=args[1])
        if func is torch.Tensor.__invert__:
            return args[0].bitwise_not()
        if func is torch.Tensor.copy_:
            return aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]``, for numbers, slices, ``None``, an ellipsis and tensors of indices."""
    index = index if isinstance(index, tuple) else (index,)
    places = [n for n, i in enumerate(index) if i is Ellipsis]
    after_ellipsis = sum(i is not None for i in index[places[0] + 1 :]) if places else 0
    dim, tensors = 0, {}
    for i in index:
        if i is Ellipsis:
            dim = tensor.dim() - after_ellipsis
        elif i is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            if i != slice(None):
                tensor = aten.slice(tensor, dim, i.start, i.stop, i.step or 1)
            dim += 1
        elif isinstance(i, torch.Tensor):
            tensors[dim], dim = i, dim + 1
        else:
            tensor = tensor.select(dim, i)
    return aten.index(tensor, [tensors.get(d) for d in range(dim)]) if tensors else tensor


@contextmanager
def on_a_fake_gpu(autocast: bool) -> Iterator[None]:
    """Inside, tensors are fake, so that they can be on a GPU that is not there; under autocast in bf16, if wanted."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # `torch.autocast` turns itself off where there is no GPU.
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        indexing = nullcontext() if torch.backends.cuda.is_built() else WithoutDeviceGuard()
        with FakeTensorMode(allow_non_fake_inputs=True), indexing, torch.no_grad():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def policy(case: Case) -> Any:
    """The model of this case, without values."""
    model: Any = make_policy(case.shape, "meta")
    if case.weights == "bf16":
        model = model.to(torch.bfloat16)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    return model.eval()


def move_to_fake_gpu(model: torch.nn.Module) -> None:
    """Gives the model fake weights on the GPU."""
    moved: dict[torch.Tensor, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in moved:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                moved[weight] = torch.nn.Parameter(fake, weight.requires_grad)
            setattr(module, name, moved[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))


def count(case: Case) -> dict[str, Any]:
    """The operations of one token in the graph and around it, the bytes of those in the graph, and the floor."""
    inside, around = CountedOperations(), CountedOperations()
    model = policy(case)
    with on_a_fake_gpu(case.weights == "autocast"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        move_to_fake_gpu(model)
        buffers = StaticBuffers()
        buffers.graphs = DirectSteps(inside)
        prompts = [Prompt("", (5,) * case.prompt, row) for row in range(case.groups)]
        params = SamplingParams(case.width, end_token_ids=(1, 2))
        batch = Batch(prompts, case.completions, params, RolloutKey(0, 0), torch.device("cuda"))
        sizes = ([p.token_ids for p in prompts], case.completions, case.width)
        decoder = StaticDecoder(model, *sizes, buffers)
        rows_B = torch.arange(case.groups * case.completions, device="cuda")
        with buffers.linears.in_use(model):
            decoder.prefill()
            decoder.kv_cache.written = case.width - 1
            torch.clear_autocast_cache()  # a captured step finds it empty
            with around:  # a token, as the engine samples it
                token_B, logps_B = decoder.sample(rows_B, *batch.draw_arguments(0, rows_B))
                batch.write(1, rows_B, token_B, logps_B)
                batch.mark_finished(1, rows_B, token_B, None)
    read, written = inside.bytes_read.total(), inside.bytes_written.total()
    least = floor(case)
    return {
        "case": asdict(case),
        "operations": inside.total,
        "operations_around": around.total - inside.total,  # it sees those inside too
        "by_kind": {
            kind: {"operations": n, "read": inside.bytes_read[kind], "written": inside.bytes_written[kind]}
            for kind, n in inside.operations.most_common()
        },
        "by_name": dict(inside.names.most_common()),
        "bytes": read + written,
        "floor_bytes": least,
        "floor_share": least["total"] / (read + written),
    }


def floor(case: Case) -> dict[str, int]:
    """The bytes that a step cannot do without, in bf16: weights, keys and values, logits."""
    shape = case.shape
    weights = 2 * (shape.layers * shape.layer_weights + shape.vocabulary * shape.hidden)  # the head; it is tied
    slots = case.groups * (case.prompt + case.completions * case.width)
    cache = 2 * 2 * shape.layers * shape.kv_width * slots
    logits = 2 * case.groups * case.completions * shape.vocabulary
    return {"weights": weights, "cache": cache, "logits": logits, "total": weights + cache + logits}


def print_table(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one static decoding step: operations, and MB read and written")
    for title in ("model", "weights", "LoRA", "groups x K", "prompt + width"):
        table.add_column(title)
    kinds = sorted({kind for result in results for kind in result["by_kind"]})
    for title in ("operations", "around", *kinds, "MB", "floor MB", "floor share"):
        table.add_column(title, justify="right")
    for result in results:
        case = result["case"]
        by_kind = [result["by_kind"].get(kind, {"operations": 0, "read": 0, "written": 0}) for kind in kinds]
        table.add_row(
            f"{case['model']}",
            case["weights"],
            "all linear" if case["lora"] else "-",
            f"{case['groups']} x {case['completions']}",
            f"{case['prompt']} + {case['width']}",
            str(result["operations"]),
            str(result["operations_around"]),
            *(f"{k['operations']} / {(k['read'] + k['written']) / 1e6:.0f}" for k in by_kind),
            f"{result['bytes'] / 1e6:.0f}",
            f"{result['floor_bytes']['total'] / 1e6:.0f}",
            f"{result['floor_share']:.0%}",
        )
    Console(width=220, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=list(MODELS), default=["qwen2.5-0.5b", "qwen2.5-1.5b"], metavar="NAME")
    add("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    add("--lora", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="adapters on all linear layers")
    add("--groups", type=int, nargs="+", default=[16])
    add("--completions", type=int, nargs="+", default=[4])
    add("--prompt", type=int, nargs="+", default=[128])
    add("--width", type=int, nargs="+", default=[256], help="completion slots that are read, a multiple of 64")
    add("--json", type=Path)
    options = parser.parse_args()
    results = []
    sizes = (options.groups, options.completions, options.prompt, options.width)
    for model, weights, lora, *numbers in product(options.model, options.weights, options.lora, *sizes):
        results.append(count(Case(model, weights, lora == "yes", *numbers)))
    print_table(results)
    if options.json is not None:
        options.json.write_text(json.dumps({"versions": versions(), "steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
