"""Scripts in the manner of TRL's examples, of which only the import of two names was changed, run as processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from support import tiny
from support.processes import environment, run_python
from support.training import config, dataset, trainer, word_reward

ONLINE_DPO = """
import json
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl import ModelConfig, ScriptArguments, TrlParser
from trl import get_peft_config, get_quantization_config
from trl.trainer.callbacks import LogCompletionsCallback

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, OnlineDPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    quantization_config = get_quantization_config(model_args)
    model_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        use_cache=False if training_args.gradient_checkpointing else True,
        device_map="auto" if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        training_args.reward_model_path, num_labels=1, trust_remote_code=training_args.trust_remote_code, **model_kwargs
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = OnlineDPOTrainer(
        model=model,
        reward_funcs=reward_model,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    if training_args.eval_strategy != "no":
        generation_config = GenerationConfig(
            max_new_tokens=training_args.max_new_tokens, do_sample=True, temperature=training_args.temperature
        )
        trainer.add_callback(LogCompletionsCallback(trainer, generation_config, num_prompts=2))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    print(json.dumps(trainer.state.log_history))
"""

GRPO_REWARDS = """
import json
from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

def chat(function):
    def text_reward(completions, **kwargs):
        return function([[{"role": "assistant", "content": text}] for text in completions], **kwargs)
    return text_reward

def unlike_answer(prompts, completions, completion_ids, trainer_state, answer, log_extra=None, log_metric=None, **_):
    shares = [len(set(text.split())) / max(1, len(ids)) for text, ids in zip(completions, completion_ids)]
    if log_extra:
        log_extra("answer", list(answer))
        log_extra("share", shares)
    if log_metric:
        log_metric("different_words", sum(shares) / len(shares))
        log_metric("step", trainer_state.global_step)
    return shares

async def only_for_some(prompts, completions, **kwargs):
    return [None if len(prompt) % 2 else float(len(text)) for prompt, text in zip(prompts, completions)]

if __name__ == "__main__":
    (training_args,) = HfArgumentParser(OnlineDPOConfig).parse_args_into_dataclasses()
    trainer = OnlineDPOTrainer(
        model="policy",
        reward_funcs=[unlike_answer, only_for_some, get_soft_overlong_punishment(8, 4), chat(think_format_reward)],
        args=training_args,
        train_dataset=load_dataset("data", split="train"),
        eval_dataset=load_dataset("data", split="test"),
        processing_class=AutoTokenizer.from_pretrained("policy"),
    )
    trainer.train()
    print(json.dumps([trainer.state.log_history, trainer.completions]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model, and prompts in two splits."""
    folder = tmp_path_factory.mktemp("scripts")
    tiny.causal_lm(sharpness=1.0).save_pretrained(folder / "policy")
    reward = LlamaForSequenceClassification(tiny.config("llama", num_labels=1))
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split, count in (("train", 8), ("test", 2)):
        rows = [{"prompt": prompt.content, "answer": str(prompt.row)} for prompt in tiny.prompts([4, 5] * (count // 2))]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(folder: Path, script: str, *words: str) -> list:
    """What the script printed last."""
    (folder / "script.py").write_text(script)
    own = environment(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "cache"))
    done = run_python("script.py", *words, cwd=folder, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


FEW = ("--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4")
SHORT = ("--report_to", "none", "--max_new_tokens", "8", "--max_length", "64", "--save_strategy", "no")


@pytest.mark.slow
def test_the_online_dpo_script_runs_with_its_command_line_and_its_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model_name_or_path: policy\nreward_model_path: reward\ndataset_name: data\noutput_dir: out\n"
        "learning_rate: 5e-5\nmissing_eos_penalty: 1.0\nbeta: [0.1]\neval_strategy: steps\neval_steps: 2\n"
    )
    peft = ("--use_peft", "--lora_r", "4", "--gradient_checkpointing", "false")
    history = run(folder, ONLINE_DPO, "--config", "run.yaml", *FEW, *SHORT, *peft)
    assert [log["step"] for log in history if "loss" in log] == [1, 2]
    assert all(log["objective/scores"] == log["objective/scores"] for log in history if "loss" in log)
    assert any("eval_win_rate" in log for log in history)
    assert (folder / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_reward_functions_of_grpo_run_unchanged(folder: Path) -> None:
    words = ("--output_dir", "out2", "--loss_type", "ipo", "--num_completions", "3", "--reward_weights", *"1111")
    history, table = run(folder, GRPO_REWARDS, *words, *FEW, *SHORT, "--eval_strategy", "steps", "--eval_steps", "2")
    first, second = [log for log in history if "loss" in log]
    assert (first["step"], second["step"]) == (1, 2)
    assert first["scores/text_reward"] == 0  # nothing stands in <think> tags
    assert first["scores/soft_overlong_punishment_reward"] <= 0
    assert [log for log in history if "eval_loss" in log][0]["eval_different_words"] > 0
    assert set(table) >= {"prompt", "completion", "unlike_answer", "only_for_some", "answer", "share"}
    assert table["share"] == table["unlike_answer"] and len(table["prompt"]) == 4 * 3
    assert second["different_words"] == pytest.approx(sum(table["share"]) / 12)
    assert second["different_words"] == pytest.approx(second["scores/unlike_answer"])


def test_attributes_are_read_under_trl_s_names(tmp_path: Path, folder: Path) -> None:
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    made = trainer(
        tmp_path,
        reward_funcs=[reward, word_reward],
        kwargs={"eval_dataset": dataset((3, 4)), "reward_processing_classes": [tiny.tokenizer(), None]},
        reward_model_path=f"{folder}/./reward/",  # the same folder, written in another way
        reward_weights=[1.0, 0.5],
        beta=[0.2, 0.1],
        generation_kwargs={"stop_strings": ["w1"]},
        top_k=5,
    )
    assert made.reward_funcs == [reward, word_reward]
    assert made.reward_func_names == ["reward", "word_reward"]
    assert [type(tokenizer) for tokenizer in made.reward_processing_classes] == [type(tiny.tokenizer()), type(None)]
    assert made.reward_weights.tolist() == [1.0, 0.5]
    assert made.beta == 0.2 and made.num_generations == 2 and made.max_length == 64 and made.top_k == 5
    assert made.generation_config.max_new_tokens == 8 and made.generation_config.do_sample
    assert made.generation_config.top_k == 5 and made.generation_config.stop_strings == ["w1"]
    assert made.generation_config.eos_token_id == made.eos_token_ids == [tiny.EOS]
    assert made.eval_dataset["prompt"] == dataset((3, 4))["prompt"]
    assert made.ref_model is not None and made.ref_model is not made.model
    assert made.vllm_mode is None and made.use_vllm is False and made.judge is None
    assert made.completions == {} and made.stats == {}
    made.metrics.mean("objective/kl", [1.0, 3.0])
    assert made.stats == {"objective/kl": [2.0]}


@pytest.mark.parametrize("rewards", [["other"], [word_reward]])
def test_another_reward_model_path_beside_rewards_is_refused(tmp_path: Path, rewards: list) -> None:
    with pytest.raises(ValueError, match="`reward_model_path` is given beside `reward_funcs`, none of which"):
        trainer(tmp_path, reward_funcs=rewards, reward_model_path="owner/reward")


def test_the_same_reward_model_named_twice_counts_once(tmp_path: Path, folder: Path) -> None:
    made = trainer(tmp_path, reward_funcs=str(folder / "reward"), reward_model_path=str(folder / "reward"))
    assert len(made.scorers) == 1
    assert config(tmp_path).reward_model_path is None
