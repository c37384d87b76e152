"""The ways in which people start a sharded run, each by its real command with two processes on CPUs: all train the
weights of one process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import environment, free_port, run_python
from support.ranks import RANKS
from support.run_files import fill_folder, write_run_file

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
FEEDBACK = "def count_w1(prompts, completions, **kwargs):\n    return [float(c.count('w1')) for c in completions]\n"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
TRAIN = ("-m", "online_dpo", "train")
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
OWN = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = fill_folder(tmp_path_factory.mktemp("start"), FEEDBACK)
    (folder / "ds.json").write_text(json.dumps(ZERO3 | {"gradient_clipping": "auto"}))
    return folder


def run_file(folder, name, **fields):
    options = {
        "reward_funcs": "feedback.py:count_w1",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "gradient_checkpointing": None,
        "output_dir": str(folder / name),
        "num_train_epochs": None,
        "train_sampling_strategy": "sequential",
        **fields,
    }
    return write_run_file(folder, **options).rename(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def one_process(folder):
    done = run_python(*TRAIN, run_file(folder, "one", per_device_train_batch_size=8), env=OWN, timeout=900)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "one" / "model.safetensors")


def assert_trained_as(weights, output):
    trained = load_file(output / "model.safetensors")
    assert trained.keys() >= weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(trained[name], weight, rtol=1e-5, atol=1e-6), name


STARTS = {
    "fsdp on the command line": ({}, ("--fsdp", "full_shard")),
    "fsdp with options": ({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}, ()),
    "a file of DeepSpeed": (
        {"deepspeed": "ds.json"},  # lies beside the run file
        (),
    ),
}


@pytest.mark.parametrize(
    "case", [case if case != "fsdp with options" else pytest.param(case, marks=pytest.mark.slow) for case in STARTS]
)
def test_torchrun(folder, one_process, case):
    fields, words = STARTS[case]
    name = case.replace(" ", "-")
    done = run_python(*TORCHRUN, *TRAIN, run_file(folder, name, **fields), *words, env=OWN, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "  sharding    " + ("ZeRO-3" if "Deep" in case else "FSDP2") + " over 2 processes" in done.stdout + done.stderr
    )
    assert_trained_as(one_process, folder / name)


def launch(config, port, *words):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / f"{config}.yaml")
    command = [str(word) for word in (*launcher, "--num_processes", "2", "--main_process_port", port, *words)]
    return subprocess.Popen(command, env=OWN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),  # as two nodes below
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),  # a part of the next
        "zero3-offload",
    ],
)
def test_ready_file_of_accelerate(folder, one_process, config):
    process = launch(config, free_port(), *TRAIN, run_file(folder, config))
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-3000:]
    assert_trained_as(one_process, folder / config)


def test_two_nodes(folder, one_process):
    file = run_file(folder, "nodes")
    port = free_port()
    nodes = [launch("two_nodes", port, "--machine_rank", rank, *TRAIN, file) for rank in (0, 1)]
    outputs = [node.communicate(timeout=1200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:]
    assert "FSDP2 over 2 processes" in "".join(outputs)
    assert_trained_as(one_process, folder / "nodes")


def test_every_ready_file_is_tried():
    tried = {"fsdp2", "zero1", "zero2", "zero3", "zero3-offload", "two_nodes"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == tried


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """What a script saw on each rank, by how it was launched."""
    out = tmp_path_factory.mktemp("scripts")
    worker = Path(__file__).with_name("start_worker.py")
    # accelerate's launcher with its option that leaves models of all ranks but the first without weights
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for name, variables in {"zero3": {}, "fsdp2": sharded}.items():
        done = run_python(*RANKS[1:], worker, out, name, env=OWN | variables)
        assert done.returncode == 0, done.stderr[-3000:]
    return lambda name, rank: torch.load(out / f"{name}-{rank}.pt")


@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_models_that_a_script_loads_are_whole_on_every_rank(scripts, way, rank):
    seen = scripts(way, rank)
    assert seen["score"] == seen["whole score"]
    assert seen["judged"] == seen["whole judged"]
    assert seen["loaded here"] == seen["whole score"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("model", ["policy", "reference", "scorer 0", "gold scorer 0"])
def test_one_other_value_on_one_rank_is_found_in_every_model(scripts, model, rank):
    assert model in scripts("fsdp2", rank)["other value"][model]
    assert "do not have the same models" in scripts("fsdp2", rank)["other value"][model]


@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_a_sharded_reward_model_gives_the_scores_of_a_whole_one(scripts, way):
    """The first rank has nothing to score."""
    first, second = (scripts(way, rank)["trained"] for rank in range(2))
    assert first["sharded"] and second["sharded"]
    assert first["scores"] == [] and second["scores"] == scripts(way, 1)["whole score"]
    assert first["evaluated"]["eval_objective/scores"] == second["evaluated"]["eval_objective/scores"]
