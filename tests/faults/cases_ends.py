"""How a run ends: signals outside of steps, whatever user code raises, output that breaks, threads that hang."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from faults.harness import Fault, OneLine, Resumes, Stops, Survived, scorer
from faults.injection import Child, raises, sends

INT, TERM = signal.SIGINT, signal.SIGTERM
SIGNALS = (INT, TERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SAVES = dict(save_steps=2)


def said(number: signal.Signals) -> str:
    return "Ctrl-C" if number is INT else number.name


def stops(number: signal.Signals, *words: str) -> Stops:
    return Stops(128 + number, f"{said(number)} stopped the run", *words)


def often(number: int, times: int) -> Callable[[], None]:
    def action() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return action


def at(target: str, action: Callable[[], None], number: int = 1) -> Callable[[Child], None]:
    return lambda child: child.at_call(target, number, action)


IN_A_SAVE = "transformers.trainer:Trainer._save_optimizer_and_scheduler"
FINAL_SAVE = "online_dpo.training.hf_trainer:GuardedTrainer.save_model"
SECOND = 2
"""The first call is that of the last checkpoint."""
CARD = "online_dpo.training.trainer:OnlineDPOTrainer.create_model_card"
BEFORE = {
    "while the run file is read": "online_dpo.cli.runfile.run_file:plan_run",
    "while models are loaded": "online_dpo.training.trainer:OnlineDPOTrainer._build_policy",
}


def of_each_signal() -> list[Fault]:
    made = []
    for number in SIGNALS:
        name = number.name
        ending = Resumes(stops(number, "checkpoint-2"))
        often_sent = number in (INT, TERM)
        made += [
            Fault("signal", f"{name} in a save", ending, options=SAVES, inject=at(IN_A_SAVE, often(number, 1))),
            Fault(
                "signal",
                f"{name} in the last step",
                Survived(),
                inject=lambda c, n=number: c.at_step(4, sends(n)),
                quick=often_sent,
            ),
            Fault(
                "signal",
                f"{name} in the final save",
                Survived(),
                inject=at(FINAL_SAVE, often(number, 1), SECOND),
                quick=often_sent,
            ),
            *(
                Fault(
                    "signal",
                    f"{name} {when}",
                    Stops(128 + number),
                    inject=at(target, often(number, 1)),
                    quick=often_sent,
                )
                for when, target in BEFORE.items()
            ),
        ]
    return made


OTHER_SIGNALS = [
    Fault("signal", "SIGTERM three times", Resumes(stops(TERM)), inject=lambda c: c.at_step(2, often(TERM, 3))),
    Fault(
        "signal", "Ctrl-C twice", Resumes(Stops(130, "second", "at once")), inject=lambda c: c.at_step(2, often(INT, 2))
    ),
    Fault(
        "signal",
        "Ctrl-C twice in a save",
        Resumes(stops(INT, "checkpoint-2")),
        options=SAVES,
        inject=at(IN_A_SAVE, often(INT, 2)),
    ),
    Fault(
        "signal",
        "Ctrl-C three times in a save",
        Resumes(Stops(130, "at once")),
        options=SAVES,
        inject=at(IN_A_SAVE, often(INT, 3)),
    ),
    Fault("signal", "Ctrl-C twice in the final save", Survived(), inject=at(FINAL_SAVE, often(INT, 2), SECOND)),
    Fault("signal", "Ctrl-C three times in the final save", Stops(130), inject=at(FINAL_SAVE, often(INT, 3), SECOND)),
    Fault(
        "signal",
        "SIGTERM with lookahead",
        Resumes(stops(TERM, "checkpoint-2")),
        options=dict(max_staleness=1),
        inject=lambda c: c.at_step(2, sends(TERM)),
    ),
    Fault(
        "signal",
        "Ctrl-C twice while a reward hangs in another thread",
        Stops(130, "at once"),
        options=dict(max_staleness=1),
        files={"feedback.py": scorer("if calls == 3: time.sleep(300)")},
        inject=lambda c: c.at_step(2, often(INT, 2)),
    ),
    Fault(
        "signal",
        "its handler is replaced by a reward",
        Survived("handler of its own for SIGTERM"),
        files={"feedback.py": scorer("signal.signal(signal.SIGTERM, signal.SIG_IGN)")},
    ),
]

# --- what user code raises ------------------------------------------------------------------------------------------

RAISED = {
    "SystemExit(0)": "SystemExit: 0",
    "SystemExit('bye')": "SystemExit: bye",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "GeneratorExit": "GeneratorExit",
    "RecursionError('deep')": "RecursionError: deep",
    "StopIteration": "StopIteration",
    "AssertionError": "AssertionError",
    "__import__('asyncio').CancelledError": "CancelledError",
    "type('Own', (BaseException,), {})('mine')": "Own: mine",
    "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})": "its message cannot be shown: ZeroDivisionError",
    "ExceptionGroup('two', [OSError('a'), ValueError('b')])": "OSError: a; ValueError: b",
    "ValueError('one\\ntwo\\n' + 'x' * 10**6)": "one two",
    "ValueError('\\x1b[2J\\x1b[31mred')": "ValueError: red",
    "ValueError('half \\ud83d')": "ValueError: half",
    "UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')": "UnicodeDecodeError",
    "DeprecationWarning('old')": "DeprecationWarning: old",
}


def raising() -> list[Fault]:
    made = []
    for number, (expression, words) in enumerate(RAISED.items()):
        ending = Resumes(OneLine(1, "Reward function `words` raised", words, "checkpoint-2"))
        name = expression.partition("(")[0].strip("_") if len(expression) > 40 else expression
        code = f"raise {expression}"
        of_one_rank = scorer(f"if calls == 3 and os.environ['RANK'] == '1': {code}")
        made += [
            Fault(
                "raised",
                f"{name} {number} by a reward",
                ending,
                files={"feedback.py": scorer(f"if calls == 3: {code}")},
                quick=number % 2 == 0,
            ),
            Fault(
                "raised",
                f"{name} {number} by a reward of rank 1 alone",
                ending,
                files={"feedback.py": of_one_rank},
                processes=2,
                limit=40.0,
                quick=number in (1, 3),
            ),
        ]
    return made


PLUGIN = """
from online_dpo.objective.losses import loss
import torch.nn.functional as F
calls = 0
@loss("mine")
def mine(pairs, options):
    global calls
    calls += 1
    if calls == 3 and {condition}:
        raise LookupError("no such pair")
    return -F.logsigmoid(options.beta * pairs.h_N)
