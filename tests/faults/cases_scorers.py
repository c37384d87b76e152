"""Reward functions that fail, lie, change what is not theirs, or do not come back."""

from __future__ import annotations

from faults.harness import ANY, Either, Ending, Fault, Killed, OneLine, Resumes, Survived, scorer
from faults.injection import Child
from online_dpo.cli import process

NAMED = ("words", "feedback.py")


def raised(error: str, *words: str) -> tuple[str, Ending]:
    return f"if calls == 3: raise {error}", Resumes(OneLine(1, "words", *words))


BEFORE: dict[str, tuple[str, Ending]] = {
    "raises": raised("ConnectionError('the line is dead')", "ConnectionError", "the line is dead"),
    "raises in the first step": ("raise ConnectionError('the line is dead')", OneLine(1, "the line is dead")),
    "raises without a message": raised("ValueError", "ValueError"),
    "raises several lines": raised("ValueError('one\\ntwo\\nthree')", "ValueError"),
    "raises control characters": raised("ValueError('\\x1b[2J\\x07gone')", "ValueError"),
    "raises what is no text": raised("ValueError(b'\\xff\\xfe', [1])", "ValueError"),
    "raises a megabyte": raised("ValueError('x' * 10**6)", "ValueError"),
    "raises KeyError": raised("KeyError('answer')", "KeyError", "answer"),
    "raises StopIteration": raised("StopIteration", "StopIteration"),
    "raises GeneratorExit": raised("GeneratorExit", "GeneratorExit"),
    "raises RecursionError": (
        "def deep(): return deep()\nif calls == 3: deep()",
        Resumes(OneLine(1, "RecursionError")),
    ),
    "raises what cannot be printed": (
        "class Bad(Exception):\n    def __str__(self): raise RuntimeError('no text')\nif calls == 3: raise Bad()",
        Resumes(OneLine(1, "words", "Bad")),
    ),
    "raises a BaseException of its own": (
        "class Mine(BaseException): pass\nif calls == 3: raise Mine('enough')",
        Resumes(OneLine(1, "words", "Mine")),
    ),
    "raises SystemExit": ("if calls == 3: sys.exit('bye')", Resumes(OneLine(1, "words", "bye"))),
    "calls sys.exit(0)": ("if calls == 3: sys.exit(0)", Resumes(OneLine(1, "words"))),
    "calls exit()": ("if calls == 3: exit()", Resumes(OneLine(1, "words"))),
    "raises CancelledError": (
        "import asyncio\nif calls == 3: raise asyncio.CancelledError()",
        Resumes(OneLine(1, "words")),
    ),
    "changes the folder": ("os.chdir('/')", Survived("words")),
    "changes the folder and removes it": (
        "import tempfile\nplace = tempfile.mkdtemp()\nos.chdir(place)\nos.rmdir(place)",
        Survived(),
    ),
    "prints a megabyte": ("print('x' * 10**6)", Survived()),
    "prints what is no UTF-8": ("os.write(1, b'\\xff\\xfe')", Survived()),
    "closes stdout": ("sys.stdout.close()", Survived()),
    "closes the descriptor of stdout": ("if calls == 1: os.close(1)", Survived()),
    "replaces stdout": ("sys.stdout = None", Survived()),
    "changes the random state": (
        "import random, numpy, torch\nrandom.seed(calls); numpy.random.seed(calls); torch.manual_seed(calls)",
        Survived(),
    ),
    "draws random numbers": ("import random, torch\ntorch.rand(calls)\nrandom.random()", Survived()),
    "switches gradients off": ("import torch\ntorch.set_grad_enabled(False)", Survived()),
    "changes torch's default type": ("import torch\ntorch.set_default_dtype(torch.float64)", Survived()),
    "changes the number of threads": ("import torch\ntorch.set_num_threads(1)", Survived()),
    "changes the environment": ("os.environ['RANK'] = '7'; os.environ['WORLD_SIZE'] = '9'", Survived()),
    "empties the environment": ("os.environ.clear()", Survived()),
    "turns warnings into errors": ("import warnings\nwarnings.simplefilter('error')", Survived()),
    "warns": ("import warnings\nwarnings.warn('careful')", Survived()),
    "takes away the handler of SIGTERM": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", Survived()),
    "sets an alarm": ("signal.alarm(1)\ntime.sleep(0.01)", Survived()),
    "leaves a thread that never ends": (
        "if calls == 1: threading.Thread(target=time.sleep, args=(600,)).start()",
        Survived(),
    ),
    "leaves a pool that never ends": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "if calls == 1: ThreadPoolExecutor(1).submit(time.sleep, 600)",
        Survived(),
    ),
    "empties its columns": ("columns.clear()", Survived()),
    "leaves a child process": ("import subprocess\nif calls == 1: subprocess.Popen(['sleep', '3'])", Survived()),
    "starts a loop of its own": ("import asyncio\nasyncio.run(asyncio.sleep(0))", Survived()),
    "removes the output folder": (
        "import shutil\nif calls == 3: shutil.rmtree('out', ignore_errors=True)",
        Survived(),
    ),
    "makes the interpreter slow": ("sys.settrace(lambda *a: None)", Survived()),
    "lowers the recursion limit": ("sys.setrecursionlimit(150)", Either(Survived(), OneLine(1, "RecursionError"))),
    "uses up the file descriptors": (
        "import resource\nif calls == 3:\n    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n"
        "    keep = []\n    try:\n        while True: keep.append(open('/dev/null'))\n"
        "    except OSError: globals()['kept'] = keep",
        Either(Survived(), OneLine(1, "open files")),
    ),
    "kills the process": ("if calls == 3: os.kill(os.getpid(), 9)", Resumes(Killed(9))),
    "crashes the interpreter": (
        "import ctypes, faulthandler\nfaulthandler.disable()\nif calls == 3: ctypes.string_at(0)",
        Resumes(Killed(11)),
    ),
    "aborts": ("if calls == 3: os.abort()", Resumes(Killed(6))),
}

