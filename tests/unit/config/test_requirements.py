"""Ordinary mistakes in settings: a package that is missing, a name that nothing has, a file that cannot be read."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import sys

import pytest
from transformers import BitsAndBytesConfig, trainer_optimizer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from online_dpo.cli.main import main
from online_dpo.config import quantization, requirements
from online_dpo.config.requirements import (
    OPTIMIZERS,
    QUANTIZATION,
    TRACKERS,
    Needs,
    adapter_problem,
    installed,
    problems,
)
from online_dpo.config.unsupported import FUSED_OPTIMIZERS
from support import shared_prefix, training
from support.run_files import fill_folder, write_run_file

REWARD = "def words(completions):\n    return [float(len(c.split())) for c in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("run"), REWARD)


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(requirements, "installed", lambda module: module != "bitsandbytes" and installed(module))


# --- the table against transformers ---------------------------------------------------------------------------------


def test_the_table_has_every_name_of_transformers():
    assert set(INTEGRATION_TO_CALLBACK) <= set(TRACKERS)
    assert {name.value for name in OptimizerNames} <= set(OPTIMIZERS)


def imported_by(function) -> set[str]:
    tree = ast.parse(inspect.getsource(function))
    imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in imports} - {"torch", "optimization"}


@pytest.mark.parametrize("name", sorted({name.value for name in OptimizerNames} - {*FUSED_OPTIMIZERS}))
def test_an_optimizer_needs_what_transformers_imports_for_it(name):
    needs = OPTIMIZERS[name]
    modules = set() if needs is None else {module.split("|")[0].split(".")[0] for module in needs.modules}
    assert imported_by(trainer_optimizer._OPTIMIZER_HANDLERS[name]) == modules


def test_alternatives_submodules_and_folders_of_a_like_name(tmp_path, monkeypatch):
    assert Needs("", "absent|yaml").missing == [] and Needs("", "absent|gone", "yaml").missing == ["absent"]
    assert installed("online_dpo.cli.main") and not installed("online_dpo.cli.absent") and not installed("no.such")
    (tmp_path / "swanlab").mkdir()  # as runs of trackers leave one in the working folder
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert not installed("swanlab")


# --- each kind of setting -------------------------------------------------------------------------------------------

MISSING = [
    (
        {"report_to": "swanlab"},
        "`report_to` 'swanlab' needs swanlab, not installed here. Install it with: pip install swanlab",
    ),
    ({"report_to": ["tensorboard", "dvclive"]}, "'dvclive' needs dvclive, .*: pip install dvclive$"),
    ({"report_to": "kubeflow"}, "works inside a Kubeflow TrainJob"),
    ({"report_to": "wandbb"}, "`report_to` is 'wandbb'; wanted: one of .*Did you mean `wandb`"),
    ({"optim": "adamw_bnb_8bit"}, "`optim` 'adamw_bnb_8bit' needs bitsandbytes, .*: pip install bitsandbytes"),
    ({"optim": "stable_adamw"}, "needs optimi, not installed here. Install it with: pip install torch-optimi"),
    ({"optim": "adamwtorch"}, "`optim` is 'adamwtorch'; wanted: .*Did you mean `adamw_torch`"),
    ({"torch_compile_backend": "tvm"}, "`torch_compile_backend` 'tvm' needs tvm, .*: pip install apache-tvm"),
    (
        {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
        "`attn_implementation` 'flash_attention_2' needs flash_attn, .*: pip install flash-attn",
    ),
    (
        {"model_init_kwargs": {"attn_implementation": "kernels-community/flash-attn"}},
        "`attn_implementation` 'kernels-community/flash-attn' needs kernels, .*: pip install kernels",
    ),
    (
        {"model_init_kwargs": {"quantization_config": {"quant_method": "gptq"}}},
        "`quantization_config` 'gptq' needs optimum and gptqmodel, .*: pip install optimum gptqmodel",
    ),
    (
        {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        "`quantization_config` 'bitsandbytes' needs bitsandbytes, .*: pip install 'online-dpo\\[qlora\\]'",
    ),
]
WRONG = [
    ({"torch_compile_backend": "indctor"}, "`torch_compile_backend` must be one of .*Did you mean `inductor`"),
    ({"torch_compile": True, "torch_compile_mode": "fast"}, "`torch_compile_mode` must be one of default, "),
    ({"deepspeed": "there/is/none.json"}, "`deepspeed` is .there.is.none.json., but there is no such file"),
    ({"optim_args": "momentum"}, "The optimizer `adamw_torch.*` cannot be made with these settings: it raised Value"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "The optimizer `sgd` .* raised ValueError: Invalid momentum value"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "The schedule `cosine_with_min_lr` .*One of min_lr or min_lr_rate"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "The schedule `warmup_stable_decay` .*num_decay_steps"),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1; it is 0"),
    ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be 0 or more; it is -1"),
    ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1; it is 0"),
    ({"cache_implementation": "fast"}, "`cache_implementation`: GenerationConfig raised ValueError: Invalid"),
    ({"generation_kwargs": {"stop_strings": 3}}, "`stop_strings` must be a text or a list of texts; it is 3"),
    ({"loss_type": "sigmoyd"}, "Did you mean `sigmoid`"),
]


@pytest.mark.parametrize(("fields", "message"), MISSING + WRONG)
def test_in_python_at_construction(tmp_path, without_bitsandbytes, fields, message):
    with pytest.raises(ValueError, match=message):
        training.config(tmp_path, **fields)


@pytest.mark.parametrize(("fields", "message"), MISSING)
def test_in_a_run_file_the_same_line_with_its_place(folder, capsys, without_bitsandbytes, fields, message):
    path = write_run_file(folder, reward_funcs="feedback.py:words", **fields)
    assert main(["train", str(path)]) == 2
    for said in capsys.readouterr().err.splitlines():
        assert said.startswith(f"error: {path}:") and f"`{next(iter(fields))}`" in said


def test_objects_of_transformers_as_well(without_bitsandbytes):
    found = problems({"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}})
    assert [name for name, _ in found] == ["model_init_kwargs"]
    assert not list(problems({"report_to": [], "optim": OptimizerNames.SGD, "model_init_kwargs": None}))


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "schedule_free_sgd"])
def test_what_is_installed_is_not_refused(tmp_path, monkeypatch, optim):
    monkeypatch.setattr(requirements, "installed", lambda module: True)
    if optim.startswith("schedule"):  # made with a number, which needs the package itself
        with pytest.raises(ValueError, match="cannot be made with these settings: it raised ImportError"):
            training.config(tmp_path, optim=optim)
    else:
        training.config(tmp_path, optim=optim)


# --- quantisation ---------------------------------------------------------------------------------------------------


def test_the_fields_of_bitsandbytes_are_those_of_transformers():
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    assert known == set(quantization.FIELDS) - {"quant_method"}


QUANTIZED = [
    ({"load_in_4bit": True}, "`load_in_4bit` belongs into `quantization_config`: write .*{load_in_4bit: true}"),
    ({"quantization_config": "nf4"}, "`quantization_config` is 'nf4'; wanted: a mapping"),
    ({"quantization_config": {}}, "says no `load_in_4bit: true`"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "says neither `load_in_4bit: true` nor"),
    ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "says both"),
    ({"quantization_config": {"load_in_4bit": "yes"}}, '`load_in_4bit` is "yes"; wanted: one of true, false'),
    (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}},
        "Did you mean `bnb_4bit_quant_type`",
    ),
    ({"quantization_config": {"load_in_4bit": True, "use_bnb_nested_quant": True}}, "mean `bnb_4bit_use_double_quant`"),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}}, 'is "nf5"; wanted: one of "nf4"'),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}}, 'one of "float32", "bfloat16"'),
]


@pytest.mark.parametrize(("options", "message"), QUANTIZED)
def test_settings_of_quantisation_are_checked_before_anything_loads(tmp_path, folder, capsys, options, message):
    with pytest.raises(ValueError, match=f"`model_init_kwargs`: .*{message}"):
        training.config(tmp_path, model_init_kwargs=options)
    path = write_run_file(folder, reward_funcs="feedback.py:words", use_peft=True, model_init_kwargs=options)
    assert main(["train", str(path)]) == 2
    assert re.search(f"^error: {path}:.*{message}", capsys.readouterr().err)


def test_settings_as_transformers_saves_them():
    saved = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    assert not [*quantization.settings_problems({"quantization_config": saved})]
    assert quantization.quantised_as("owner/model", {"quantization_config": saved}) == "bitsandbytes"
    assert quantization.quantised_as("owner/model", {"quantization_config": {"quant_method": "gptq"}}) == "gptq"
    opened = {"quantization_config": {"quant_method": "gptq", "dequantize": True}}
    assert quantization.quantised_as("owner/model", opened) is quantization.quantised_as("owner/model", None) is None


@pytest.mark.parametrize("given", [{"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, {}])
def test_a_run_file_with_a_quantised_model_and_no_adapter(tmp_path, capsys, given):
    fill_folder(tmp_path, REWARD)
    if not given:
        config = json.loads((tmp_path / "policy/config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "policy/config.json").write_text(json.dumps(config))
    path = write_run_file(tmp_path, reward_funcs="feedback.py:words", **given)
    assert main(["train", str(path)]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "(bitsandbytes) needs an adapter: quantised weights themselves cannot be trained. Set `use_peft" in said


# --- files and folders ----------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "run"):
        with pytest.raises(ValueError, match=f"`output_dir` is {output}, but {file} is no folder"):
            training.trainer(output)


def test_an_adapter_without_peft(folder, monkeypatch, capsys):
    shutil.copytree(folder / "policy", folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert adapter_problem(str(folder / "adapter")) is None
    monkeypatch.setattr(requirements, "installed", lambda module: module != "peft")
    path = write_run_file(folder, reward_funcs="feedback.py:words")
    words = ["--model_name_or_path", str(folder / "adapter")]
    assert main(["train", str(path), *words]) == 2
    assert "holds an adapter, which needs peft. Install it with: pip install 'online-dpo[peft]'" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="`model`: .* holds an adapter, which needs peft"):
        training.trainer(folder / "out", model=str(folder / "adapter"))


DAMAGED = [("model.safetensors", b"no weights"), ("tokenizer.json", b"{"), ("config.json", b"{")]


@pytest.mark.parametrize(("file", "content"), DAMAGED)
def test_a_damaged_model_folder_is_named(folder, capsys, file, content):
    damaged = folder / f"damaged-{file}"
    shutil.copytree(folder / "policy", damaged)
    (damaged / file).write_bytes(content)
    path = write_run_file(folder, reward_funcs="feedback.py:words")
    assert main(["train", str(path), "--model_name_or_path", str(damaged)]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(damaged) in said


def test_a_damaged_reward_model_is_named(folder):
    damaged = folder / "reward"
    shared_prefix.reward_model().save_pretrained(damaged)
    shared_prefix.tokenizer().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"{damaged}.*model.safetensors"):
        training.trainer(folder / "out", reward_funcs=str(damaged))


def test_methods_of_quantisation_that_the_table_has():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    names = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    assert set(QUANTIZATION) <= names
