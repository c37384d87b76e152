"""Collectives in one process, and in two real ones."""

import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import online_dpo
from online_dpo.distributed import collectives
from online_dpo.distributed.collectives import RankErrors
from online_dpo.distributed.waiting import WAITS
from online_dpo.errors import FeedbackLostError, ForeignCodeError, ScoringError

CPU = torch.device("cpu")

PROGRAM = textwrap.dedent("""
    import math, os, sys, torch, torch.distributed as dist
    from online_dpo.distributed.collectives import *
    from online_dpo.distributed.collectives import RankErrors
    from online_dpo.errors import FeedbackLostError, ScoringError

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
    cpu = torch.device("cpu")
    assert world_size() == 2 and is_first_rank() == (rank == 0)
    assert any_rank(rank == 1, cpu) and not any_rank(False, cpu)
    mine = torch.tensor([1.5, 2.0 * rank])
    assert sum_over_ranks(mine).tolist() == [3.0, 2.0] and mine.tolist() == [1.5, 2.0 * rank]
    assert max_over_ranks(torch.tensor([rank, -rank])).tolist() == [1, 0]
    assert math.isnan(max_over_ranks(torch.tensor([math.nan if rank else 7.0]))[0])
    assert from_every_rank({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert from_first_rank([rank, "x"]) == [0, "x"]
    errors = RankErrors(cpu)
    def action():
        if rank == 1:
            raise ScoringError("away")
        return 3
    try:
        errors.run(action)
    except ScoringError as error:
        assert rank == 1 and str(error) == "away"
    except FeedbackLostError as error:
        assert rank == 0 and "Another process" in str(error)
    else:
        raise AssertionError("nothing was raised")
    assert errors.raised

    def around(inner):  # one rank fails before the others come to what is inside, or in there; all end together
        outer, parts = RankErrors(cpu), RankErrors(cpu)
        def action():
            if rank == 1 and not inner:
                raise ScoringError("before")
            def part():
                if rank == 1:
                    raise ValueError("inside")
            try:
                parts.run(part)
            except ValueError as error:
                raise ScoringError("inside") from error
            return from_first_rank("never reached")
        try:
            outer.run(action)
        except (ScoringError, FeedbackLostError) as error:
            assert isinstance(error, ScoringError) == (rank == 1) and outer.raised
        else:
            raise AssertionError("nothing was raised")
        assert from_every_rank(rank) == [0, 1]  # nobody is left in another operation
    around(inner=False)
    around(inner=True)
    try:
        raise_first_ranks(ValueError("first") if rank == 0 else ValueError("second"))
    except ValueError as error:
        assert str(error) == "first"
    dist.destroy_process_group()
""")


def test_one_process_is_the_identity():
    values = torch.tensor([1.0, 2.0])
    assert collectives.world_size() == 1 and collectives.is_first_rank()
    assert collectives.any_rank(True, CPU) and not collectives.any_rank(False, CPU)
    assert collectives.sum_over_ranks(values).equal(values) and collectives.max_over_ranks(values).equal(values)
    assert collectives.from_every_rank("x") == ["x"] and collectives.from_first_rank("x") == "x"
    collectives.raise_first_ranks(None)
    with pytest.raises(ValueError, match="mine"):
        collectives.raise_first_ranks(ValueError("mine"))


def raising(error):
    raise error


def test_errors_of_every_class_are_raised_together_and_ctrl_c_at_once():
    errors = RankErrors(CPU)
    assert errors.run(lambda: 3) == 3 and not errors.raised
    with pytest.raises(KeyboardInterrupt):
        errors.run(lambda: raising(KeyboardInterrupt()))
    assert not errors.raised
    for error in (ZeroDivisionError("x"), SystemExit(0), MemoryError(), GeneratorExit()):
        errors.begin_run()
        with pytest.raises(type(error)):
            errors.run(lambda error=error: raising(error))
        assert errors.raised
    errors.begin_run()
    with pytest.raises(LookupError):  # there is no other rank to wait for
        errors.defer(LookupError("at once"))
    with pytest.raises(ScoringError, match="away"):
        errors.raise_if_any(ScoringError("away"))
    assert errors.raised and not isinstance(ScoringError("away"), FeedbackLostError)
    errors.begin_run()
    assert not errors.raised


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    source = str(Path(online_dpo.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), address], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]


def test_facts_that_differ_between_ranks_are_named(monkeypatch):
    def on_three_ranks(facts):
        return [facts, facts, {**facts, "seed": "7", "rows": 3, "new": 1, "last": 2}]

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "from_every_rank", lambda facts: [facts] * 3)
    collectives.check_same({"seed": "42"}, "settings")
    monkeypatch.setattr(collectives, "from_every_rank", on_three_ranks)
    message = (
        "Rank 0 and rank 2 do not have the same settings: `seed` ('42' and '7'), `rows` (4 and 3), `new` (None and 1) "
        "and 1 more. Start all processes with the same program, options, data and models."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        collectives.check_same({"seed": "42", "rows": 4}, "settings")
    errors = RankErrors(torch.device("cpu"))
    with pytest.raises(ForeignCodeError, match="do not have the same settings"):
        errors.check_same({"seed": "42", "rows": 4}, "settings")
    assert errors.raised  # all ranks together, so that they can save


def test_a_process_without_others_is_the_only_one_for_a_while():
    with collectives.without_others():
        assert (collectives.world_size(), collectives.is_first_rank(), collectives.from_every_rank(3)) == (1, True, [3])
        assert collectives.processes_of_run() == 1


def test_what_nccl_only_queues_is_waited_for_where_a_notice_and_an_error_know_for_whom(monkeypatch):
    """On tensors that are on a GPU by name only, in a group of torch's that does nothing."""
    seen = []
    stream = SimpleNamespace(synchronize=lambda: seen.append([wait.who for wait in WAITS.innermost() if wait.on_ranks]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with FakeTensorMode():
            collectives.sum_over_ranks(torch.empty(2, device="cuda"))
            collectives.max_over_ranks(torch.empty(2, device="cuda"))
            collectives.sum_over_ranks(torch.empty(2))
    finally:
        dist.destroy_process_group()
    assert seen == [["the other processes"]] * 2