RETURNS: dict[str, tuple[str, Ending]] = {
    "None": ("None", OneLine(1, *NAMED[:1])),
    "one score too few": ("scores[1:]", OneLine(1, "words", "3", "4")),
    "one score too many": ("scores + [1.0]", OneLine(1, "words", "5", "4")),
    "nothing": ("[]", OneLine(1, "words", "0", "4")),
    "a number": ("1.0", OneLine(1, "words")),
    "a text": ("'1234'", OneLine(1, "words")),
    "texts": ("[str(s) for s in scores]", OneLine(1, "words")),
    "a dict": ("dict(enumerate(scores))", OneLine(1, "words")),
    "nested lists": ("[[s] for s in scores]", OneLine(1, "words")),
    "complex numbers": ("[complex(s, 1) for s in scores]", OneLine(1, "words")),
    "a generator": ("(s for s in scores)", Either(Survived(), OneLine(1, "words"))),
    "an endless generator": ("iter(int, 1)", OneLine(1, "words")),
    "a tuple": ("tuple(scores)", Survived()),
    "an array": ("__import__('numpy').array(scores)", Survived()),
    "a tensor": ("__import__('torch').tensor(scores, dtype=__import__('torch').float64)", Survived()),
    "a tensor of another shape": ("__import__('torch').tensor([scores])", OneLine(1, "words")),
    "a tensor that needs gradients": ("__import__('torch').tensor(scores, requires_grad=True)", Survived(like=ANY)),
    "numbers of numpy": ("list(__import__('numpy').array(scores))", Survived()),
    "booleans": ("[s > 0.5 for s in scores]", Survived(like=ANY)),
    "whole numbers": ("[int(100 * s) for s in scores]", Survived(like=ANY)),
    "decimals": (
        "[__import__('decimal').Decimal(str(s)) for s in scores]",
        Either(Survived(like=ANY), OneLine(1, "words")),
    ),
    "a coroutine": ("__import__('asyncio').sleep(0, scores)", Either(Survived(), OneLine(1, "words"))),
    "itself": ("words", OneLine(1, "words")),
}

