"""What an H100 is estimated to do with a decoding step and a training step, before the work of this release and now.

    python benchmarks/gpu_estimate.py                              the tables, from the counts that are stored
    python benchmarks/gpu_estimate.py --count                      counts the code as it is, into the same file
    python benchmarks/gpu_estimate.py --page docs/project/performance.md   writes the tables into the page

Nothing is measured: operations and bytes are counted on tensors without a GPU, and divided by the rates below. The
arithmetic, for each kind of operation of a decoding step (products, casts, copies, element by element, ...):

    time = sum over kinds of max(bytes / BANDWIDTH, operations * KERNEL), or what the CPU needs to launch it all if more
    share of bandwidth = bytes that must move / BANDWIDTH / time

A step whose layers are compiled has the same products, and the kernels that Inductor writes (compiled_layers.py) in
place of all other kinds, as one kind. How many bytes these move is not counted: at most those of before, which are
taken.

and for each phase of a training pass:

    time = products / (MATRIX_RATE * PRODUCTS) + attention / (MATRIX_RATE * its kernel's share) + bytes / BANDWIDTH
    share of matrix rate = useful operations / MATRIX_RATE / time
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import head_passes
import torch
from decoding_operations import Case, CountedOperations, count
from measure import versions
from workloads import MODELS, Shape, make_policy

from online_dpo.modeling.logprobs import CHUNK_LOGITS_ELSEWHERE
from online_dpo.training.metrics.work import Tokens

COUNTS = Path(__file__).parent / "results" / "gpu-estimate.json"
KERNELS = Path(__file__).parent / "results" / "compiled-layers.json"
"""python benchmarks/compiled_layers.py --model qwen2.5-0.5b qwen2.5-1.5b --weights autocast --json ..."""
BEGIN = "<!-- estimate: python benchmarks/gpu_estimate.py --page docs/project/performance.md -->"
END = "<!-- end of estimate -->"

# Assumptions. The first two are the card's data sheet (H100 SXM, dense bf16).
BANDWIDTH, MATRIX_RATE = 3.35e12, 990e12
KERNEL = 2e-6
"""Seconds of a small kernel within a graph, start to start: 1.5 to 2.5 us."""
LAUNCH = 5e-6
"""Seconds in which the CPU launches an operation outside a graph, or a whole graph for each 100 of its kernels."""
PRODUCTS = 0.75
"""Share of the matrix rate that cuBLAS reaches with these sizes; 0.65 to 0.8 is usual."""
MASKED_ATTENTION, FLEX_ATTENTION, BACKWARD_ATTENTION = 0.2, 0.35, 0.7
"""Shares of the matrix rate in attention: PyTorch's kernel that takes a mask, FlexAttention; and of either in the
backward pass, which does 2.5 times the operations of the forward pass."""
BLOCK = 128
"""Tokens of a block that FlexAttention skips if it is masked as a whole."""

COMPILED_LAYERS = {"forward": 0.42, "backward": 0.31}
"""Bytes of a layer compiled by Inductor, of those that it moves operation by operation, products and attention apart:
counted once for a layer of 0.5B (75.5 of 181.6 KB a token, and 124 of 406.6), as Inductor's own metrics give them."""

PROMPT, ANSWER, ROWS, PASSES = 128, 512, 14, 4
"""A training step: passes of 14 rows of a prompt and two answers, 16 128 tokens; the optimizer steps after four."""
NAMES = {"qwen2.5-0.5b": "0.5B", "qwen2.5-1.5b": "1.5B"}
CASES = [
    Case(model, lora=lora, groups=groups, completions=4, prompt=128, width=512)
    for model in NAMES
    for groups, lora in ((4, False), (16, False), (64, False), (16, True))
]


# ---------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Step:
    """A decoding step: seconds on the GPU and on the CPU, and its share of the bandwidth."""

    gpu: float
    cpu: float
    floor_bytes: int

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.cpu)

    @property
    def share(self) -> float:
        return self.floor_bytes / BANDWIDTH / self.seconds


def step(counted: dict[str, Any]) -> Step:
    """The step of one count of decoding_operations.py."""
    kinds = counted["by_kind"].values()
    graph = sum(max((kind["read"] + kind["written"]) / BANDWIDTH, kind["operations"] * KERNEL) for kind in kinds)
    around = counted["operations_around"]
    cpu = LAUNCH * (around + counted["operations"] / 100)
    return Step(graph + around * KERNEL, cpu, counted["floor_bytes"]["total"])


def compiled(counted: dict[str, Any], kernels: dict[str, Any]) -> dict[str, Any]:
    """The count of a step whose layers are compiled; its bytes are an upper bound."""
    products = counted["by_kind"]["products"]
    others = [kind for name, kind in counted["by_kind"].items() if name != "products"]
    merged = {"operations": kernels["step"] - products["operations"]}
    merged |= {way: sum(kind[way] for kind in others) for way in ("read", "written")}
    return counted | {"operations": kernels["step"], "by_kind": {"products": products, "compiled": merged}}


