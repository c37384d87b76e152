"""`benchmarks/gpu.py`: a rehearsal of what awaits a GPU, and what it does with parts that fail, hang or are done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_parts import card, kernels, plan, record, wheels  # noqa: E402

import gpu  # noqa: E402

NO_VLLM = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True).returncode != 0


def run(*words, status=0, timeout=900):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
    return done


EACH_KIND = ("card", "tests-graphs", "decoding-0.5b", "kernels", "steady", "head", "memory")
"""What CI rehearses. test_benchmarks.py has the scripts of steps and of TRL, with their tables."""
REHEARSED = [pytest.param([part.name for part in plan.PARTS], id="all", marks=pytest.mark.slow)]
REHEARSED += [pytest.param(EACH_KIND, id="one of each kind")]


@pytest.fixture(scope="module", params=REHEARSED)
def rehearsal(request, tmp_path_factory):
    """The folder of a rehearsal, and the names of its parts."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("rehearsal")
    run("--dry-run", "--out", folder, "--parts", *request.param)
    return folder, request.param


def tables(entry):
    return {table["title"]: table for table in entry["tables"]}


def column(table, name):
    return [row[table["columns"].index(name)] for row in table["rows"]]


def test_every_part_passes_and_all_stands_in_both_files(rehearsal):
    folder, names = rehearsal
    written = json.loads((folder / "gpu-dry-run.json").read_text())
    assert set(written["parts"]) == set(names)
    statuses = {name: entry["status"] for name, entry in written["parts"].items()}
    assert {name for name, status in statuses.items() if status != "ok"} == (
        {"vllm"} & set(names) if NO_VLLM else set()
    )
    assert written["facts"]["dry_run"] and written["facts"]["versions"]["torch"] == torch.__version__
    page = (folder / "gpu-dry-run.md").read_text()
    assert "A rehearsal with tiny models" in page and "Clocks and power are not known" in page
    for part in (one for one in plan.PARTS if one.name in names):
        assert f"\n## {part.name}\n" in page and part.shows in page
    for entry in written["parts"].values():
        for table in entry["tables"]:
            assert f"### {table['title']}" in page and len(table["rows"]) > 0


def test_its_figures_are_plausible(rehearsal):
    parts = json.loads((rehearsal[0] / "gpu-dry-run.json").read_text())["parts"]
    [card] = parts["card"]["tables"]
    assert all(measured > 0 for measured in column(card, "measured"))
    for name in {"decoding-0.5b", "decoding-1.5b"} & set(parts):
        [decoding] = parts[name]["tables"]
        assert column(decoding, "way") == ["static", "dynamic", "generate, static cache", "generate", "static, LoRA"]
        assert all(rate > 0 for rate in column(decoding, "tokens/s"))
        assert all(0 < share <= 1 for share in column(decoding, "share of the limit"))
        assert [graphs > 0 for graphs in column(decoding, "graphs")] == [True, False, False, False, True]
    for name, variant in {"step-0.5b": "lora-gradient-checkpointing", "step-1.5b": "plain"}.items():
        for step in parts.get(name, {"tables": []})["tables"]:
            assert column(step, "variant") == [variant] and 0 < column(step, "share of the matrix rate")[0] <= 1
            assert column(step, "step, s")[0] > 0 and column(step, "reserved, MiB")[0] > 100
    for trl in parts.get("trl-0.5b", {"tables": []})["tables"]:
        assert set(column(trl, "workload")) == {"chat", "chat, TRL with a static cache"} and len(trl["notes"]) == 1
        for row in trl["rows"]:
            assert row[2] > 0 and row[3] > 0
            assert row[4] is None or row[4] == pytest.approx(row[2] / row[3])
    steady = tables(parts["steady"])["4 steps, tiny, one process"]
    assert column(steady, "after step") == [1, 2, 3, 4] and steady["notes"] == []
    assert all(0 < share <= 1 for table in parts["kernels"]["tables"][1:] for share in column(table, "share"))
    [memory] = parts["memory"]["tables"]
    assert column(memory, "/ allocated")[0] == pytest.approx(1, abs=0.3)
    assert "passed" in parts["tests-graphs"]["last_lines"] and "failed" not in parts["tests-graphs"]["last_lines"]
    assert "ours, linear head" in parts["head"]["last_lines"]