SOURCES: dict[str, tuple[str, Ending]] = {
    "does not parse": ("def words(completions:\n", OneLine(2, "feedback.py")),
    "is empty": ("", OneLine(2, "feedback.py", "words")),
    "is no text": ("\x00\x01", OneLine(2, "feedback.py")),
    "has no such function": ("def word(completions):\n    return []\n", OneLine(2, "words")),
    "is no function": ("words = 3\n", OneLine(2, "words")),
    "fails as it is imported": (scorer() + "raise OSError('no network')\n", OneLine(2, "no network")),
    "calls sys.exit as it is imported": (scorer() + "sys.exit(0)\n", OneLine(2, "feedback.py")),
    "imports what is not there": ("import not_there_at_all\n" + scorer(), OneLine(2, "not_there_at_all")),
    "asks for a column that is not there": (
        "def words(completions, answer):\n    return [1.0] * len(completions)\n",
        OneLine(2, "answer"),
    ),
    "takes nothing": ("def words():\n    return []\n", OneLine(2, "words", "takes no arguments")),
    "changes the folder as it is imported": ("import os\nos.chdir('/')\n" + scorer(), Survived()),
    "changes the random state as it is imported": ("import torch\ntorch.manual_seed(5)\n" + scorer(), Survived()),
}

LATER = {
    *("raises without a message", "raises several lines", "raises what is no text", "raises KeyError"),
    *("raises StopIteration", "raises GeneratorExit", "raises RecursionError", "calls exit()", "raises a megabyte"),
    *("draws random numbers", "changes the number of threads", "warns", "replaces stdout", "prints what is no UTF-8"),
    *("sets an alarm", "starts a loop of its own", "leaves a pool that never ends", "empties its columns", "aborts"),
    *("changes the environment", "makes the interpreter slow", "leaves a child process", "closes stdout"),
    *("returns a tuple", "returns an array", "returns numbers of numpy", "returns booleans", "returns whole numbers"),
    *("returns decimals", "returns one score too many", "returns nothing", "returns a tensor", "returns a number"),
    *("returns nested lists", "returns complex numbers", "returns a dict", "returns itself"),
}
"""What shows the same as another one: in the longer list only."""


def waits_a_second(child: Child) -> None:
    """For threads, after the end; 10 seconds otherwise."""
    process.THREADS = (1.0, 1.0)


FAULTS = [
    *(
        Fault(
            "reward function",
            name,
            ending,
            files={"feedback.py": scorer(before)},
            inject=waits_a_second if "never ends" in name else None,
            quick=name not in LATER,
        )
        for name, (before, ending) in BEFORE.items()
    ),
    *(
        Fault(
            "reward function",
            f"returns {name}",
            ending,
            files={"feedback.py": scorer(returns=returns)},
            quick=f"returns {name}" not in LATER,
        )
        for name, (returns, ending) in RETURNS.items()
    ),
    *(Fault("reward file", name, ending, files={"feedback.py": source}) for name, (source, ending) in SOURCES.items()),
    Fault(
        "reward function",
        "hangs beyond reward_timeout",
        Resumes(OneLine(1, "words", "reward_timeout")),
        options=dict(reward_timeout=1.0),
        files={"feedback.py": scorer("if calls == 3: time.sleep(600)")},
    ),
    Fault(
        "reward function",
        "hangs in C beyond reward_timeout",
        Resumes(OneLine(1, "words", "reward_timeout")),
        options=dict(reward_timeout=1.0),
        files={"feedback.py": scorer("if calls == 3: threading.Lock().acquire() and threading.Event().wait()")},
    ),
    Fault(
        "reward function",
        "hangs with lookahead beyond reward_timeout",
        Resumes(OneLine(1, "words", "reward_timeout")),
        options=dict(reward_timeout=1.0, max_staleness=1),
        files={"feedback.py": scorer("if calls == 3: time.sleep(600)")},
    ),
    Fault(
        "reward function",
        "raises with lookahead",
        Resumes(OneLine(1, "words", "ConnectionError")),
        options=dict(max_staleness=1),
        files={"feedback.py": scorer("if calls == 3: raise ConnectionError('x')")},
    ),
    Fault(
        "reward function",
        "raises on one rank of two",
        Resumes(OneLine(1, "words", "ConnectionError")),
        processes=2,
        files={"feedback.py": scorer("if calls == 3 and os.environ['RANK'] == '1': raise ConnectionError('x')")},
    ),
    Fault(
        "reward function",
        "calls sys.exit on one rank of two",
        Resumes(OneLine(1, "words")),
        processes=2,
        files={"feedback.py": scorer("if calls == 3 and os.environ['RANK'] == '1': sys.exit(0)")},
    ),
    Fault(
        "reward function",
        "raises in evaluation",
        Resumes(OneLine(1, "words")),
        options=dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=2),
        files={"feedback.py": scorer("if calls == 3: raise ConnectionError('x')")},
    ),
]
