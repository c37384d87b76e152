"""Functions that Inductor compiles: for any length, with a limit of their own, and told where it cannot be done."""

import logging

import torch

from online_dpo.modeling import compiling
from online_dpo.modeling.compiling import CompiledFunction
from online_dpo.modeling.memory import in_memory


def test_one_graph_for_all_lengths_and_the_values_of_the_function():
    def function(x, y):
        return (x * y[:, None]).exp().sum(dim=-1)

    compiled = CompiledFunction(function)
    compiled(torch.randn(5, 4), torch.randn(5))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (2, 3, 17):
        x, y = torch.randn(length, 4), torch.randn(length)
        torch.testing.assert_close(compiled(x, y), function(x, y))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_more_variants_than_dynamos_own_limit(caplog):
    def function(x):
        return x * 2

    compiled = CompiledFunction(function)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for columns in range(2, 14):
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            assert compiled(torch.ones(3, columns)).sum() == 6 * columns
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 12
    assert not [record for record in caplog.records if record.name == compiling.__name__]


def test_a_limit_that_is_reached_is_told(caplog, monkeypatch):
    def function(x):
        return x * 3

    monkeypatch.setattr(compiling, "RECOMPILATIONS", 1)
    compiled = CompiledFunction(function)
    with caplog.at_level(logging.WARNING, compiling.__name__):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert compiled(torch.ones(3, 2, dtype=dtype)).sum() == 18
    [record] = [record for record in caplog.records if record.name == compiling.__name__]
    assert "`function` could not be compiled and runs uncompiled" in record.message


def test_a_compiler_that_fails_is_told_once_and_the_function_runs_as_it_is(caplog):
    def function(x):
        return x * 5

    def no_compiler(graph, inputs):
        raise ValueError("there is no C compiler here")

    compiled = CompiledFunction(function)
    compiled._compiled = torch.compile(function, backend=no_compiler)
    for _ in range(2):
        assert compiled(torch.ones(3, 2)).sum() == 30
    [record] = [record for record in caplog.records if record.name == compiling.__name__]
    assert "there is no C compiler here" in record.message


def test_memory_that_runs_out_in_the_compiler_is_no_reason_not_to_compile(caplog):
    def function(x):
        return x * 7

    calls = []

    def compiler(graph, inputs):
        calls.append(graph)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return graph.forward

    compiled = CompiledFunction(function)
    compiled._compiled = torch.compile(function, backend=compiler)
    with in_memory() as attempt:
        compiled(torch.ones(3, 2))
    assert not attempt.fits and attempt.reason.startswith("CUDA out of memory")
    assert compiled(torch.ones(3, 2)).sum() == 42 and len(calls) == 2
    assert not [record for record in caplog.records if record.name == compiling.__name__]


def test_under_a_count_of_operations_it_runs_uncompiled_and_is_not_given_up():
    from torch.utils.flop_counter import FlopCounterMode

    def function(x):
        return x @ x

    compiled = CompiledFunction(function)
    with FlopCounterMode(display=False) as counter:
        compiled(torch.ones(3, 3))
    assert counter.get_total_flops() == 2 * 27 and compiled._compiled is not None
