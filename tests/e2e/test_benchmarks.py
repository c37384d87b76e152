"""The benchmarks run, what they write is consistent, and their figures mean what they say."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from online_dpo.rollout.builtin import engine
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Prompt
from support.busy import soon

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import measure  # noqa: E402
import memory_estimate  # noqa: E402
import trainers  # noqa: E402
import vs_trl  # noqa: E402
import workloads  # noqa: E402
from gpu_parts import plan  # noqa: E402
from worker import Worker, WorkerFailed  # noqa: E402

TINY = ("--model", "tiny", "--repetitions", "1", "--threads", "1", "--workload", "chat")
PARTS = (*measure.PHASES, "other")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(script, *words, status=0):
    command = [sys.executable, *script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=900)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def assert_parts_make_up_the_step(seconds, within):
    parts = sum(seconds[part]["median"] for part in PARTS)
    step = seconds["step"]["median"]
    assert parts == pytest.approx(step, rel=within)
    assert seconds["non_generation"]["median"] == pytest.approx(step - seconds["generate"]["median"], rel=within)
    for phase in seconds.values():
        assert 0 < phase["min"] <= phase["median"] <= phase["max"]


def test_comparison_with_trl(tmp_path):
    pytest.importorskip("trl")
    done = run(["benchmarks/vs_trl.py"], *TINY, "--json", tmp_path / "result.json")
    assert "chat" in done.stdout and "TRL / ours" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model"] == "tiny" and result["matrix_rate_gflops"] > 1 and result["device"]
    assert result["versions"]["torch"] == torch.__version__ and "--model tiny" in result["command"]

    (figures,) = result["workloads"].values()
    for side in ("ours", "trl"):
        assert_parts_make_up_the_step(figures[side], within=0.01)
        assert figures["peak_mib"][side] > 0 and figures["baseline_mib"][side] > 100
        assert 0 < figures["limit_share"][side] < 1
    assert set(figures["speedup"]) == {"step", "non_generation", *measure.PHASES}
    for phase, speedup in figures["speedup"].items():
        assert speedup == pytest.approx(figures["trl"][phase]["median"] / figures["ours"][phase]["median"])
    assert figures["memory_ratio"] == pytest.approx(figures["peak_mib"]["ours"] / figures["peak_mib"]["trl"])
    assert figures["memory_ratio_non_generation"] > 0
    assert figures["useful_gflop"] == figures["useful_gflop_trl"] > 0
    [table] = plan.trl_tables(result)
    assert {row[0] for row in table["rows"]} == {"chat"}
    for _, _, trl, ours, ratio in table["rows"]:
        assert trl > 0 and ours > 0 and (ratio is None or ratio == pytest.approx(trl / ours))


def job(side, **fields):
    shared = dict(workload="chat", model="tiny", device="cpu", dtype="float32", threads=1, steps=2, prompts=2)
    return trainers.Job(side=side, **(shared | fields))


def is_alive(worker):
    return worker._process.poll() is None


def test_one_side_ends_before_the_next_begins_and_one_that_fails_leaves_the_others(monkeypatch, capsys):
    """The process of a side has gone, with all that it held, before that of the next one is started."""
    begun, alive = [], []

    class Watched(Worker):
        def __init__(self, *args):
            alive.append([is_alive(worker) for worker in begun])
            super().__init__(*args)
            begun.append(self)

    monkeypatch.setattr(vs_trl, "Worker", Watched)
    jobs = {"trl, dynamic": job("trl", model="no such model"), "ours": job("ours")}
    stages = list(vs_trl.run_sides(jobs, 0, vs_trl.ONE_AFTER_THE_OTHER))
    assert alive == [[], [False]] and not any(map(is_alive, begun))
    assert [list(measured) for measured, _ in stages] == [list(jobs)[:1], list(jobs)]
    measured, rate = stages[-1]
    assert "KeyError: 'no such model'" in measured["trl, dynamic"].failure and rate > 0
    assert "KeyError: 'no such model'" in capsys.readouterr().err
    assert measured["ours"].memory["reserved"] >= measured["ours"].memory["allocated"] > 100
    assert len(measured["ours"].facts["weights"]) == 2 and measured["ours"].facts["used_mib"] == 0


def step_of(rows=(0, 1), lengths=((5, 7), (6, 2))):
    seconds = dict.fromkeys((*PARTS, "non_generation", "step"), 1.0)
    memory = dict.fromkeys(("baseline", "generation", "non_generation", "step", "allocated", "reserved"), 100.0)
    both = dict(rows=list(rows), lengths=[list(pair) for pair in lengths], trained=[list(pair) for pair in lengths])
    return both | {"seconds": seconds, "memory": memory}


def side_of(weights=1.0, used=0.0, **step):
    return vs_trl.Measured({"weights": [weights], "used_mib": used}, [step_of(**step)] * 3)


def test_a_side_without_figures_is_told_beside_those_of_the_other(capsys):
    measured = {"ours": side_of(), "trl, dynamic": vs_trl.Measured(failure="the worker stopped:\nout of memory")}
    figures = vs_trl.compare("tiny", "chat", measured, "trl, dynamic", 1, 100.0)
    assert figures["failed"] == {"trl": "the worker stopped:\nout of memory"} and "speedup" not in figures
    assert figures["ours"]["step"]["median"] == 1.0 and figures["reserved_mib"] == {"ours": 100.0}
    assert (
        figures["useful_gflop"] > 0 and figures["useful_gflop_trl"] is None and set(figures["limit_share"]) == {"ours"}
    )
    vs_trl.print_comparison("chat", figures)
    assert "TRL has failed: the worker stopped:\nout of memory" in capsys.readouterr().out


def test_sides_that_did_not_do_the_same_work_are_no_comparison(capsys):
    vs_trl.check_same_work({"a": side_of(), "b": side_of(), "c": vs_trl.Measured(failure="?")})
    vs_trl.check_same_work({"a": side_of(lengths=((5, 7, 9), (6, 2, 1))), "b": side_of()})  # K above two
    for other, message in (
        (side_of(weights=2.0), "different weights"),
        (side_of(rows=(0, 2)), "different prompts"),
        (side_of(lengths=((5, 7), (6, 3))), "different lengths"),
    ):
        with pytest.raises(AssertionError, match=message):
            vs_trl.check_same_work({"a": side_of(), "b": other})
    assert capsys.readouterr().err == ""
    vs_trl.check_same_work({"a": side_of(used=500.0), "b": side_of(used=5000.0)})
    assert "5000 MiB of the card were in use at a start" in capsys.readouterr().err


def test_a_worker_that_takes_too_long_is_killed():
    with Worker(job("ours"), limit=0.5) as worker, pytest.raises(WorkerFailed, match="took more than 0 s|0.5 s"):
        worker.ready()
    assert not is_alive(worker)


class FakeCuda:
    """A card of which only the allocator's figures are read."""

    def __init__(self):
        self.calls, self.live, self.peak, self.kept = [], 10, 10, 16

    def __getattr__(self, name):
        self.calls.append(name)
        answers = dict(memory_allocated=self.live, max_memory_allocated=self.peak, max_memory_reserved=self.kept)
        answers |= dict(mem_get_info=(60 * 2**20, 100 * 2**20))
        return lambda: answers[name] * 2**20 if name in answers and name != "mem_get_info" else answers.get(name)


