"""Names of other trainers: each is answered with what it is called here, or what to do instead."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from online_dpo.cli.evaluation.options import CALLED_HERE as CALLED_IN_EVAL
from online_dpo.cli.evaluation.options import RUN_FIELDS
from online_dpo.cli.evaluation.plan import own_fields
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config.absent_settings import NOT_HERE
from online_dpo.config.names_elsewhere import ARGUMENTS, CALLED_HERE, IN_PYTHON, hint_for
from support import tiny
from support.training import config, dataset, word_reward

FIELDS = load_fields()


def classes_of_trl() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.experimental.online_dpo import OnlineDPOConfig as Theirs
    names = "ScriptArguments DatasetMixtureConfig ModelConfig DPOConfig GRPOConfig RLOOConfig KTOConfig SFTConfig"
    return [Theirs, *(getattr(trl, name) for name in names.split())]


@pytest.mark.parametrize("cls", classes_of_trl(), ids=lambda cls: cls.__name__)
def test_every_field_of_trl_s_classes_is_a_field_or_has_an_answer(cls: Any) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    assert [name for name in names if name not in FIELDS and name not in {**CALLED_HERE, **NOT_HERE}] == []


def test_the_tables_name_what_there_is() -> None:
    assert not CALLED_HERE.keys() & NOT_HERE.keys()
    assert not (CALLED_HERE.keys() | NOT_HERE.keys()) & FIELDS.keys()
    assert set(CALLED_HERE.values()) <= FIELDS.keys()
    assert set(IN_PYTHON.values()) <= FIELDS.keys()
    assert set(ARGUMENTS.values()) <= set(inspect.signature(OnlineDPOTrainer.__init__).parameters)
    assert set(CALLED_IN_EVAL.values()) <= {*own_fields(), *RUN_FIELDS}
    mentioned = {name for text in NOT_HERE.values() for name in re.findall(r"`([a-z_0-9]+)`", text)}
    assert mentioned - FIELDS.keys() == {"processing_class"}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_generations", " Here it is `num_completions`."),
        ("max_completion_length", " Here it is `max_new_tokens`."),
        ("torch_dtype", " Here it is `dtype`."),
        ("beta1", " Here it is `adam_beta1`."),
        ("batch-size", " Here it is `per_device_train_batch_size`."),
        ("actor_rollout_ref.rollout.n", " Here it is `num_completions`."),
        ("config", " The run file is the first word after the command, or `--config FILE`."),
        ("epsilon_high", f" {NOT_HERE['epsilon_high']}."),
        ("no_bf16", " Write `bf16: false`, or --bf16 false."),
        ("learning_rat", " Did you mean `learning_rate`?"),
        ("xyzzy", ""),
    ],
)
def test_answers(name: str, answer: str) -> None:
    assert hint_for(name, FIELDS) == answer


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_generations", "Here it is `num_completions`."),
        ("torch_dtype", "Here it is `model_init_kwargs`."),
        ("lr", "Here it is `learning_rate`."),
        ("log_unique_prompts", "With `run_folder` all answers are written down"),
        ("train_dataset", "`train_dataset` is an argument of `OnlineDPOTrainer`."),
        ("num_completion", "Did you mean `num_completions`?"),
    ],
)
def test_a_wrong_argument_of_the_configuration(name: str, answer: str) -> None:
    with pytest.raises(TypeError, match=f"`OnlineDPOConfig` has no argument `{name}`. {re.escape(answer)}"):
        OnlineDPOConfig(output_dir="out", **{name: 1})


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tokenizer", "Here it is `processing_class`."),
        ("config", "Here it is `args`."),
        ("beta", "`beta` is a field of `OnlineDPOConfig`, which is given as `args`."),
        ("reward_fn", "Here it is `reward_funcs`."),
        ("quantization_config", "In a run file: `load_in_4bit`"),
    ],
)
def test_a_wrong_argument_of_the_trainer(name: str, answer: str) -> None:
    with pytest.raises(TypeError, match=f"`OnlineDPOTrainer` has no argument `{name}`. {re.escape(answer)}"):
        OnlineDPOTrainer(model="owner/model", **{name: 1})


def test_subclasses_with_arguments_of_their_own(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class MyConfig(OnlineDPOConfig):
        mine: int = 1

    class MyTrainer(OnlineDPOTrainer):
        def __init__(self, *args: Any, mine: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = mine

    args = MyConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], mine=2)
    assert copy.deepcopy(args).mine == 2
    assert pickle.loads(pickle.dumps(config(tmp_path, num_completions=3))).num_completions == 3
    made = MyTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=word_reward,
        args=config(tmp_path),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
        mine=3,
    )
    assert made.mine == 3