def kernels_of(case: Case) -> dict[str, Any]:
    """What compiled_layers.py has counted for a model with or without LoRA."""
    steps = json.loads(KERNELS.read_text())["steps"]
    [found] = [one for one in steps if (one["model"], one["lora"]) == (case.model, case.lora)]
    return found


def times(title: str) -> tuple[str, str]:
    """The titles of two columns."""
    return f"{title}, before", "now"


def header(*titles: str, texts: int) -> Iterator[str]:
    """The first lines of a table, whose first columns are texts."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * texts + "---:|" * (len(titles) - texts)


def decoding_table(counts: dict[str, Any]) -> Iterator[str]:
    def three(title: str) -> tuple[str, ...]:
        return (*times(title), "compiled")

    titles = ("model", "sequences", *three("operations"), *times("MB"), "must move", *three("ms"))
    yield from header(*titles, *three("share of bandwidth"), texts=1)
    for before, now in zip(counts["before"]["decoding"], counts["now"]["decoding"], strict=True):
        case = Case(**now["case"])
        assert before["case"] == now["case"], "both have the same cases"
        all_three = before, now, compiled(now, kernels_of(case))
        name = NAMES[case.model] + (", LoRA" if case.lora else "")
        cells = [
            name,
            f"{case.groups * case.completions}",
            *(f"{one['operations']}" for one in all_three),
            *(f"{one['bytes'] / 1e6:.0f}" for one in (before, now)),
            f"{now['floor_bytes']['total'] / 1e6:.0f}",
            *(f"{step(one).seconds * 1e3:.2f}" for one in all_three),
            *(f"{step(one).share:.0%}" for one in all_three),
        ]
        yield "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Phase:
    """A phase of a pass: operations that are useful, and seconds of products, attention and passes over memory."""

    name: str
    useful: float
    products: float
    attention: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.memory

    @property
    def share(self) -> float:
        return self.useful / MATRIX_RATE / self.seconds


def attended(flex: bool) -> float:
    """Pairs of tokens that attention computes in one row: the whole square, or the blocks that are not masked."""
    if not flex:
        return (PROMPT + 2 * ANSWER) ** 2
    prompt, answer = PROMPT // BLOCK, ANSWER // BLOCK
    blocks = prompt * (prompt + 1) / 2 + 2 * (answer * prompt + answer * (answer + 1) / 2)
    return blocks * BLOCK**2


def phases(shape: Shape, counts: dict[str, Any], flex: bool) -> list[Phase]:
    """The phases of one pass; the optimizer's is its part of a step."""
    group = Tokens.of_group(PROMPT, [ANSWER, ANSWER])
    read, predicted, seen = ROWS * group.read, ROWS * group.predicted, ROWS * group.seen
    body, head = shape.layers * shape.layer_weights, shape.vocabulary * shape.hidden
    width = shape.layers * shape.hidden
    of_layers, of_head = counts["layers"], counts["head"]
    chunks = max(1, round(predicted / (counts["chunk_logits"] / shape.vocabulary)))
    kernel = FLEX_ATTENTION if flex else MASKED_ATTENTION
    pairs = ROWS * attended(flex)

    def memory(direction: str, case: str) -> float:
        layer = of_layers[direction]
        # Of the head: for each logit; and for each weight, of which two chunks were counted.
        logits = of_head[case]["logits"] * predicted * shape.vocabulary
        weight = of_head[case]["weight"] / 2 * chunks * head
        return (shape.layers * (layer["fixed"] + layer["per_token"] * read) + logits + weight) / BANDWIDTH

    def phase(name: str, direction: str, case: str, times: float, done: float) -> Phase:
        forward, square = 2 * body * read + 2 * head * predicted, 4 * width
        rate = kernel * (BACKWARD_ATTENTION if times > 1 else 1)
        return Phase(
            name,
            times * (forward + square * seen),
            (times * 2 * body * read + done * 2 * head * predicted) / (MATRIX_RATE * PRODUCTS),
            (2.5 if times > 1 else 1) * square * pairs / (MATRIX_RATE * rate),
            memory(direction, case),
        )

    parameters = body + head
    return [
        phase("reference", "forward", "log-probabilities alone", 1, 1),
        phase("forward", "forward", "forward, head trained", 1, 1),
        phase("backward", "backward", "backward, head trained", 2, 3),  # the head's logits are computed again
        # AdamW reads weight, gradient and two moments and writes three; gradients are added up and reset.
        Phase("optimizer", 0, 0, 0, (28 / PASSES + 12) * parameters / BANDWIDTH),
    ]


