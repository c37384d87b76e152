"""Other packages: what is private in them and used here is there, and the versions that are tested are what is said."""

import ast
import importlib
import inspect
import os
import re
import tomllib
import warnings
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from online_dpo import versions
from online_dpo.config.requirements import sharding_problem
from online_dpo.training.hf_trainer import GuardedTrainer
from online_dpo.training.trainer import OnlineDPOTrainer
from support import tiny, training
from support.processes import run_python

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/online_dpo"
OPTIONS = {"_devices"}
MODULE = {"_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}
PRIVATE = {
    "_wrap_model": lambda: Trainer._wrap_model,
    "_n_gpu": lambda: inspect.getsource(TrainingArguments).index("return self._n_gpu"),
    "_VALID_DICT_FIELDS": lambda: TrainingArguments._VALID_DICT_FIELDS,
    "_attn_implementation": lambda: transformers.PreTrainedConfig._attn_implementation,
    "_is_stateful": lambda: PreTrainedModel._is_stateful,
    "_supports_attention_backend": lambda: PreTrainedModel._supports_attention_backend,
    "_name_or_path": lambda: transformers.PreTrainedConfig().name_or_path,
    **{name: lambda name=name: vars(nn.Linear(1, 1))[name] for name in MODULE},
    "_linear_pointwise": lambda: torch.ops.mkldnn._linear_pointwise,
    "_reorder_linear_weight": lambda: torch.ops.mkldnn._reorder_linear_weight,
    "_index_put_impl_": lambda: torch.ops.aten._index_put_impl_.default,
    "_to_copy": lambda: torch.ops.aten._to_copy.default,
    "_inductor": lambda: importlib.import_module("torch._inductor").list_mode_options,
    "_Options": lambda: torch.distributed.ProcessGroupGloo._Options,
    **{name: lambda name=name: getattr(torch.distributed.ProcessGroupGloo._Options(), name) for name in OPTIONS},
    "_exit": lambda: os._exit,
    "_get_default_store": lambda: torch.distributed.distributed_c10d._get_default_store,
    "_shared_state": lambda: (PartialState._shared_state, AcceleratorState._shared_state),
    "_option_string_actions": lambda: ArgumentParser()._option_string_actions,
    "_C": lambda: torch._C,
    "_cuda_endAllocateToPool": lambda: torch._C._cuda_endAllocateToPool,  # a dummy where torch is built without CUDA
    "_cuda_releasePool": lambda: torch._C._cuda_releasePool,
    "_dynamo": lambda: torch._dynamo.maybe_mark_dynamic,
    "_compiled_call_impl": lambda: nn.Module._compiled_call_impl,
    "_scaled_dot_product_efficient_attention": lambda: torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""What other packages do not promise, and how it is found."""
OTHERS = {"_finalizer"}
"""Of vLLM, which has an environment of its own."""
SHARDING = {
    "torch.nn.modules.module": ("_non_persistent_buffers_set",),
    "torch.nn.parallel.distributed": ("_comm_hooks", "_sync_buffers"),
    "torch.distributed.fsdp._fully_shard._fully_shard": ("_get_fsdp_state", "reset_iter_state"),
    "torch.distributed.fsdp._fully_shard._fsdp_state": ("_fsdp_param_groups", "_lazy_init"),
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": ("_all_gather_comm", "_reduce_scatter_comm"),
    "torch.distributed.fsdp._fully_shard._fsdp_param": ("_unsharded_param",),
    "accelerate.state": ("_mixed_precision", "_reset_state"),
    "transformers.trainer": ("_load_scaler",),
    "transformers.integrations.deepspeed": ("_hf_deepspeed_config_weak_ref",),
    "deepspeed.runtime.base_optimizer": ("_backward_hook_state",),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "_clear_previous_reduced_grads",
        "_release_ipg_buffers",
        "_release_preflattened_grad_buffers",
    ),
    "deepspeed.runtime.zero.stage3": (
        "_get_norm_groups",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("_invalidate_trace",),
    "deepspeed.runtime.zero.parameter_offload": ("_in_forward",),
    "deepspeed.utils.tensor_fragment": ("_hp_mapping",),
}
"""What `distributed/` uses of the packages that shard, by the module whose source has it."""
IN_SHARDING = {name: module for module, names in SHARDING.items() for name in names}


def private_names():
    """Private attributes that the package reads or sets, and does not define itself."""
    used, own = set(), set()
    for node in (node for file in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            (own if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
    return used - own


def test_all_that_is_private_elsewhere_is_in_the_list():
    assert private_names() == PRIVATE.keys() | OTHERS | IN_SHARDING.keys() - {"reset_iter_state"}


@pytest.mark.parametrize("name", sorted(IN_SHARDING))
def test_what_is_private_where_weights_are_sharded_is_there(name):
    module = IN_SHARDING[name]
    if module.startswith("torch.distributed.fsdp") and sharding_problem("fsdp"):
        pytest.skip("FSDP2 is refused with this torch")
    pytest.importorskip(module.partition(".")[0])
    assert re.search(rf"\b{name}\b", inspect.getsource(importlib.import_module(module)))


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_what_is_private_elsewhere_is_there(name):
    PRIVATE[name]()


OVERRIDDEN = sorted(
    (cls.__name__, name)
    for cls in (GuardedTrainer, OnlineDPOTrainer)
    for name, value in vars(cls).items()
    if inspect.isfunction(value) and hasattr(Trainer, name) and not name.startswith("__")
)
REFUSED = {"create_model_card": {"tasks", "dataset", "dataset_args"}}
"""Arguments that ours do not take."""
TRAINER = inspect.getsource(Trainer)
CALLED_BY_US = {"train", "evaluate", "predict", "save_state"}
"""Which a user calls; all others are called by `Trainer` itself."""


INSTEAD = {"compute_loss", "create_model_card", "evaluation_loop", "get_batch_samples", "save_state"}
"""In whose place ours stand; all others end in the parent's."""


def test_what_overrides_is_still_there_to_be_overridden():
    for cls in (GuardedTrainer, OnlineDPOTrainer):
        names_of_parent = re.findall(r"super\(\)\.(\w+)\(", inspect.getsource(cls))
        assert names_of_parent and [n for n in names_of_parent if not any(n in vars(c) for c in cls.__mro__[1:])] == []
    assert {name for _, name in OVERRIDDEN} >= INSTEAD


def test_private_methods_of_trainer_are_overridden_in_one_file():
    private = {owner for owner, name in OVERRIDDEN if name.startswith("_")}
    assert private == {"GuardedTrainer"} and GuardedTrainer.__module__ == "online_dpo.training.hf_trainer"


def test_one_class_of_ours_stands_between_trainer_and_the_stages():
    ours = [cls for cls in OnlineDPOTrainer.__mro__ if cls.__module__.startswith("online_dpo.")]
    assert ours == [OnlineDPOTrainer, GuardedTrainer]


@pytest.mark.parametrize("owner,name", OVERRIDDEN)
def test_trainer_calls_what_is_overridden_as_it_is_overridden(owner, name):
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(vars(globals()[owner])[name]).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert takes_all or ours.keys() | REFUSED.get(name, set()) >= theirs.keys()
    assert name in CALLED_BY_US or f"self.{name}(" in TRAINER


def test_what_trainer_reads_and_writes():
    for read in ("model_accepts_loss_kwargs", "callback_handler", "state.max_steps", "control.should_training_stop"):
        assert f"self.{read}" in TRAINER
    assert {"end_of_dataloader", "remainder"} <= set(dir(GradientState))


def test_what_adapters_are_asked():
    model = get_peft_model(tiny.causal_lm(), LoraConfig(target_modules=["q_proj"]))
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert (layer.disable_adapters, list(layer.active_adapters), layer.merged_adapters) == (False, ["default"], [])


# --- versions that are tested ---------------------------------------------------------------------------------------


def test_versions_out_of_range_are_named():
    inside = {name: oldest for name, (oldest, _) in versions.TESTED.items()}
    assert versions.untested(inside) == []
    assert versions.untested({name: f"{newest}.9+cpu" for name, (_, newest) in versions.TESTED.items()}) == []
    assert versions.untested({**inside, "transformers": "5.25.0", "peft": "0.17.1"}) == [
        "transformers 5.25.0 (5.17 to 5.24)",
        "peft 0.17.1 (0.18 to 0.21)",
    ]
    assert versions.untested({"torch": "3.0", "accelerate": "1.12.9"}) == [
        "torch 3.0 (2.11 to 2.14)",
        "accelerate 1.12.9 (1.13 to 1.15)",
    ]


def installed(tmp_path, **packages):
    """A folder that makes Python find these versions before all others."""
    for name, version in packages.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(tmp_path)


SAYS = "online-dpo has not been tested with transformers 5.99.0 (5.17 to 5.24)"


def test_python_is_told_of_untested_versions_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed(tmp_path, transformers="5.99.0"))
    versions.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=re.escape(SAYS)):
        versions.warn_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_once()
        versions.warn_once.cache_clear()
        monkeypatch.setenv("RANK", "1")
        versions.warn_once()


