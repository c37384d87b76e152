"""The bytes that two real ranks hold in every mode of sharding are those of the formula, to the last one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from online_dpo.sizing.held import gradient_term, held_terms
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import shape_of
from support.processes import environment
from support.ranks import RANKS

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("deepspeed")
from sizing_worker import CASES, MODELS, RANK  # noqa: E402

WORKER = Path(__file__).with_name("sizing_worker.py")
WAYS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    out = tmp_path_factory.mktemp("sizing") / "rank"
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    done = subprocess.run([*RANKS, str(WORKER), str(out), *WAYS], env=own, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(out.with_name(f"rank-{rank}.json").read_text()) for rank in range(2)]


def predicted(way, kind, adapter, bf16):
    """The formula's terms, and the gradients of one copy."""
    shape = shape_of(MODELS[kind]().config.to_dict())
    plan = Plan(
        shape, "none" if way == "ddp" else way, 2, bf16=bf16, adapter="lora" if adapter else "none", lora_rank=RANK
    )
    return {term.name: term.gpu for term in (*held_terms(plan), gradient_term(plan))}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_bytes_of_a_rank(counted, way, case):
    expected = predicted(way, *case)
    name = " ".join(map(str, (way, *case)))
    most = {term: max(rank[name][term] for rank in counted) for term in counted[0][name]}
    gradients = most.pop("gradients"), expected.pop("gradients")
    assert most == expected
    if way == "ddp":  # its buckets, which are as large again, are not Python's to see
        assert 2 * gradients[0] == gradients[1]
    elif way in ("fsdp2", "zero3"):
        assert gradients[0] == gradients[1]
    elif way == "zero2":  # a weight that two ranks share a part of is kept whole by both
        largest = 4 * MODELS[case[0]]().get_input_embeddings().weight.numel()
        assert gradients[1] - 64 <= gradients[0] <= gradients[1] + largest
    else:  # what is left of the whole once ranks have reduced it
        assert gradients[0] < gradients[1]
