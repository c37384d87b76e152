"""Decoding steps whose layers are compiled before they are captured: a third of the kernels, and fewer bytes.

A layer of a step is a few matrix products with many small operations between them, each of which reads and writes
memory. The compiler (Inductor) makes one kernel of those that stand together.

One code serves all layers of a kind, because a layer is given only its own part of the key/value cache
(`StaticKVLayer`) and its weights as inputs. The numbers of sequences and slots are symbols in it, so one code serves
most graphs too; single sequences, or one completion for each prompt, are compiled anew. Embeddings, the last norm and
the head are not compiled: they run once in a step.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from online_dpo.errors import is_out_of_memory, named_error
from online_dpo.modeling.compiling import recompilation_limit
from online_dpo.modeling.introspection import decoder_layers
from online_dpo.modeling.patching import replaced_forwards
from online_dpo.rollout.builtin.sampling import draw_tokens
from online_dpo.runs import events

if TYPE_CHECKING:
    from online_dpo.rollout.builtin.static_decoding import StaticKVCache, StaticKVLayer

logger = logging.getLogger(__name__)

MOST_CODES = 64
"""Compiled codes for layers. Dynamo's own limit is 8, after which it says nothing and runs what it should compile. A
layer that passes this one is not compiled any more, which is told."""
BACKEND = "inductor"
LAYER_OPTIONS: dict[str, Any] = {"split_reductions": False}
"""Of the compiler: a softmax over the slots is one kernel. It would be split, since a step has few rows, into five."""

Result = TypeVar("Result")


class StepCompiler:
    """Compiles the layers of decoding steps, and the draw of tokens.

    What cannot be compiled is run as it is: this is told once, and then not tried again.

    Args:
        wanted: otherwise everything is run as it is.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._running = False
        self._told_seconds = False

    def run(self, step: Callable[[], Result]) -> Result:
        """Runs a step, compiled if possible. It may be called twice, so it must write the same values each time."""
        if not self.wanted:
            return step()
        try:
            return self._run(step)
        except Exception as error:  # the model's code is unknown, and so is what a compiler makes of it
            if is_out_of_memory(error):
                raise
            from torch._dynamo.exc import FailOnRecompileLimitHit  # slow to import, and in use by now if at all

            too_many = isinstance(error, FailOnRecompileLimitHit)
            self.give_up(f"it takes more than {MOST_CODES} codes" if too_many else named_error(error, first_line=True))
            return step()

    def ready(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """What to capture in place of a step, after it has been run: its compiled form, or the step itself."""
        self.run(step)
        return functools.partial(self._run, step) if self.wanted else step

    def give_up(self, reason: str) -> None:
        """Runs everything as it is from now on, and says why."""
        self.wanted = False
        text = f"Sampling steps are not compiled, so that they take longer: {reason}."
        events.warn(logger, "warning", text)

    @contextmanager
    def in_layers(self, model: nn.Module, kv_cache: StaticKVCache) -> Iterator[None]:
        """Inside, while a step is run compiled, the model's layers are compiled. They read their part of the cache."""
        if not self._running:
            yield
            return
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for index, layer in _layers_by_index(model).items():
            forwards |= _readable_forwards(layer)
            forwards[layer] = functools.partial(_forward, layer, kv_cache.step_layer(index))
        with replaced_forwards(forwards), _compiler_limits():
            yield

    def draw(self, logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`draw_tokens`, compiled while a step is run compiled: it passes over the logits fewer times."""
        if not self._running:
            return draw_tokens(logits_BV, uniform_B)
        _let_vary(logits_BV, 0)
        _let_vary(uniform_B, 0)
        with _compiler_limits():
            return _compiled(draw_tokens, BACKEND)(logits_BV, uniform_B)

    def _run(self, step: Callable[[], Result]) -> Result:
        begin, self._running = time.perf_counter(), True
        try:
            result = step()
        finally:
            self._running = False
        if not self._told_seconds:
            self._told_seconds = True
            seconds = time.perf_counter() - begin
            text = f"The first compiled sampling step was ready in {seconds:.0f} s."
            logger.info("%s", text)
            events.emit("compilation", text, seconds=seconds)
        return result


def _layers_by_index(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers, by the index under which their attention keeps keys and values.

    Raises:
        ValueError: there is nothing to compile: the model has no stack of layers, or something owns their ``forward``.
    """
    if any(module._compiled_call_impl is not None or "_orig_mod" in vars(module) for module in model.modules()):
        raise ValueError("the model is compiled already")
    layers = decoder_layers(model)
    if layers is None:
        raise ValueError("the model has no list of decoder layers")
    if any("forward" in vars(layer) for layer in layers):
        raise ValueError("a hook or wrapper owns the `forward` of the model's layers")
    found = {}
    for layer in layers:
        [index] = {vars(module)["layer_idx"] for module in layer.modules() if "layer_idx" in vars(module)}
        found[index] = layer
    return found


def _readable_forwards(layer: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The partial functions that replace forwards inside of a layer (`cast_linears`), as functions.

    Dynamo compiles a layer anew for each partial object that it finds as ``forward``, but not for each function of the
    same code, whose variables become inputs.
    """
    found = {module: vars(module)["forward"] for module in layer.modules() if "forward" in vars(module)}
    return {module: _as_function(forward) for module, forward in found.items() if type(forward) is functools.partial}


def _as_function(forward: functools.partial[Any]) -> Callable[..., Any]:
    function, bound = forward.func, forward.args

    def call(*args: Any) -> Any:
        return function(*bound, *args)

    return call


def _forward(layer: nn.Module, kv_layer: StaticKVLayer, /, *args: Any, **kwargs: Any) -> Any:
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, torch.Tensor):
            _let_vary(tensor, 0)
            if tensor.dim() == 4:  # the mask
                _let_vary(tensor, 3)
    for tensor in vars(kv_layer.layer).values():
        _let_vary(tensor, 0)
        _let_vary(tensor, 2)
    return _compiled(_layer_forward, BACKEND)(layer, args, {**kwargs, "kv_cache": kv_layer})


def _layer_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward: Any = type(layer).forward
    return forward(layer, *args, **kwargs)


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function compiled as a whole: what the compiler cannot read is an error, so it is told."""
    options = LAYER_OPTIONS if function is _layer_forward and backend == "inductor" else None
    return torch.compile(function, fullgraph=True, backend=backend, options=options)


def _let_vary(tensor: torch.Tensor, dim: int) -> None:
    """Makes the size in this dimension a symbol; all others, those of weights above all, are constants of the code."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


@contextmanager
def _compiler_limits() -> Iterator[None]:
    """Inside, many codes are allowed; and sizes that are equal by chance do not become one symbol in them."""
    own_sizes = torch.fx.experimental._config.patch(use_duck_shape=False)  # pyright: ignore
    with recompilation_limit(MOST_CODES), own_sizes:
        yield
