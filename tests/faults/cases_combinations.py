"""Streams of csv, prompts of evaluations, judges of one's own, fields of libraries, foreign code in stranger forms."""

from __future__ import annotations

from pathlib import Path

from faults.cases_data import GOOD, lines
from faults.damage import edited_tensors
from faults.harness import ANY, Either, Fault, OneLine, Resumes, Survived, scorer

EVAL = dict(eval_dataset_name="eval.jsonl", eval_strategy="steps", eval_steps=2)


def data(name, ending, to="x.jsonl", content="", **options):
    return Fault("data", name, ending, files={to: content}, options={"dataset_name": to, **options})


def evals(name, ending, content, to="eval.jsonl", **options):
    return Fault("eval data", name, ending, files={to: content}, options=EVAL | {"eval_dataset_name": to} | options)


def fn(name, ending, before="", returns="scores", **options):
    return Fault("reward function", name, ending, files={"feedback.py": scorer(before, returns)}, options=options)


def src(name, ending, source, **options):
    return Fault("reward function", name, ending, files={"feedback.py": source}, options=options)


def judge(name, ending, body, head="def judge(prompt, first, second):", **options):
    return Fault(
        "judge function",
        name,
        ending,
        files={"judge.py": f"import time\n{head}\n    {body}\n"},
        options=dict(reward_funcs=None, judge="judge.py:judge") | options,
    )


def opt(name, ending, **options):
    return Fault("field", name, ending, options=options)


BAD = [*GOOD[:5], {"prompt": None}]


def copied_policy(to, edit=None):
    import shutil

    def prepare(folder: Path):
        shutil.copytree(folder / "policy", folder / to)
        if edit:
            edit(folder)

    return prepare


NANREF = copied_policy(
    "ref", edited_tensors("ref/model.safetensors", lambda t: [x.fill_(float("nan")) for x in t.values()])
)


def loop(folder):
    (folder / "x.jsonl").symlink_to("x.jsonl")


def broken(folder):
    (folder / "x.jsonl").symlink_to("nowhere")


def chat(*m):
    return {"prompt": list(m)}