def test_what_is_done_is_not_repeated(rehearsal):
    folder, names = rehearsal
    done = run("--dry-run", "--out", folder, "--parts", *names)
    passed = [one.name for one in plan.PARTS if one.name in names and (one.package != "vllm" or not NO_VLLM)]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "done before" in line] == passed
    assert ": at most" not in done.stdout or len(passed) < len(names)
    listed = run("--dry-run", "--out", folder, "--list", "--from", "head").stdout.splitlines()
    names = [part.name for part in plan.PARTS]
    assert [line.split()[0] for line in listed] == names[names.index("head") :]
    assert [" done " in line for line in listed] == [name in passed for name in names[names.index("head") :]]


# --- what can happen to a part ----------------------------------------------------------------------------------------


def part(name, code, read=plan.own_tables, limit=30, **fields):
    """A part that runs this code, in which ``OUT`` is the file to write."""

    def command(setup, out):
        return ["-c", f"OUT = {str(out)!r}\n{code}"]

    return plan.Part(name, f"What {name} shows.", limit, command, read, **fields)


WRITES = """
from pathlib import Path
from gpu_parts.record import table, write_tables
write_tables(Path(OUT), [table("Figures", ["a", "b"], [[1, 0.5]])])
"""
FACTS = {"device": "a card", "dry_run": True, "code": "1", "commit": "2", "versions": {}, "state": "Idle."}


def ran(tmp_path, *parts, facts=FACTS, minutes=5.0, jobs=1):
    kept = record.Record.opened(tmp_path / "gpu.json", facts)
    runner = gpu.Runner(kept, plan.Setup(dry_run=True), minutes)
    runner.run_all([one for one in parts if not kept.is_done(one.name)], jobs)
    return runner, json.loads(kept.path.read_text())["parts"], kept.page.read_text()