def test_the_warning_comes_before_anything_that_may_break_is_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('too new')")
    path = installed(tmp_path, transformers="5.99.0")
    code = f"import sys; sys.path[:0] = [{path!r}]; from online_dpo import OnlineDPOTrainer"
    said = run_python("-c", code).stderr
    assert SAYS in said and said.index(SAYS) < said.index("too new")


def test_the_command_says_it_too(tmp_path, capsys, monkeypatch):
    from online_dpo.cli.runfile.planning import run_checked

    monkeypatch.syspath_prepend(installed(tmp_path, transformers="5.99.0"))
    assert run_checked(["--x"], usage="", help=str, plan=lambda file, words: None, run=lambda *given: 0) == 0
    assert f"warning: {SAYS}" in capsys.readouterr().err


def test_ranges_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ranges = dict(re.match("([a-z]+)(.*)", line).groups() for line in [*project["dependencies"], *extras["peft"]])
    oldest = pinned("constraints-oldest.txt")
    for name, (lowest, newest) in versions.TESTED.items():
        low, high = re.fullmatch(r">=([\d.]+),<([\d.]+)", ranges[name]).groups()
        assert low == lowest and versions.Version(oldest[name]) == versions.Version(lowest)
        assert versions.Version(newest) < versions.Version(high)
    everything = [*project["dependencies"], *extras["peft"], *extras["judge"], *extras["bench"]]
    for line in everything:  # the oldest environment holds the lower bound of every range that has one
        found = re.match(r"([A-Za-z_]+)>=([\d.]+)", line)
        if found:
            name, low = found.groups()
            assert versions.Version(oldest[name.lower()]) == versions.Version(low), line


def pinned(file):
    lines = (ROOT / file).read_text().lower().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


# --- two names for one option ---------------------------------------------------------------------------------------

NEW_NAMES = "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}


def test_checkpointing_is_on_and_its_name_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        default = training.OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        off = training.config(tmp_path, gradient_checkpointing=False)
        kept = training.config(
            tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        )
    assert (default.gradient_checkpointing, off.gradient_checkpointing) == (True, False)
    assert kept.gradient_checkpointing_kwargs == {"use_reentrant": True}
    if NEW_NAMES:
        assert (default.activation_checkpointing, off.activation_checkpointing) == (True, False)
        assert kept.activation_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.skipif(not NEW_NAMES, reason="this version of transformers knows the old name alone")
def test_the_new_name_comes_first_where_it_is_given(tmp_path):
    args = training.OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=False)
    assert (args.gradient_checkpointing, args.activation_checkpointing) == (False, False)
