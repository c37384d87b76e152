"""One of two ranks is stopped, killed, hangs, fails or differs: the other one names it, saves, and ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace

from faults.harness import ByRank, Fault, Killed, OneLine, Resumes, scorer
from faults.injection import Action, Child, kills, raises, sends
from faults.runs import Running

OPTIONS = dict(ddp_timeout=10)  # a busy machine may stop for some seconds
STOPS, KILLS = sends(signal.SIGSTOP), kills()
SILENT = "has not been heard of"
KILLED = Killed(signal.SIGKILL)


def on(rank: int, inject: Callable[[Child], None]) -> Callable[[Child], None]:
    return lambda child: inject(child) if child.rank == rank else None


def at_step(step: int, action: Action) -> Callable[[Child], None]:
    return lambda child: child.at_step(step, action)


def at_call(target: str, number: int | None, action: Action) -> Callable[[Child], None]:
    return lambda child: child.at_call(target, number, action)


def frees(rank: int) -> Callable[[Running], None]:
    """A stopped process is killed once the other one has ended by itself."""

    def free(running: Running) -> None:
        if running.wait_rank(1 - rank):
            running.kill(ranks=[rank])

    return free


def lost(name: str, rank: int, inject: Callable[[Child], None], *words: str, resumes=True, **fields) -> Fault:
    """A fault after which one rank is dead or stopped and the other one names it."""
    survivor = OneLine(1, f"Rank {rank}", *words)
    ending = ByRank(survivor, KILLED) if rank else ByRank(KILLED, survivor)
    return Fault(
        "ranks",
        f"rank {rank} {name}",
        Resumes(ending) if resumes else ending,
        inject=on(rank, inject),
        outside=frees(rank),
        **{"options": OPTIONS, "processes": 2, "limit": 90.0, **fields},
    )


BACKWARD = "accelerate.accelerator:Accelerator.backward"
SCORING = "online_dpo.scoring.assess:Assessor.assess"
PUBLISHES = "online_dpo.checkpoints.writer:CheckpointWriter._publish"
WRITES = "online_dpo.checkpoints.writer:CheckpointWriter._own_entries"
EVALUATION = "online_dpo.evaluation.evaluator:Evaluator.evaluate"
FINAL_SAVE = "online_dpo.training.hf_trainer:GuardedTrainer.save_model"
BUILDING = "online_dpo.training.trainer:build_policy"
STEP_2, STEP_4 = "checkpoint-2", "checkpoint-4"
EVALUATED = dict(**OPTIONS, eval_strategy="steps", eval_steps=2, dataset_test_split="train")
SAVED = dict(**OPTIONS, save_steps=2)
HANGS = scorer("if calls == 3 and os.environ['RANK'] == '{}': time.sleep(300)")
GIVEN_UP = "after step 2"


def hangs(rank: int, **fields) -> Fault:
    endings = [OneLine(1, f"Rank {rank} has been in Reward function `words`", GIVEN_UP), OneLine(1, "still in")]
    return Fault(
        "ranks",
        f"rank {rank} hangs in a reward function",
        Resumes(ByRank(*endings[:: -1 if rank == 0 else 1])),
        files={"feedback.py": HANGS.replace("{}", str(rank))},
        **{"options": OPTIONS, "processes": 2, "limit": 90.0, **fields},
    )


def fetches_nothing_in_step_3(child: Child) -> None:
    """As from a stream that is over."""

    def wrap(fetch):
        return lambda collector, step, *rest: replace(
            fetch(collector, step, *rest), **({"prompts": [], "num_batches": 0} if step == 2 else {})
        )

    child.patch("online_dpo.training.collector:FeedbackCollector._fetch", wrap)


def with_words(*words: str) -> Callable[[Child], None]:
    """This process's command has more words than the other's."""
    return lambda child: sys.argv.extend(words)


def differs(name: str, inject: Callable[[Child], None], *words: str, **fields) -> Fault:
    return Fault(
        "ranks",
        name,
        OneLine(2, *words),
        inject=on(1, inject),
        processes=2,
        limit=90.0,
        **{"options": OPTIONS, **fields},
    )


FAULTS = [
    lost("is stopped in training", 1, at_step(3, STOPS), SILENT, "`ddp_timeout`", STEP_2),
    lost("is stopped in training", 0, at_step(3, STOPS), SILENT, "`ddp_timeout`"),
    lost("is killed in training", 1, at_step(3, KILLS), SILENT, STEP_2, quick=False),
    lost("is killed in training", 0, at_step(3, KILLS), "cannot be reached"),
    lost("is stopped in a backward pass", 1, at_call(BACKWARD, 3, STOPS), SILENT, STEP_2, quick=False),
    lost("is killed in a backward pass", 1, at_call(BACKWARD, 3, KILLS), SILENT, STEP_2, quick=False),
    lost("is stopped in scoring", 1, at_call(SCORING, 3, STOPS), SILENT, STEP_2, quick=False),
    lost("is killed in scoring", 1, at_call(SCORING, 3, KILLS), SILENT, STEP_2, quick=False),
    lost(
        "is stopped in an evaluation", 1, at_call(EVALUATION, 2, STOPS), SILENT, STEP_4, options=EVALUATED, quick=False
    ),
    lost("is killed in an evaluation", 1, at_call(EVALUATION, 2, KILLS), SILENT, STEP_4, options=EVALUATED),
    lost("is stopped in a save", 1, at_call(WRITES, 1, STOPS), SILENT, STEP_2, options=SAVED, quick=False),
    lost("is killed in a save", 1, at_call(WRITES, 1, KILLS), SILENT, STEP_2, options=SAVED),
    lost("is killed in a save", 0, at_call(WRITES, 1, KILLS), "cannot be reached", options=SAVED, quick=False),
    lost(
        "is killed in a second save",
        0,
        at_call(PUBLISHES, 2, KILLS),
        "cannot be reached",
        STEP_2,
        options=SAVED,
        quick=False,
    ),
    lost("is killed in the final save", 0, at_call(FINAL_SAVE, 2, KILLS), "cannot be reached", "checkpoint-4"),
    lost("is stopped in scoring", 0, at_call(SCORING, 3, STOPS), SILENT, "`ddp_timeout`", quick=False),
    lost("is stopped in a save", 0, at_call(WRITES, 1, STOPS), SILENT, options=SAVED, quick=False),
    lost("is stopped while it builds the model", 1, at_call(BUILDING, 1, STOPS), SILENT, resumes=False, quick=False),
    lost("is killed while it builds the model", 1, at_call(BUILDING, 1, KILLS), SILENT, resumes=False),
    hangs(1),
    hangs(0, quick=False),
    Fault(
        "ranks",
        "rank 1 fails in a backward pass",
        Resumes(
            ByRank(OneLine(1, "Rank 1 has failed after step 2: RuntimeError: bad kernel"), OneLine(1, "bad kernel"))
        ),
        inject=on(1, at_call(BACKWARD, 3, raises(RuntimeError("bad kernel")))),
        options=OPTIONS,
        processes=2,
        limit=90.0,
    ),
    Fault(
        "ranks",
        "rank 1 never starts",
        ByRank(OneLine(1, "The 2 processes", "did not come together", "`ddp_timeout`"), KILLED),
        inject=on(1, lambda child: KILLS()),
        options=OPTIONS,
        processes=2,
        limit=90.0,
    ),
    Fault(
        "ranks",
        "rank 1 has a shorter stream",
        OneLine(1, "do not have the same data for step 3: `batches` (1 and 0)", STEP_2),
        inject=on(1, fetches_nothing_in_step_3),
        options=OPTIONS,
        processes=2,
        limit=90.0,
    ),
    differs("rank 1 has another seed", with_words("--seed", "7"), "Rank 0 and rank 1", "`seed` ('42' and '7')"),
    differs(
        "rank 1 samples more completions",
        with_words("--num_completions", "4"),
        "`num_completions` ('2' and '4')",
        quick=False,
    ),
    differs("rank 1 makes more steps", with_words("--max_steps", "7"), "`max_steps` ('4' and '7')", quick=False),
    differs("rank 1 has fewer prompts", with_words("--dataset_limit", "6"), "`rows of train_dataset` (8 and 6)"),
]