def test_a_part_that_fails_or_hangs_is_told_and_the_rest_goes_on(tmp_path):
    waits = "import subprocess, sys, time\n"
    waits += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    waits += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(300)"
    _, parts, page = ran(
        tmp_path,
        part("wrong", "print('so far')\nraise ValueError('what went wrong')"),
        part("late", f"{WRITES}\nprint('half of it', flush=True)\n{waits}", limit=4),
        part("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        part("garbled", "open(OUT, 'w').write('{')"),
        part("elsewhere", "", package="a_package_that_is_nowhere"),
        part("good", WRITES),
    )
    assert {name: entry["status"] for name, entry in parts.items()} == {
        "wrong": "failed",
        "late": "timed out",
        "killed": "failed",
        "garbled": "ok",
        "elsewhere": "not here",
        "good": "ok",
    }
    assert "so far" in page and "ValueError: what went wrong" in page and "It ended with status 1." in page
    assert "half of it" in page and parts["late"]["tables"] == parts["good"]["tables"]
    assert "It ended with status -9." in page and "Its figures cannot be read" in page
    assert "The package a_package_that_is_nowhere is not installed." in page
    with pytest.raises(ProcessLookupError):  # what the late one has started has gone with it
        for _ in range(600):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_the_next_call_goes_on_where_one_stopped(tmp_path):
    parts = [part("one", WRITES), part("two", "raise SystemExit(3)"), part("three", WRITES, limit=1000)]
    runner, found, _ = ran(tmp_path, *parts, minutes=5)
    assert list(found) == ["one", "two"] and runner.left == ["three"], "half of its limit is not left"
    parts[1] = part("two", WRITES)
    for one in ("one", "two"):
        found[one]["seconds"] = 12345.0
    (tmp_path / "gpu.json").write_text(json.dumps({"facts": FACTS, "parts": found}))
    _, found, page = ran(tmp_path, *parts, minutes=60)
    assert {name: entry["status"] for name, entry in found.items()} == dict.fromkeys(("one", "two", "three"), "ok")
    assert found["one"]["seconds"] == 12345.0 and found["two"]["seconds"] < 100, "only what had passed was left alone"
    assert "Measured with other code" not in page
    _, found, page = ran(tmp_path, parts[0], facts=FACTS | {"code": "3", "commit": "4"})
    assert found["one"]["seconds"] < 100 and found["one"]["code"] == "3"
    assert page.count("Measured with other code: commit 2 (code 1).") == 2, "those of the older code say so"


def test_a_signal_ends_what_runs_and_keeps_what_is_there(tmp_path):
    words = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path), "--parts", "card", "steady"]
    process = subprocess.Popen([*words, "--jobs", "1"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while "steady: at most" not in (line := process.stdout.readline()):
        assert line, "it ended too early"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    process.stdout.close()
    parts = json.loads((tmp_path / "gpu-dry-run.json").read_text())["parts"]
    assert parts["card"]["status"] == "ok" and parts["steady"]["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "nothing"], "there is no part 'nothing'; there are card,"),
        (["--from", "nothing"], "there is no part 'nothing'"),
        (["--minutes", "0"], "must be above 0"),
        (["--jobs", "2"], "--jobs is for dry runs"),
        (["--jobs", "0", "--dry-run"], "--minutes and --jobs must be above 0"),
        (["--wheels", "--installed", "no/such/file"], "there is no such file"),
    ],
)
def test_wrong_options_are_refused_in_a_line(words, message):
    assert message in run(*words, status=2).stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_it_says_what_can_be_done():
    assert "--dry-run goes through all parts on a CPU" in run(status=2).stderr


def test_what_stands_in_the_first_25_minutes():
    limits, first = 0.0, []
    for one in plan.PARTS:
        limits += one.limit
        if limits <= 60 * gpu.MINUTES:
            first.append(one.name)
    assert {
        "card",
        "tests-graphs",
        "tests-attention",
        "tests-training",
        "decoding-0.5b",
        "step-0.5b",
        "trl-0.5b",
    } <= set(first)
    assert all(one.limit <= 600 for one in plan.PARTS), "a call of ten minutes can hold any of them"


# --- tests for a GPU, wheels, tables ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_tests_for_a_gpu_are_collected_and_skipped_with_a_reason():
    words = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    assert "needs a CUDA device" in done.stdout and "skipped" in last and "passed" not in last and "error" not in last


def pins(name):
    return wheels.read_versions((ROOT / name).read_text().splitlines())


def test_wheels_for_an_image_that_has_torch_and_transformers(tmp_path):
    """With its versions, and with all that is needed beside what it has."""
    there = {name: pins("constraints-oldest.txt")[name] for name in ("torch", "transformers", "numpy", "packaging")}
    (tmp_path / "image.txt").write_text("\n".join(f"{name}=={version}" for name, version in there.items()) + "\n-e .\n")
    done = run("--wheels", "--installed", tmp_path / "image.txt", "--python", "3.12")
    carried = wheels.read_versions(done.stdout.splitlines())
    assert len(carried) == len(done.stdout.splitlines())
    assert not set(carried) & {*there, "triton", "online-dpo", "vllm", "nvidia-cublas"}
    assert {"accelerate", "datasets", "trl", "peft", "rich", "pytest", "nvidia-ml-py", "pyarrow", "psutil"} <= set(
        carried
    )
    pinned = pins("constraints-oldest.txt")
    assert all(version == pinned[name] for name, version in carried.items() if name in pinned)
    assert "commonmark" in carried, "which rich 13.0 needs, and the rich of a newer environment does not"
    assert "--python-version 3.12" in done.stderr


def test_wheels_where_everything_is_there_and_where_a_version_is_too_old(tmp_path):
    assert run("--wheels").stdout == ""
    pinned = pins("constraints-oldest.txt") | {"datasets": "2.0.0", "torch": "2.5.0"}
    (tmp_path / "image.txt").write_text("\n".join(f"{name}=={version}" for name, version in pinned.items()))
    done = run("--wheels", "--installed", tmp_path / "image.txt")
    carried = wheels.read_versions(done.stdout.splitlines())
    assert carried["datasets"] == pins("constraints-oldest.txt")["datasets"] and "torch" not in carried
    assert "datasets 2.0.0 is there, and datasets" in done.stderr and "datasets<6,>=4.7" in done.stderr
    assert "torch is not carried: take an image with one that pyproject.toml allows." in done.stderr


def test_the_newer_pins_are_for_a_newer_transformers():
    for version, name in (("5.17.0", "constraints-oldest.txt"), ("5.19.0", "constraints-oldest.txt")):
        assert wheels.constraints_for({"transformers": version})[0] == name
    newest = pins("constraints.txt")["transformers"]
    assert wheels.constraints_for({"transformers": newest})[0] == "constraints.txt"


def test_what_failed_stands_in_the_tables():
    """A side of the comparison and a row of the steps without figures."""
    figures = {
        "failed": {"trl": "the worker stopped:\ntorch.OutOfMemoryError: CUDA out of memory"},
        "ours": {"step": {"median": 2.0}, "generate": {"median": 1.0}},
        **{key: {"ours": 10.0} for key in ("allocated_mib", "reserved_mib", "limit_share")},
    }
    shared = {"model": "m", "prompts": 8, "matrix_rate_gflops": 5e5}
    [trl] = plan.trl_tables(shared | {"workloads": {"chat": figures}})
    assert trl["notes"][1:] == ["chat: trl has failed: torch.OutOfMemoryError: CUDA out of memory"]
    assert trl["rows"][0] == ["chat", "step, s", None, 2.0, None]
    [step] = plan.step_tables(shared | {"workloads": {"chat": {"lora": {"failed": "first\nlast\n"}}}})
    assert step["rows"][0][:2] == ["lora", None] and step["notes"][1:] == ["lora has failed: last"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("triton_poi_fused_mul_1", "compiled"),
        ("vectorized_elementwise_kernel", "elementwise and others"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert kernels.kind_of(name) == kind


class FakeNvml:
    """What NVIDIA's library says of an H100 at work."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    ANSWERS = dict(
        nvmlInit=None,
        nvmlDeviceGetHandleByIndex="handle 3",
        nvmlSystemGetDriverVersion="580.65",
        nvmlDeviceGetName="NVIDIA H100 80GB HBM3",
        nvmlDeviceGetPowerUsage=693_000,
        nvmlDeviceGetPowerManagementLimit=700_000,
        nvmlDeviceGetTemperature=61,
        nvmlDeviceGetPerformanceState=0,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x5,
        nvmlDeviceGetMemoryInfo=SimpleNamespace(used=2**30),
        nvmlDeviceGetMemoryBusWidth=5120,
    )

    def __init__(self):
        self.asked = []

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):  # noqa: N802
        return {1: 1980, 2: 2619}[kind]

    def __getattr__(self, name):
        return lambda *given: (self.asked.append((name, given)), self.ANSWERS[name])[1]


def test_what_is_told_of_a_card(monkeypatch):
    """Its nominal bandwidth is two transfers a clock over its bus: 3.35 TB/s, as its data sheet says."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert card.card_name() == "NVIDIA H100 80GB HBM3" and ("nvmlDeviceGetHandleByIndex", (3,)) in fake.asked
    assert card.nominal_bandwidth() == pytest.approx(3352, abs=1)
    assert card.card_state() == (
        693.0,
        "Driver 580.65, P0, SM clock 1755 of 1980 MHz, memory clock 2619 of 2619 MHz, 693 of 700 W, 61 degrees, "
        "1024 MiB in use; slowed down by power limit.",
    )


def test_a_call_on_a_card(monkeypatch, tmp_path, capsys):
    """Parts see the first card only, unless they need two, which are then counted; the files have the card's name."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sees = (
        "import os\nprint('it sees', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('OMP_NUM_THREADS', 'all'))"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    parts = (part("one", f"{WRITES}\n{sees}", plan.no_tables), part("both", sees, cards=2), part("bad", "1 / 0"))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 1, "a part has failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-nvidia-h100-80gb-hbm3.json",
        "gpu-nvidia-h100-80gb-hbm3.md",
    ]
    page = (tmp_path / "gpu-nvidia-h100-80gb-hbm3.md").read_text()
    assert page.startswith("# NVIDIA H100 80GB HBM3") and "rehearsal" not in page and "P0, SM clock 1755" in page
    assert "it sees 0 all" in page and "It needs 2 cards, and 1 can be used." in page
    assert "ZeroDivisionError" in page and "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu, "PARTS", parts[:2])
    assert gpu.main() == 0
    assert "it sees None" in (tmp_path / "gpu-nvidia-h100-80gb-hbm3.md").read_text()
    assert "one: done before" in capsys.readouterr().out


def test_only_kernels_count_on_a_card():
    """The same time stands at the operation of the host that has launched a kernel."""
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key, kind, on_device, on_host):
        return SimpleNamespace(
            key=key, count=2, device_type=kind, self_device_time_total=on_device, self_cpu_time_total=on_host
        )

    seen = [event("gemm", device, 3e6, 0.0), event("aten::mm", host, 3e6, 1e6), event("flash", device, 5e6, 0.0)]
    profile = SimpleNamespace(key_averages=lambda: seen)
    assert kernels.profiled(profile, "cuda") == [("flash", 2, 5.0), ("gemm", 2, 3.0)]
    assert kernels.profiled(profile, "cpu") == [("aten::mm", 2, 1.0)]


def test_every_part_is_in_the_list_of_what_awaits_a_gpu():
    page = (ROOT / "docs/project/gpu.md").read_text()
    assert all(f"`{one.name}`" in page for one in plan.PARTS)