def test_memory_on_a_card_is_that_of_its_allocator(monkeypatch):
    """Live bytes by part, and what is reserved for the whole step; waiting for the card before each is read."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    meter = measure.MemoryMeter("cuda")
    meter.start()
    assert fake.calls[:2] == ["empty_cache", "synchronize"] and fake.calls[-1] == "reset_peak_memory_stats"
    fake.peak, fake.kept = 25, 40
    meter.boundary("generation")
    fake.peak, fake.kept = 30, 32
    assert meter.stop() == dict(baseline=10, generation=15, non_generation=20, step=20, allocated=30, reserved=40)
    assert measure.device_used_mib("cuda") == 40 and measure.device_used_mib("cpu") == 0


def test_a_worker_on_a_card_sees_one_card(monkeypatch):
    """With two in sight, Trainer would share each batch among them."""
    for given, expected in ((None, "0"), ("3,1", "3")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with Worker(job("ours", device="cuda")) as worker:
            told = Path(f"/proc/{worker._process.pid}/environ")
            soon(told.read_text)  # the kernel shows none for a moment, and none of a process that has ended
            environment = told.read_text().split("\0")
            worker._process.kill()
        assert f"CUDA_VISIBLE_DEVICES={expected}" in environment


def test_our_own_step_under_options(tmp_path):
    pytest.importorskip("peft")
    variants = ("plain", "lora-gradient-checkpointing")
    done = run(["benchmarks/step.py"], *TINY, "--variant", *variants, "--json", tmp_path / "result.json")
    rows = json.loads((tmp_path / "result.json").read_text())["workloads"]["chat"]
    assert set(rows) == set(variants) and all(name in done.stdout for name in variants)
    for row in rows.values():
        assert_parts_make_up_the_step(row["seconds"], within=0.01)
        assert row["models_mib"] > 100 and row["peak_mib"] > row["kept_mib"] and 0 < row["limit_share"] < 1
    [table] = plan.step_tables(json.loads((tmp_path / "result.json").read_text()))
    assert [row[0] for row in table["rows"]] == list(variants) and all(min(row[1:]) > 0 for row in table["rows"])
    assert rows["plain"]["useful_gflop"] > rows["lora-gradient-checkpointing"]["useful_gflop"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workload", "nothing"], "invalid choice: 'nothing'"),
        (["--model", "nothing"], "invalid choice: 'nothing'"),
        (["--json", "no/such/folder/x.json"], "its folder must exist"),
        (["--repetitions", "0"], "--repetitions must be between"),
        (["--prompts", "81", "--repetitions", "3"], "--prompts must be between 1 and 80"),
        (["--limit", "0"], "--limit must be above 0"),
    ],
)
def test_wrong_options_are_refused_in_a_line(words, message):
    assert message in run(["benchmarks/vs_trl.py"], *words, status=2).stderr.splitlines()[-1]


def test_variants_for_a_gpu_are_refused_by_name_on_a_cpu():
    done = run(["benchmarks/step.py"], "--variant", "flex-attention", status=2)
    assert done.stderr == "step.py: error: --variant flex-attention: it differs from the plain one on a GPU only\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none():
    for script in ("vs_trl.py", "step.py"):
        done = run([f"benchmarks/{script}"], "--device", "cuda", status=2)
        assert done.stderr == f"{script}: error: --device cuda: torch finds no CUDA device here\n"


def test_without_trl_it_says_how_to_install_it():
    hide = "import runpy, sys; sys.modules['trl'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, 'benchmarks'); "
    done = run(["-c", hide + "runpy.run_path(sys.argv[0], run_name='__main__')"], "benchmarks/vs_trl.py", status=2)
    assert done.stderr == "vs_trl.py: error: trl is not installed: pip install 'online-dpo[bench]'\n"


# --- what the figures mean -------------------------------------------------------------------------------------------


def test_work_of_a_hand_computed_group():
    shape = workloads.Shape(hidden=4, layers=2, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    assert shape.layer_weights == 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8 == 144
    # Prompt of 2 tokens, completions of 1 and 3: 6 tokens; they see 1+2, 3, and 3+4+5 tokens.
    layers, attention, head = 2 * 2 * 144 * 6, 4 * 2 * 4 * (3 + 3 + 12), 2 * 4 * 10 * 4
    assert measure.group_forward_flop(shape, 2, [1, 3], head=True) == layers + attention + head
    assert measure.group_forward_flop(shape, 2, [1, 3], head=False) == layers + attention
    # Policy three times and reference once over the pair; the reward model over all three completions.
    third = 2 * 2 * 144 * 2 + 4 * 2 * 4 * (3 + 4)
    expected = 4 * (layers + attention + head) + layers + attention + third
    assert measure.useful_gflop(shape, [2], [[1, 2, 3]], [[1, 3]], passes=3) == pytest.approx(expected / 1e9)


def test_phases_do_not_count_twice(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    timer = measure.PhaseTimer(lambda: None)
    with timer.phase("policy_forward"), timer.phase("reference"):
        pass
    seconds = timer.stop()
    assert seconds["policy_forward"] == 2 + 8 and seconds["reference"] == 4 and seconds["other"] == 1 + 16
    assert seconds["step"] == seconds["non_generation"] == 31


def test_memory_meter_sees_what_was_there_for_a_moment_only():
    meter = measure.MemoryMeter("cpu")
    meter.start()
    torch.ones(10 * 2**20)  # 40 MiB
    meter.boundary("generation")
    torch.ones(20 * 2**20)
    peak = meter.stop()
    assert 38 <= peak["generation"] < 60 and 78 <= peak["non_generation"] < 110
    assert peak["step"] == peak["non_generation"]


@pytest.mark.parametrize("name", list(workloads.KINDS))
def test_workloads_are_the_same_every_time_and_survive_the_tokenizer(name):
    shape, kind = workloads.MODELS["tiny"], workloads.KINDS[name]
    made = workloads.make_workload(name, shape.vocabulary, steps=2)
    longer = workloads.make_workload(name, shape.vocabulary, steps=3)
    assert longer.prompts[:16] == made.prompts and longer.lengths[:16] == made.lengths
    assert [made.row_of(ids[-1]) for ids in made.prompts] == list(range(16))
    assert workloads.make_tokenizer(shape)(made.texts())["input_ids"] == made.prompts
    assert all(kind.shortest_prompt <= len(ids) <= kind.longest_prompt for ids in made.prompts)
    assert all(2 <= length <= kind.max_new_tokens for lengths in made.lengths for length in lengths)


def test_long_answers_are_around_half_of_the_maximum_and_a_fifth_reach_it():
    made = workloads.make_workload("long-answer", 1000, workloads.MOST_STEPS)
    lengths = [length for row in made.lengths for length in row]
    assert statistics.median(lengths) == pytest.approx(256, rel=0.1)
    assert 0.15 < lengths.count(512) / len(lengths) < 0.25


def test_both_trainers_sample_the_lengths_asked_for(monkeypatch):
    shape = workloads.MODELS["tiny"]
    made = workloads.make_workload("chat", shape.vocabulary, steps=1)
    made.lengths[3][0], made.lengths[5][1] = 64, 2
    policy, tokenizer = workloads.make_policy(shape, "cpu"), workloads.make_tokenizer(shape)

    monkeypatch.setattr(engine, "Batch", engine.Batch)  # put back afterwards
    trainers.force_our_lengths(made)
    prompts = [Prompt(text, tuple(ids), row) for row, (text, ids) in enumerate(zip(made.texts(), made.prompts))]  # noqa: B905
    params = SamplingParams(max_new_tokens=64, end_token_ids=(workloads.EOS,))
    groups = TransformersEngine(policy, tokenizer).generate(prompts, 3, params, RolloutKey(0, 0))
    ours = [[len(completion.token_ids) for completion in group.completions] for group in groups]
    assert ours == [lengths[:3] for lengths in made.lengths]
    assert groups[3].completions[0].finish_reason == "length" and groups[5].completions[1].finish_reason == "stop"
    for completion in (completion for group in groups for completion in group.completions):
        assert all(token >= workloads.FIRST_RESERVED for token in completion.token_ids[:-1])
        ended = completion.token_ids[-1] == workloads.EOS
        assert ended == (completion.finish_reason == "stop")

    trainers.force_trl_lengths(policy, made)
    encoded = tokenizer(made.texts(), return_tensors="pt", padding=True)
    sampled_BT = policy.generate(
        input_ids=encoded["input_ids"].repeat(2, 1),
        attention_mask=encoded["attention_mask"].repeat(2, 1),
        max_new_tokens=64,
        do_sample=True,
    )[:, encoded["input_ids"].shape[1] :]
    theirs = [row.index(workloads.EOS) + 1 if workloads.EOS in row else 64 for row in sampled_BT.tolist()]
    assert theirs == [lengths[sample] for sample in range(2) for lengths in made.lengths]


def test_sampling_alone(tmp_path):
    sizes = ("--prompts", 2, "--completions", 3, "--prompt", 16, "--new", 8, 12, "--repetitions", 1)
    names = ("built-in", "built-in-static", "generate")
    words = ("--model", "tiny", "--engine", *names, *sizes, "--json", tmp_path / "rollout.json")
    done = run(["benchmarks/rollout.py"], *words)
    assert "built-in" in done.stdout and "share of the limit" in done.stdout
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert result["bandwidth_gbs"] > 0.1 and "rollout.py --model tiny" in result["command"]
    assert [(r["engine"], r["new_tokens"]) for r in result["rows"]] == [
        (engine, new) for engine in names for new in (8, 12)
    ]
    for row in result["rows"]:
        tokens = row["tokens_per_second"] * row["seconds"]
        assert tokens == pytest.approx(2 * 3 * row["new_tokens"], rel=0.2)  # a few end of themselves
        assert 0 < row["limit_share"] < 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--prompt", "4000", "--new", "200"), "together must be at most 4096"),
        (("--completions", "0"), "at least 1"),
        (("--engine", "vllm"), "vllm is not installed here"),
        (("--json", "/no/such/folder/x.json"), "its folder must exist"),
    ],
)
def test_sampling_alone_refuses(words, message):
    assert message in run(["benchmarks/rollout.py"], *words, status=2).stderr


def test_memory_against_its_estimate(tmp_path):
    job = ("--model", "tiny", "--workload", "chat", "--way", "one process", "--mode", "held")
    done = run(["benchmarks/memory_estimate.py"], *job, "--json", tmp_path / "memory.json")
    result = json.loads((tmp_path / "memory.json").read_text())
    [row] = result["rows"]
    assert row["ratio"] == pytest.approx(1, abs=0.2) and row["peak"] == pytest.approx(row["libraries"], rel=0.1)
    again = run(["benchmarks/memory_estimate.py"], "--measured", tmp_path / "memory.json")
    assert again.stdout == done.stdout


def test_the_estimate_of_memory_holds_for_what_was_measured():
    """A process as it is, libraries and what glibc keeps included (docs/guides/several-gpus.md: an exception)."""
    rows = json.loads((ROOT / "benchmarks/results/memory-cpu.json").read_text())["rows"]
    ratios = {
        (row["workload"], row["way"]): memory_estimate.estimate(row)["peak"] / row["peak"]
        for row in rows
        if row["measured"] == "held"
    }
    assert {names for names, ratio in ratios.items() if not 0.8 <= ratio <= 1.2} == {("long-answer", "FSDP2")}