"""
OF_A_PLUGIN = dict(plugins=["plugin.py"], loss_type="mine")
ASYNC = """
import asyncio, sys
calls = 0
def right(completions):
    return [sum(map(ord, text)) % 101 / 101 for text in completions]
async def child():
    {child}
async def words(completions, **columns):
    global calls
    calls += 1
    if calls == 3:
        {action}
    await asyncio.sleep(0.01)
    return right(completions)
"""
JUDGE = "import sys\nclass Court:\n    def __init__(self): sys.exit(0)\n    def judge(self, *_, **__): pass\n"


def asynchronous(action: str, child: str = "pass") -> dict[str, str | bytes]:
    return {"feedback.py": ASYNC.format(action=action, child=child)}


ELSEWHERE = [
    *(
        Fault(
            "raised",
            f"by a loss of {'rank 1 alone' if processes > 1 else 'a plugin'}",
            OneLine(1, "Loss `mine` raised LookupError: no such pair", "checkpoint-2"),
            options=OF_A_PLUGIN,
            files={"plugin.py": PLUGIN.format(condition=condition)},
            processes=processes,
            limit=40.0,
        )
        for processes, condition in ((1, "True"), (2, "__import__('os').environ['RANK'] == '1'"))
    ),
    Fault(
        "raised",
        "OSError in the final save of rank 0 of 2",
        OneLine(1, "Saving the trained model", "no space left", "Another process of this run failed", "checkpoint-4"),
        inject=lambda child: child.rank or child.at_call(FINAL_SAVE, SECOND, raises(OSError("no space left"))),
        processes=2,
    ),
    Fault(
        "raised",
        "sys.exit in a plugin as it is imported",
        OneLine(2, "plugin.py", "SystemExit"),
        options=dict(plugins=["plugin.py"]),
        files={"plugin.py": "import sys\nsys.exit(0)\n"},
    ),
    Fault(
        "raised",
        "sys.exit as a judge is made",
        OneLine(2, "Making judge `feedback.py:Court` raised SystemExit: 0"),
        options=dict(reward_funcs=None, judge="feedback.py:Court"),
        files={"feedback.py": JUDGE},
    ),
    Fault(
        "raised",
        "sys.exit in an async reward",
        Resumes(OneLine(1, "Reward function `words` raised SystemExit", "checkpoint-2")),
        files=asynchronous("sys.exit(0)"),
    ),
    Fault(
        "raised",
        "sys.exit in a task of an async reward",
        Resumes(OneLine(1, "`words` raised SystemExit", "checkpoint-2")),
        files=asynchronous("await asyncio.create_task(child())", "sys.exit(0)"),
    ),
    Fault(
        "raised",
        "an async reward that is cancelled",
        Resumes(OneLine(1, "`words` raised CancelledError", "checkpoint-2")),
        files=asynchronous("asyncio.current_task().cancel()"),
    ),
    Fault(
        "raised",
        "an async reward that stops its loop",
        Survived(),
        files=asynchronous("asyncio.get_running_loop().stop()"),
    ),
    Fault(
        "raised",
        "an async reward that closes its loop",
        Resumes(OneLine(1, "`words` raised RuntimeError: Cannot close a running event loop", "checkpoint-2")),
        files=asynchronous("asyncio.get_running_loop().close()"),
    ),
    Fault(
        "raised",
        "os._exit in a reward",
        Resumes(Stops(7)),
        options=dict(save_steps=1),
        files={"feedback.py": scorer("if calls == 3: os._exit(7)")},
    ),
    *(
        Fault(
            "raised",
            f"{type(error).__name__} in {what}",
            OneLine(code, *words),
            inject=at(target, raises(error), number),
        )
        for what, target, number, error, code, words in (
            (
                "the final save",
                FINAL_SAVE,
                SECOND,
                OSError("no space left"),
                1,
                ("Saving the trained model", "checkpoint-4"),
            ),
            ("the final save", FINAL_SAVE, SECOND, SystemExit(0), 1, ("Saving the trained model", "checkpoint-4")),
            ("the last model card", CARD, SECOND, KeyError("x"), 1, ("is saved in", "card", "checkpoint-4")),
            (
                "the log at the end",
                "online_dpo.training.trainer:OnlineDPOTrainer.save_state",
                1,
                OSError("full"),
                1,
                ("is saved in", "log"),
            ),
            ("the making of the trainer", BEFORE["while models are loaded"], 1, RuntimeError("odd"), 2, ("odd",)),
            ("the making of the trainer", BEFORE["while models are loaded"], 1, SystemExit(0), 2, ("SystemExit",)),
            ("a library in step 1", "torch.optim:AdamW.step", 1, ArithmeticError("odd"), 1, ("Optimizer", "odd")),
        )
    ),
]

# --- what user code does to the process -----------------------------------------------------------------------------

DONE = {
    "changes the working folder": ("os.chdir('/')", "changed the working folder"),
    "writes into the state": ("columns['trainer_state'].global_step = 77", ""),
    "clears the log of the state": ("columns['trainer_state'].log_history.clear()", ""),
    "clears its arguments": ("completions = list(completions)\ncolumns['prompts'].clear()", ""),
    "seeds torch": ("import torch\ntorch.manual_seed(0)", "changed torch's random state"),
    "seeds torch as the run does": ("import torch\ntorch.manual_seed(42)", ""),
    "seeds Python and NumPy": ("import random, numpy\nrandom.seed(0)\nnumpy.random.seed(0)", ""),
    "sets torch's default type": ("import torch\ntorch.set_default_dtype(torch.float64)", "torch's default type"),
    "sets torch's default device": ("import torch\ntorch.set_default_device('meta')", "torch's default device"),
    "sets torch's threads": ("import torch\ntorch.set_num_threads(3)", "torch's number of threads"),
    "turns gradients off": ("import torch\ntorch.set_grad_enabled(False)", ""),
    "leaves inference mode on": (
        "import torch\nglobal mode\nmode = torch.inference_mode()\nmode.__enter__()",
        "",
    ),
    "turns logging off": ("import logging\nlogging.disable(50)", "the level below which nothing is logged"),
    "closes standard output": ("sys.stdout.close()", "Model saved"),
    "closes standard error": ("sys.stderr.close()", "Model saved"),
    "closes the descriptors": ("os.close(1)\nos.close(2)", ""),
    "replaces standard output": ("sys.stdout = None", "changed standard output"),
    "clears the environment": ("os.environ.clear()", ""),
    "starts a thread that fails": (
        "threading.Thread(target=lambda: 1 / 0).start()",
        "A thread raised ZeroDivisionError",
    ),
    "sets another locale": ("import locale\nlocale.setlocale(locale.LC_ALL, 'C')", ""),
}


def done() -> list[Fault]:
    return [
        Fault(
            "takes over",
            f"a reward {what}",
            Survived(*filter(None, [words])),
            files={"feedback.py": scorer("if calls == 2:\n" + "\n".join(f"    {line}" for line in code.splitlines()))},
        )
        for what, (code, words) in DONE.items()
    ]


# --- output, and the end of the process -----------------------------------------------------------------------------


def full(*descriptors: int) -> Callable[[Child], None]:
    def inject(child: Child) -> None:
        for descriptor in descriptors:
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)

    return inject


def no_reader(*descriptors: int) -> Callable[[Child], None]:
    def inject(child: Child) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        for descriptor in descriptors:
            os.dup2(writing, descriptor)

    return inject


def closed(*descriptors: int) -> Callable[[Child], None]:
    def inject(child: Child) -> None:
        """As Python finds it where a shell has closed them: `>&-`."""
        for descriptor in descriptors:
            setattr(sys, {1: "stdout", 2: "stderr"}[descriptor], None)
            os.close(descriptor)

    return inject


BROKEN = {"is full": full, "has no reader": no_reader, "is closed": closed}
OUTPUT = [
    *(
        Fault("output", f"standard output {how}", Survived("standard output cannot be written"), inject=break_it(1))
        for how, break_it in BROKEN.items()
    ),
    *(Fault("output", f"standard error {how}", Survived(), inject=break_it(2)) for how, break_it in BROKEN.items()),
    *(Fault("output", f"all output {how}", Survived(), inject=break_it(1, 2)) for how, break_it in BROKEN.items()),
    *(
        Fault(
            "output",
            f"standard error {how} and a reward fails",
            Resumes(Stops(1)),
            inject=break_it(2),
            files={"feedback.py": scorer("if calls == 3: raise ValueError('away')")},
        )
        for how, break_it in BROKEN.items()
    ),
    Fault(
        "output",
        "standard output has no reader from step 2 on",
        Survived("standard output cannot be written"),
        inject=lambda child: child.at_step(2, lambda: no_reader(1)(child)),
    ),
    Fault(
        "output",
        "all output is full and a reward fails",
        Stops(1),
        files={"feedback.py": scorer("if calls == 3: raise ValueError('away')")},
        inject=full(1, 2),
    ),
    Fault(
        "output",
        "standard output cannot show a character",
        Survived(),
        environment={"PYTHONIOENCODING": "ascii"},
        files={"feedback.py": scorer("print('caf\\u00e9 \\u2713 \\ud83d')")},
    ),
]
HANGS = "threading.Thread(target=time.sleep, args=(600,), daemon=False).start()"
LATE = [
    Fault(
        "end",
        "a thread of a reward hangs",
        Survived("Model saved", "the process ends without waiting any longer for"),
        files={"feedback.py": scorer(f"if calls == 2: {HANGS}")},
        limit=40.0,
    ),
    Fault(
        "end",
        "a thread of a reward that fails hangs",
        Resumes(OneLine(1, "away", "checkpoint-2")),
        files={"feedback.py": scorer(f"if calls == 3:\n    {HANGS}\n    raise ValueError('away')")},
        limit=40.0,
    ),
    Fault(
        "end",
        "what is registered for the exit fails",
        Survived("Model saved", "ZeroDivisionError"),
        files={"feedback.py": scorer("import atexit\nif calls == 2: atexit.register(lambda: 1 / 0)")},
    ),
]

FAULTS = [
    *of_each_signal(),
    *OTHER_SIGNALS,
    *raising(),
    *ELSEWHERE,
    *done(),
    *OUTPUT,
    *LATE,
]
