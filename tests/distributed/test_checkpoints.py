"""Checkpoints of sharded runs: two real processes, resumed by two and by one (architecture, invariant 13)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from online_dpo.checkpoints.choice import newest_whole
from online_dpo.checkpoints.manifest import problem_of
from online_dpo.checkpoints.needed import Needs
from support.processes import environment
from support.ranks import RANKS
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints_worker import CASES, SHARDED, folder  # noqa: E402

WORKER = Path(__file__).with_name("checkpoints_worker.py")
ENVIRONMENT = dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
RUNS = [(way, case) for way in SHARDED for case in CASES]
SINCE_RESUMED = "train/updated_ratio"
"""Compares weights with those of the last log, or with those at the start of the process."""


def started(command, out, *words):
    return subprocess.run(
        [*command, str(WORKER), str(out), *words],
        env=environment(**ENVIRONMENT),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints")
    for command, what in (([sys.executable], "one"), (RANKS, "two"), ([sys.executable], "back")):
        done = started(command, out, what)
        assert done.returncode == 0, done.stderr[-6000:]
    return out


def load(out, name, rank=0):
    return torch.load(out / f"{name}-rank-{rank}.pt")


def logged(saved):
    return [{name: value for name, value in log.items() if name != SINCE_RESUMED} for log in saved["log"]]


@pytest.mark.parametrize(("way", "case"), RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(out, way, case):
    for rank in range(2):
        whole, resumed = load(out, f"{way}-{case}-of-2", rank), load(out, f"{way}-{case}-of-2-from-{way}-of-2", rank)
        for kind in ("weights", "reference"):
            assert whole[kind].keys() == resumed[kind].keys()
            assert all(torch.equal(whole[kind][name], resumed[kind][name]) for name in whole[kind])
        assert logged(whole) == logged(resumed) and len(whole["log"]) == 2


OTHERS = [f"none-{case}-of-1-from-{way}-of-2" for way, case in RUNS]
OTHERS += [f"{way}-full-of-2-from-none-of-1" for way in ("fsdp2", "zero3")] + ["zero1-lora-of-2-from-none-of-1"]
OTHERS += ["zero3-full-of-2-from-fsdp2-of-2", "fsdp2-full-of-2-from-zero2-of-2"]


@pytest.mark.parametrize("name", OTHERS)
def test_another_number_of_processes_or_way_of_sharding_goes_on_with_the_same_run(out, name):
    one, resumed = load(out, f"none-{name.split('-')[1]}-of-1"), load(out, name)
    assert_same(resumed["weights"], one["weights"], 1e-5)
    if one["reference"]:
        assert_same(resumed["reference"], one["reference"], 1e-5)
    for got, expected in zip(logged(resumed), logged(one), strict=True):
        left_out = {"beta"}  # a mean over the steps of each process
        assert {k: v for k, v in got.items() if k not in left_out} == pytest.approx(
            {k: v for k, v in expected.items() if k not in left_out}, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize(("way", "case"), RUNS)
@pytest.mark.parametrize("inside", ["", "checkpoint-4"])
def test_a_plain_folder_holds_the_gathered_weights_exactly(out, way, case, inside):
    place, weights = folder(out, way, case, 2) / inside, load(out, f"{way}-{case}-of-2")["weights"]
    assert (place / "tokenizer_config.json").is_file()
    if case == "full":
        model = AutoModelForCausalLM.from_pretrained(place)
        loaded = dict(model.named_parameters())
        assert (place / "config.json").is_file() and loaded.keys() == weights.keys()
    else:
        found = load_file(place / "adapter_model.safetensors")
        loaded = {name.replace(".weight", ".default.weight"): weight for name, weight in found.items()}
        weights = {name: weight for name, weight in weights.items() if "lora_" in name}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_the_best_checkpoint_is_loaded_and_kept(out, way):
    saved = load(out, f"{way}-best")
    assert saved["best"] == "checkpoint-2" and saved["checkpoints"] == ["checkpoint-2"]
    loaded = AutoModelForCausalLM.from_pretrained(out / "runs" / f"{way}-best" / "checkpoint-2")
    assert all(torch.equal(p, saved["weights"][name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_a_checkpoint_of_the_model_alone_has_no_shards(out, way):
    names = load(out, f"{way}-best")["only"]
    assert "model.safetensors" in names and not [name for name in names if "shard" in name or "scheduler" in name]


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_another_batch_size_is_refused(out, way):
    refused = load(out, f"{way}-best")["refused"]
    assert (
        "per_device_train_batch_size x gradient_accumulation_steps x processes: checkpoint has 8, this run has 4"
        in (refused)
    )


def test_a_model_given_in_fp32_is_saved_in_fp32_where_deepspeed_computes_in_bf16(out):
    saved = load(out, "bf16")
    model = AutoModelForCausalLM.from_pretrained(out / "runs" / "bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, saved["exact"][name])
        assert torch.equal(parameter.bfloat16(), saved["rounded"][name])
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())


KILLED = [("fsdp2", "1", "1"), pytest.param(("zero3", "0", "12"), marks=pytest.mark.slow), ("zero3", "1")]


@pytest.mark.parametrize("words", KILLED, ids="-".join)
def test_a_killed_rank_leaves_a_whole_checkpoint_and_no_broken_one(tmp_path, words):
    done = started(TORCHRUN, tmp_path, "killed", *words)
    run_dir = tmp_path / "runs" / f"{words[0]}-killed"
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
    newest = newest_whole(run_dir, Needs({}, 2)).folder
    assert newest is not None and newest.name == "checkpoint-2", done.stderr[-3000:]
    assert [path.name for path in run_dir.glob("checkpoint-*") if problem_of(path) is not None] == []