def training_table(counts: dict[str, Any]) -> Iterator[str]:
    titles = ("model", "phase", "useful TFLOP", "products, ms", *times("attention, ms"), *times("passes, ms"))
    yield from header(*titles, *times("all, ms"), *times("share of matrix rate"), texts=2)
    for model, name in NAMES.items():
        shape, now = MODELS[model], of_model(counts["now"], model)
        before_phases = phases(shape, of_model(counts["before"], model), flex=False)
        now_phases = phases(shape, now, flex=True)
        for before, one in zip([*before_phases, whole(before_phases)], [*now_phases, whole(now_phases)], strict=True):
            yield training_row(name, one.name, before, one)
        compiled = whole(phases(shape, with_compiled_layers(now), flex=True))
        yield training_row(name, "the same, if the layers were compiled", None, compiled)


def training_row(model: str, name: str, before: Phase | None, now: Phase) -> str:
    def both(number: Callable[[Phase], str]) -> list[str]:
        return ["" if before is None else number(before), number(now)]

    cells = [
        model,
        name,
        f"{now.useful / 1e12:.1f}" if now.useful else "",
        f"{1e3 * now.products:.1f}",
        *both(lambda one: f"{1e3 * one.attention:.1f}"),
        *both(lambda one: f"{1e3 * one.memory:.1f}"),
        *both(lambda one: f"{1e3 * one.seconds:.1f}"),
        *both(lambda one: f"{one.share:.0%}" if one.useful else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def with_compiled_layers(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts as they would be if the layers were compiled."""
    layers = {
        direction: layer | {"per_token": COMPILED_LAYERS[direction] * layer["per_token"]}
        for direction, layer in counts["layers"].items()
    }
    return counts | {"layers": layers}


def whole(parts: list[Phase]) -> Phase:
    """All phases of a pass together."""
    sums = (sum(getattr(part, name) for part in parts) for name in ("useful", "products", "attention", "memory"))
    return Phase("**a pass**", *sums)


def of_model(counts: dict[str, Any], model: str) -> dict[str, Any]:
    return {"layers": counts["layers"][model], "head": counts["head"], "chunk_logits": counts["chunk_logits"]}


# ---------------------------------------------------------------------------------------------------------- counting


def layer_bytes(model: str) -> dict[str, dict[str, float]]:
    """Bytes that a layer moves apart from its products and attention: for each token, and whatever their number."""

    def counted(layers: int, tokens: int) -> tuple[float, float]:
        shape = replace(MODELS[model], layers=layers, vocabulary=1000)
        policy: Any = make_policy(shape, "cpu").train()
        forward, backward = CountedOperations(), CountedOperations()
        with torch.autocast("cpu", torch.bfloat16), forward:
            hidden_RTH = policy.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)[0]
        with backward:
            hidden_RTH.backward(torch.zeros_like(hidden_RTH))
        both = (forward, backward)
        return tuple(  # pyright: ignore[reportReturnType]
            sum(one.bytes_read[kind] + one.bytes_written[kind] for kind in one.operations if kind != "products")
            for one in both
        )

    few, many = 128, 256
    at = {n: [b - a for a, b in zip(counted(1, n), counted(2, n), strict=True)] for n in (few, many)}
    made = {}
    for index, direction in enumerate(("forward", "backward")):
        per_token = (at[many][index] - at[few][index]) / (many - few)
        made[direction] = {"per_token": per_token, "fixed": at[few][index] - few * per_token}
    return made


def counted_now() -> dict[str, Any]:
    """The counts of the code as it is."""
    return {
        "decoding": [
            {key: one[key] for key in ("case", "operations", "operations_around", "by_kind", "bytes", "floor_bytes")}
            for one in map(count, CASES)
        ],
        "layers": {model: layer_bytes(model) for model in NAMES},
        "head": head_counts(fused=True),
        "chunk_logits": CHUNK_LOGITS_ELSEWHERE,
    }


def head_counts(fused: bool) -> dict[str, dict[str, float]]:
    return {name: asdict(head_passes.moved(fused, **case)) for name, case in head_passes.CASES.items()}


def estimate(counts: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    return "\n".join([*decoding_table(counts), "", *training_table(counts)])


def with_estimate(page: str, counts: dict[str, Any]) -> str:
    """The page with the tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{estimate(counts)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count the code as it is, and store the counts")
    parser.add_argument("--page", type=Path, help="write the tables between this page's marks")
    options = parser.parse_args()
    counts = json.loads(COUNTS.read_text())
    if options.count:
        counts |= {"versions": versions(), "now": counted_now()}
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    if options.page is not None:
        options.page.write_text(with_estimate(options.page.read_text(), counts))
    print(estimate(counts))


if __name__ == "__main__":
    main()
