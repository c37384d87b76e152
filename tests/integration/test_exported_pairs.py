"""What `online-dpo export` writes is what TRL's trainers take: pairs for DPO, and a data set for a reward model."""

import pytest
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from online_dpo.cli.main import main
from support import records, tiny
from support.processes import run_python

QUICK = dict(max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1)
QUICK |= dict(save_strategy="no", gradient_checkpointing=False, bf16=False, max_length=64)


def exported(tmp_path, ending, chat):
    """Two pairs, as text or as conversations, read by `datasets`."""
    prompts = ["w1 w2 w3", "w4 w5"]
    groups = [
        records.group(
            step,
            [records.completion(" w6 w7", 2.0), records.completion(" w8", 0.5)],
            prompt=[{"role": "user", "content": prompt}] if chat else prompt,
        )
        for step, prompt in enumerate(prompts, start=1)
    ]
    file = tmp_path / f"pairs{ending}"
    assert main(["export", str(records.write(tmp_path / "run", groups)), "--to", str(file)]) == 0
    kind = "json" if ending == ".jsonl" else "parquet"
    return load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(("ending", "chat"), [(".jsonl", False), (".jsonl", True), (".parquet", True)])
def test_dpo_trains_on_it(tmp_path, ending, chat):
    dataset = exported(tmp_path, ending, chat)
    args = DPOConfig(output_dir=str(tmp_path / "out"), **QUICK)
    tokenizer = tiny.tokenizer(chat=chat)
    tiny.causal_lm().save_pretrained(tmp_path / "policy")
    trainer = DPOTrainer(model=str(tmp_path / "policy"), args=args, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)
    rows = trainer.train_dataset[0]
    shown = {name: tokenizer.decode(rows[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert "w1 w2 w3" in shown["prompt_ids"] and "w6 w7" in shown["chosen_ids"] and "w8" in shown["rejected_ids"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_trains_on_it_with_the_margins(tmp_path, chat):
    from transformers import LlamaForSequenceClassification

    dataset = exported(tmp_path, ".jsonl", chat)
    tokenizer = tiny.tokenizer(chat=chat)
    model = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, pad_token_id=tokenizer.pad_token_id))
    args = RewardConfig(output_dir=str(tmp_path / "out"), **QUICK)
    trainer = RewardTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert [row["margin"] for row in trainer.train_dataset] == [1.5, 1.5]
    assert "w6 w7" in tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])


def test_the_command_loads_nothing_of_torch(tmp_path):
    folder = records.write(
        tmp_path / "run", [records.group(1, [records.completion("a", 1.0), records.completion("b", 0.0)])]
    )
    code = (
        "import sys\nfrom online_dpo.cli.main import main\n"
        f"assert main(['export', {str(folder)!r}, '--to', {str(tmp_path / 'pairs.parquet')!r}]) == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
