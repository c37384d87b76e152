"""The section `ray` of run files, its settings on the command line, and what `online-dpo ray` starts for them."""

import os

import pytest

from online_dpo.cli.ray import job_of
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.ray_section import split_settings
from online_dpo.cli.runfile.run_file import plan_run
from support.run_files import fill_folder, write_run_file

FEEDBACK = "def score(prompts, completions):\n    return [0.0 for _ in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("run"), FEEDBACK)


def problems(folder, *words, on_cluster=True, **fields):
    path = write_run_file(folder, reward_funcs=["feedback.py:score"], **fields)
    with pytest.raises(UsageError) as caught:
        plan_run(path, words, on_cluster)
    return [problem.replace(str(folder), "") for problem in caught.value.problems]


def plan(folder, *words, on_cluster=True, **fields):
    return plan_run(write_run_file(folder, reward_funcs=["feedback.py:score"], **fields), words, on_cluster)


def test_settings_are_converted_and_those_of_the_command_line_win(folder):
    ray = {"train_gpus": "8", "servers": 2, "server_args": ["--max-model-len", 4096], "placement_timeout": 30}
    settings = plan(folder, "--ray.servers", "3", "--ray.address=auto", ray=ray).ray
    assert (settings.train_gpus, settings.servers, settings.address) == (8, 3, "auto")
    assert settings.server_words == ["--max-model-len", "4096"] and settings.placement_timeout == 30.0


def test_without_a_section_the_command_line_is_enough(folder):
    assert plan(folder, "--ray.train_workers", "2").ray.trainers == 2
    assert plan(folder, "--ray", "{train_workers: 2}").ray.trainers == 2


def test_other_commands_ignore_the_section_but_check_it(folder):
    assert plan(folder, on_cluster=False, ray={"servers": 2}).ray.servers == 2
    assert not plan(folder, on_cluster=False, ray={"servers": 2}).training.get("use_vllm")
    [problem] = problems(folder, on_cluster=False, ray={"server": 2})
    assert problem.endswith(": `ray.server` is not a setting. Did you mean `servers`?")


@pytest.mark.parametrize(
    "ray, message",
    [
        ({}, "`ray.train_gpus` is 0. Give the number of GPUs to train on, or with CPUs alone `ray.train_workers`."),
        ({"train_gpus": 1, "train_workers": 1}, "`ray.train_workers` is given beside `ray.train_gpus`."),
        ({"train_gpus": -1}, "`ray.train_gpus` is -1; wanted: 0 or more."),
        ({"train_gpus": "two"}, "`ray.train_gpus` is 'two'; wanted: a whole number."),
        ({"train_gpus": 1, "max_restarts": -1}, "`ray.max_restarts` is -1; wanted: 0 or more."),
        ({"train_gpus": 1, "placement_timeout": 0}, "`ray.placement_timeout` is 0; wanted: a number of seconds"),
        ({"train_gpus": 1, "address": "ray://h:10001"}, "a run is not started through Ray's client."),
        ({"train_gpus": 1, "env_vars": ["A=b"]}, "`ray.env_vars` has 'A=b'; wanted: names of variables"),
        ({"train_gpus": 1, "server_args": ["--port", 1]}, "`ray.server_args` has `--port`, which is chosen for each"),
        ({"train_gpus": 1, "server_args": ["model"]}, "`ray.server_args` begins with 'model'; the model is the run's."),
        ({"train_workers": 1, "cpus_per_trainer": 0}, "`ray.cpus_per_trainer` is 0; wanted: 1 or more"),
        ({"train_workers": 1, "servers": 1, "cpus_per_server": 0}, "`ray.cpus_per_server` is 0; wanted: 1 or more"),
        (5, "`ray` is 5; wanted: a mapping"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(folder, ray, message):
    found = problems(folder, ray=ray)
    assert any(message in problem for problem in found), found
    assert all(problem.startswith("/run.yaml") for problem in found), found


def test_words_that_are_no_mapping_are_told(folder):
    assert any("command line: `ray`" in problem for problem in problems(folder, "--ray", "{a: [", on_cluster=False))


def test_servers_of_the_run_and_servers_of_ray_contradict_each_other(folder):
    ray = {"train_workers": 1, "servers": 1}
    for field in ({"vllm_server_base_url": "http://h:1"}, {"engine": "transformers"}):
        [problem] = problems(folder, ray=ray, **field)
        assert f"`{next(iter(field))}` is given beside `ray.servers`" in problem
    assert plan(folder, ray=ray, engine="vllm_server").ray.servers == 1


def test_the_settings_do_not_reach_the_processes_that_train():
    words = ["--max_steps", "5", "--ray.servers", "2", "--ray.env_vars", "A", "B", "--beta=0.1", "--bf16"]
    assert split_settings(words)[0] == ["--max_steps", "5", "--beta=0.1", "--bf16"]


def test_a_job_has_whole_paths_and_a_key_for_its_servers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("MY_TOKEN", "m")
    ray = {"train_workers": 2, "servers": 1, "env_vars": ["MY_TOKEN"]}
    write_run_file(folder, reward_funcs=["feedback.py:score"], ray=ray)
    words = ["run.yaml", "--max_steps", "3", "--ray.max_restarts", "1"]
    job = job_of(plan(folder, *words[1:], ray=ray), words)
    assert job.run_file == folder / "run.yaml" and job.model == str(folder / "policy")
    assert job.words == ["--max_steps", "3"] and job.folder == os.getcwd()
    assert set(job.paths) == {str(folder / name) for name in ("run.yaml", "policy", "data.jsonl")}
    assert job.variables["MY_TOKEN"] == "m" and len(job.variables["VLLM_API_KEY"]) > 30
    assert job.variables["ONLINE_DPO_STARTED_AS"] == "ray run.yaml --max_steps 3 --ray.max_restarts 1"
    assert job.needs.world_size == 2


@pytest.mark.parametrize("sharded", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 3}}}])
def test_a_run_on_a_cluster_may_be_sharded_over_its_processes(folder, sharded):
    """The process that plans it is alone; those that train are not."""
    run_file = write_run_file(folder, reward_funcs="feedback.py:score", ray={"train_workers": 2}, **sharded)
    assert plan_run(run_file, [], on_cluster=True).ray.trainers == 2


def test_one_process_of_a_cluster_has_nothing_to_shard(folder):
    run_file = write_run_file(folder, reward_funcs="feedback.py:score", ray={"train_workers": 1}, fsdp="full_shard")
    with pytest.raises(UsageError, match="over several processes, and this is the only one"):
        plan_run(run_file, [], on_cluster=True)
