"""One process that has imported all that a run needs, and forks a child for each run.

``python -m faults.zygote FOLDER`` gets the folder of a model, which it loads once.
It reads requests as lines of JSON from its standard input, and answers each with a line. It starts no thread, makes no
process group and computes no gradient, so that a fork begins as a new process would.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import json
import os
import random
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command does before it imports torch

# beside what `online-dpo train` imports: what it imports while it runs
MODULES = [
    "online_dpo.cli.train",
    "online_dpo.training.trainer",
    "online_dpo.cli.runfile.planning",
    "online_dpo.cli.runfile.run_file",
    "online_dpo.cli.runfile.help",
    "online_dpo.cli.terminal.header",
    "online_dpo.scoring.judges.llm.judge",
    "online_dpo.methods.nash_md",
    "online_dpo.methods.online_dpo",
    "online_dpo.methods.xpo",
    "online_dpo.rollout.builtin.mixture",
    "torch.distributed",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.utils.serialization",
    "torch.optim.adamw",
    "torch._dynamo",
    "datasets.packaged_modules.generator.generator",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.bert.modeling_bert",
    "transformers.integrations.sdpa_attention",
    "openai",
    "tenacity",
    "yaml",
    "peft",
    *filter(find_spec, ["deepspeed"]),  # accelerate asks whether a model is one of its engines, where it is installed
]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # deepspeed prints which accelerator it takes
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        import_module(name)
    from faults.catalogue import all_faults
    from online_dpo.cli.runfile.schema import load_fields

    faults = all_faults()
    load_fields()
    load_model(Path(sys.argv[1]))
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join(5.0)  # of a pool that is closed already
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    print(json.dumps({"ready": len(faults)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(**request["wait"])
        else:
            pid = os.fork()
            if not pid:
                be_the_run(request, faults)
            answer = pid
        print(json.dumps(answer), file=answers, flush=True)


def load_model(folder: Path) -> None:
    """Fills what transformers keeps between two models: how it converts the weights of each family."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from online_dpo.cli.terminal.progress import no_progress_bars

    with no_progress_bars():
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)


def wait(pid: int, seconds: float) -> dict[str, Any] | None:
    """How the child ended; ``None`` if it has not within ``seconds``."""
    until = time.monotonic() + seconds
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return {"code": os.waitstatus_to_exitcode(status), "memory": usage.ru_maxrss}
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def be_the_run(request: dict[str, Any], faults: dict[str, Any]) -> None:
    """Never returns: runs the command as a process of its own would."""
    import torch

    code: Any = 1
    torch.set_num_threads(1)  # it makes its pool anew after a fork: here, before two threads do so at once, which fails
    try:
        become_a_command(request)
        code = run_command(request, faults)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:
        traceback.print_exc()
    os._exit(end_interpreter() or code)


def become_a_command(request: dict[str, Any]) -> None:
    for number, name in enumerate(("/dev/null", request["stdout"], request["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(request["folder"])
    atexit._clear()
    os.environ.update(request["environment"])
    sys.argv = ["online-dpo", *request["words"]]
    random.seed()
    faulthandler.dump_traceback_later(request["limit"], file=open(request["stack"], "w"))  # noqa: SIM115


def run_command(request: dict[str, Any], faults: dict[str, Any]) -> int:
    if request["inject"]:
        from faults.injection import Child

        rank = int(request["environment"].get("RANK", 0))
        faults[request["inject"]].inject(Child(Path(request["folder"]), rank))
    if request["writes"]:
        arm_writes(**request["writes"])
    from online_dpo.cli.process import run

    run()


def arm_writes(below: str, number: int, what: int, error: int, log: str) -> None:
    """Tells `writes.c`, which is preloaded, what to do."""
    ctypes.CDLL(None).faults_arm(below.encode(), ctypes.c_long(number), what, error, log.encode())


def end_interpreter() -> int:
    """What Python does at its end: waits for threads, runs what was registered, writes what is buffered."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError:
        return 120
    return 0


if __name__ == "__main__":
    main()