U = {"role": "user", "content": "w1 w2"}
EACH = [
    data("csv streamed short row", OneLine(2, "x.csv"), "x.csv", "prompt,a\nw1,1\nw2\n", dataset_streaming=True),
    data("csv streamed open quote", OneLine(2, "x.csv"), "x.csv", 'prompt,a\n"w1,1\nw2,2\n', dataset_streaming=True),
    data("csv with mark", Survived(like=ANY), "x.csv", "\ufeffprompt\nw1 w2\nw3\nw4\n"),
    data("csv with nul", Either(OneLine(2, "x.csv"), Survived(like=ANY)), "x.csv", "prompt\nw1\0w2\nw3\nw4\n"),
    data(
        "streamed late null",
        OneLine(1, "Row 5 of train_dataset", "checkpoint-"),
        content=lines(BAD),
        dataset_streaming=True,
    ),
    data("streamed truncated json", OneLine(2, "x.jsonl"), content=lines(GOOD) + '{"prom', dataset_streaming=True),
    data("streamed empty", OneLine(2, "x.jsonl"), content="", dataset_streaming=True),
    data("trailing NULs", OneLine(2, "x.jsonl"), content=lines(GOOD) + "\0" * 64),
    data("line separators", Survived(like=ANY), content='{"prompt": "w1 \u2028 w2"}\n' * 4),
    data("CRLF", Survived(like=ANY), content=lines(GOOD).replace("\n", "\r\n")),
    data(
        "only system",
        Either(OneLine(2), Survived(like=ANY)),
        content=lines([chat({"role": "system", "content": "w1"})] * 4),
    ),
    data(
        "tool calls", Either(OneLine(2), Survived(like=ANY)), content=lines([chat(U | {"tool_calls": [{"x": 1}]})] * 4)
    ),
    data("prompt late", OneLine(2, "Row 0"), content=lines([{"a": 1}, {"a": 1, "prompt": "w1"}])),
    data("column named completions", Survived(like=ANY), content=lines([{"prompt": "w1 w2", "completions": "x"}] * 4)),
    data(
        "column named prompts",
        Either(OneLine(2), Survived(like=ANY)),
        content=lines([{"prompt": "w1 w2", "prompts": "x"}] * 4),
    ),
    Fault("data", "link loop", OneLine(2, "x.jsonl"), prepare=loop, options=dict(dataset_name="x.jsonl")),
    Fault("data", "broken link", OneLine(2, "x.jsonl"), prepare=broken, options=dict(dataset_name="x.jsonl")),
    evals("null row", OneLine(2, "Row 5 of eval_dataset"), lines(BAD)),
    evals("empty", OneLine(2, "eval.jsonl"), ""),
    evals("no column", OneLine(2, "prompt"), lines([{"a": "w1"}] * 3)),
    evals("deep", OneLine(2, "eval.jsonl"), '{"prompt": ' + "[" * 20000),
    evals("streamed null", OneLine(2, "eval"), lines(BAD), dataset_streaming=True),
    evals("is there no more", OneLine(2, "nope.jsonl"), "x", eval_dataset_name="nope.jsonl"),
    opt(
        "two same functions",
        Either(OneLine(2), Survived(like=ANY)),
        reward_funcs=["feedback.py:words", "feedback.py:words"],
    ),
    opt("os system", OneLine(2), reward_funcs=["os:system"]),
    opt("no name", OneLine(2), reward_funcs=["feedback.py:"]),
    opt("dots", OneLine(2), reward_funcs=["feedback.py:words.__globals__"]),
    opt("output in proc", OneLine(2, "/proc/x"), output_dir="/proc/x"),
    opt("output of 300 letters", OneLine(2, "output_dir"), output_dir="x" * 300),
    opt("output below a file", OneLine(2, "output_dir"), output_dir="data.jsonl/out"),
    opt("report to nothing", OneLine(2, "report_to"), report_to="nosuch"),
    opt("scheduler", OneLine(2, "lr_scheduler_type"), lr_scheduler_type="nosuch"),
    opt("optim", OneLine(2, "optim"), optim="nosuch"),
    opt("scheduler kwargs", OneLine(2, "lr_scheduler_kwargs"), lr_scheduler_kwargs={"nope": 1}),
    opt("model init kwargs", OneLine(2, "nope"), model_init_kwargs={"nope": 1}),
    opt("generation kwargs", OneLine(2, "generation_kwargs"), generation_kwargs={"nope": 1}),
    opt("dtype", OneLine(2, "dtype"), model_init_kwargs={"dtype": "float3"}),
    opt("attn", OneLine(2, "attn"), model_init_kwargs={"attn_implementation": "nosuch"}),
    opt("deepspeed", OneLine(2), deepspeed="nowhere.json"),
    opt("fsdp", OneLine(2), fsdp="full_shard"),
    opt("resume from nowhere", OneLine(2, "nowhere"), resume_from_checkpoint="nowhere"),
    opt("resume from a file", OneLine(2), resume_from_checkpoint="data.jsonl"),
    opt("liger", Either(OneLine(2), Survived(like=ANY)), use_liger_kernel=True),
    opt("push to hub", OneLine(2), push_to_hub=True),
    opt("lora modules", OneLine(2, "nope"), use_peft=True, lora_target_modules=["nope"]),
    Fault(
        "method",
        "xpo, NaN reference",
        OneLine(2, "ref"),
        prepare=NANREF,
        options=dict(method="xpo", ref_model_name_or_path="./ref"),
    ),
    Fault(
        "method",
        "nash, NaN reference",
        OneLine(2, "ref"),
        prepare=NANREF,
        options=dict(method="nash_md", ref_model_name_or_path="./ref", judge="judge.py:judge", reward_funcs=None),
        files={"judge.py": "def judge(p, a, b):\n    return 0.9\n"},
    ),
    Fault(
        "method",
        "dpo, NaN reference",
        OneLine(2, "ref"),
        prepare=NANREF,
        options=dict(ref_model_name_or_path="./ref"),
    ),
    src("a builtin", OneLine(2, "words"), "words = max\n"),
    src("a class", OneLine(1, "words"), "class words:\n    def __init__(self, completions): pass\n"),
    src("no __call__ args", OneLine(2, "words"), "class W:\n    def __call__(self): return []\nwords = W()\n"),
    src(
        "async raises",
        OneLine(1, "words", "away"),
        "async def words(completions, **c):\n    raise ConnectionError('away')\n",
    ),
    src(
        "async hangs",
        OneLine(1, "words", "reward_timeout"),
        "import asyncio\nasync def words(completions, **c):\n    await asyncio.sleep(600)\n",
        reward_timeout=1.0,
    ),
    src(
        "async blocks",
        OneLine(1, "words", "reward_timeout"),
        "import time\nasync def words(completions, **c):\n    time.sleep(600)\n",
        reward_timeout=1.0,
    ),
    src("async exits", OneLine(1, "words"), "import sys\nasync def words(completions, **c):\n    sys.exit(0)\n"),
    src(
        "async stops the loop",
        Either(Survived(), OneLine(1, "words")),
        "import asyncio\n"
        + scorer()
        .replace("def words", "async def words")
        .replace("    calls += 1", "    calls += 1\n    if calls == 2: asyncio.get_running_loop().stop()"),
    ),
    src(
        "async NaN",
        OneLine(3, "words"),
        "async def words(completions, **c):\n    return [float('nan')] * len(completions)\n",
    ),
    src(
        "repr raises",
        OneLine(1, "words"),
        "class R:\n    def __repr__(self): raise RuntimeError('no')\n"
        "def words(completions, **c):\n    return [R()] * len(completions)\n",
    ),
    src(
        "float raises",
        OneLine(1, "words"),
        "class R(float):\n    def __float__(self): raise RuntimeError('no')\n"
        "def words(completions, **c):\n    return [R(1.0)] * len(completions)\n",
    ),
    src("texts of NaN", OneLine(1, "words"), "def words(completions, **c):\n    return ['nan'] * len(completions)\n"),
    src(
        "array of objects",
        OneLine(1, "words"),
        "import numpy\ndef words(completions, **c):\n    return numpy.array([{}] * len(completions))\n",
    ),
    src(
        "sparse tensor",
        Either(OneLine(1, "words"), Survived(like=ANY)),
        "import torch\ndef words(completions, **c):\n    return torch.ones(len(completions)).to_sparse()\n",
    ),
    src(
        "meta tensor",
        OneLine(1, "words"),
        "import torch\ndef words(completions, **c):\n    return torch.ones(len(completions), device='meta')\n",
    ),
    src(
        "list of meta",
        OneLine(1, "words"),
        "import torch\ndef words(completions, **c):\n    return [torch.ones((), device='meta')] * len(completions)\n",
    ),
    src(
        "complex tensor",
        OneLine(1, "words"),
        "import torch\ndef words(completions, **c):\n    return torch.ones(len(completions)) * 1j\n",
    ),
    fn("log_metric 10**400", Survived(like=ANY), "columns['log_metric']('x', 10**400)"),
    fn("log_metric NaN", Survived(), "columns['log_metric']('x', float('nan'))"),
    fn("log_metric a name with lines", Survived(), "columns['log_metric']('a\\nb\\x1b[31m', 1)"),
    fn("log_metric no text", OneLine(1, "words"), "columns['log_metric'](5, 1)"),
    fn(
        "log_extra objects",
        Survived(),
        "columns['log_extra']('x', [object()] * len(completions))",
    ),
    fn(
        "state",
        Survived(),
        "state = columns['trainer_state']\nstate.global_step = 99; state.log_history.clear(); state.max_steps = 1",
    ),
    fn("anomaly", Survived(), "import torch\ntorch.autograd.set_detect_anomaly(True)"),
    fn("deterministic", Survived(), "import torch\ntorch.use_deterministic_algorithms(True)"),
    fn("closes the descriptor of stderr", Survived(), "if calls == 2: os.close(2)"),
    fn("sys.stderr None", Survived(), "sys.stderr = None"),
    fn("logging off", Survived(), "import logging\nlogging.disable(100)"),
    fn("atexit raises", Survived(), "import atexit\nif calls == 1: atexit.register(lambda: 1 / 0)"),
    fn("umask", Survived(), "os.umask(0o777)"),
    fn("time.time", Survived(), "time.time = lambda: 0.0"),
    fn("monotonic", Survived(), "time.monotonic = lambda: 0.0"),
    fn("gc off", Survived(), "import gc\ngc.disable()"),
    fn(
        "file size limit",
        OneLine(1),
        "import resource\nif calls == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",
    ),
    fn(
        "interval timer",
        Survived(),
        "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)",
    ),
    fn(
        "excepthook",
        Resumes(OneLine(1, "words")),
        "sys.excepthook = None\nif calls == 3: raise ValueError('x')",
    ),
    fn(
        "raises KeyboardInterrupt",
        Either(OneLine(1, "words"), Resumes(OneLine(130))),
        "if calls == 3: raise KeyboardInterrupt",
    ),
    fn(
        "raises an exception group",
        Resumes(OneLine(1, "words")),
        "if calls == 3: raise BaseExceptionGroup('many', [SystemExit(1), ValueError('x')])",
    ),
    fn("deletes itself", Survived(), "if calls == 1: os.remove('feedback.py')"),
    fn("removes the policy", Survived(), "import shutil\nshutil.rmtree('policy', ignore_errors=True)"),
    fn("os.fork", Survived(), "if calls == 3 and not os.fork(): os._exit(0)"),
    judge("raises", OneLine(1, "judge", "away"), "raise ConnectionError('away')"),
    judge("a letter", OneLine(1, "judge"), "return 'A'"),
    judge("a bool", Survived(like=ANY), "return True"),
    judge("a list", OneLine(1, "judge"), "return [1.0]"),
    judge("None", OneLine(3), "return None"),
    judge("hangs", OneLine(1, "judge", "reward_timeout"), "time.sleep(600)", reward_timeout=1.0),
    judge("no arguments", OneLine(2, "judge"), "return 1.0", head="def judge():"),
    judge("two arguments", OneLine(2, "judge"), "return 1.0", head="def judge(a, b):"),
    judge(
        "TRL form, wrong ranks",
        OneLine(1, "judge"),
        "return [7] * len(prompts)",
        head="def judge(prompts, pairs, shuffle_order=True):",
    ),
    judge("TRL form, too few", OneLine(1, "judge"), "return []", head="def judge(prompts, pairs, shuffle_order=True):"),
    judge(
        "TRL form, texts",
        OneLine(1, "judge"),
        "return ['0'] * len(prompts)",
        head="def judge(prompts, pairs, shuffle_order=True):",
    ),
    judge(
        "TRL form, 10**400",
        OneLine(1, "judge"),
        "return [10**5000] * len(prompts)",
        head="def judge(prompts, pairs, shuffle_order=True):",
    ),
]
CHEAP = ("data", "eval data", "method")
FAULTS = [fault.but(quick=fault.kind in CHEAP or place % 3 == 0) for place, fault in enumerate(EACH)]
"""Of functions, judges and fields every third one is in the quick list; `cases_scorers` has the usual ones."""
