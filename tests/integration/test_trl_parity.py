"""The same completions, weights and scores through TRL's trainer and ours.

TRL is the incumbent. Where it is right we agree with it to 1e-6; `docs/start/from-trl.md` lists where it is not.
"""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl.experimental.online_dpo import OnlineDPOConfig as TRLConfig
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLTrainer

from online_dpo.packing.pack import pack_pairs
from online_dpo.pairing.select import pairs_from_scores
from online_dpo.types import Scores
from support import tiny
from support.training import config, trainer

PROMPT_LENGTHS = (4, 9, 6, 3)
COMPLETIONS = [
    [[5, 6, 7, 1], [8, 9, 10, 11, 12]],
    [[20, 1], [21, 22, 23, 24, 1]],
    [[30, 31, 32, 33, 34], [35, 36, 1]],
    [[40, 1], [41, 42, 43, 1]],
]
SCORES = [[1.0, -0.5], [0.25, 0.5], [2.0, 3.0], [-1.0, -2.0]]


def policy():
    return tiny.causal_lm(seed=1, sharpness=1.5)


def reference():
    return tiny.causal_lm(seed=2, sharpness=1.5)


def trl_step(tmp_path, loss_type, monkeypatch):
    """One TRL training step on given completions; returns its loss, its statistics and its per-token
    log-probabilities.
    """
    prompts = tiny.prompts(PROMPT_LENGTHS)
    block = [
        COMPLETIONS[p][k] for k in range(2) for p in range(4)
    ]  # TRL's order: all first completions, then all second ones
    scores = [SCORES[p][k] for k in range(2) for p in range(4)]
    made = TRLTrainer(
        model=policy(),
        ref_model=reference(),
        reward_funcs=lambda **_: scores,
        args=TRLConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            max_new_tokens=5,
            max_length=64,
            loss_type=loss_type,
            beta=[0.3],
        ),
        train_dataset=Dataset.from_list([{"prompt": p.content} for p in prompts]),
        processing_class=tiny.tokenizer(),
    )

    def given(model, texts, images=None):
        width, longest = max(PROMPT_LENGTHS), max(map(len, block))
        ids = [[tiny.PAD] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts] * 2
        mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts] * 2
        done = [c + [tiny.PAD] * (longest - len(c)) for c in block]
        done_mask = [[1] * len(c) + [0] * (longest - len(c)) for c in block]
        return *(torch.tensor(x) for x in (ids, mask, done, done_mask)), None

    kept = []
    forward = made._forward

    def keep(*args):
        kept.append(forward(*args))
        return kept[-1]

    monkeypatch.setattr(made, "_generate", given)
    monkeypatch.setattr(made, "_forward", keep)
    loss = made.training_step(made.model, {"prompt": [p.content for p in prompts]})
    return loss.item(), made.stats, kept, made


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_log_probabilities_and_gradient_equal_trls(tmp_path, monkeypatch, loss_type):
    trl_loss, stats, (trl_policy, trl_reference), trl_trainer = trl_step(tmp_path, loss_type, monkeypatch)
    made = trainer(
        tmp_path, model=policy(), kwargs={"ref_model": reference()}, loss_type=loss_type, beta=[0.3], max_new_tokens=5
    )
    groups = [tiny.group(p, c) for p, c in zip(tiny.prompts(PROMPT_LENGTHS), COMPLETIONS, strict=True)]
    pairs = pairs_from_scores(groups, Scores(SCORES, {})).pairs
    rows = pack_pairs(pairs, shared=True)
    made.model.train()
    loss, outputs = made.compute_loss(made.model, {"rows": rows}, return_outputs=True, num_items_in_batch=4)
    assert loss.item() == pytest.approx(trl_loss, rel=2e-6)  # rounding in fp32: ipo squares a sum

    for ours, theirs in ((outputs["policy"], trl_policy), (outputs["reference"], trl_reference)):
        of_completion = ours.token_logps_M.split(rows.length_S.tolist())
        for n, pair in enumerate(pairs):
            for s, k in ((rows.chosen_N[n], pair.chosen), (rows.rejected_N[n], pair.rejected)):
                completion, mine = COMPLETIONS[n][k], of_completion[s]
                torch.testing.assert_close(mine, theirs[k * 4 + n][: len(completion)], atol=1e-6, rtol=1e-6)

    loss.backward()
    for (name, mine), theirs in zip(made.model.named_parameters(), trl_trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)

    ours = made.metrics.drain()
    for name in (
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
    ):
        assert ours[name] == pytest.approx(stats[name][0], rel=1e-5, abs=1e-6), name


def test_where_trl_is_wrong_its_numbers_move_with_padding_and_ours_do_not(tmp_path, monkeypatch):
    """KL and entropy: TRL sums over padding too. The oracle is the sum over real tokens of its own
    log-probabilities.
    """
    _, stats, (trl_policy, trl_reference), _ = trl_step(tmp_path, "sigmoid", monkeypatch)
    made = trainer(tmp_path, model=policy(), kwargs={"ref_model": reference()}, max_new_tokens=5)
    groups = [tiny.group(p, c) for p, c in zip(tiny.prompts(PROMPT_LENGTHS), COMPLETIONS, strict=True)]
    pairs = pairs_from_scores(groups, Scores(SCORES, {})).pairs
    made.model.train()
    made.compute_loss(made.model, {"rows": pack_pairs(pairs, shared=True)}, num_items_in_batch=4)
    kl, entropy = [], []
    for p in range(4):
        for k in range(2):
            real = len(COMPLETIONS[p][k])
            kl.append((trl_policy - trl_reference)[k * 4 + p, :real].sum().item())
            entropy.append(-trl_policy[k * 4 + p, :real].sum().item())
    ours = made.metrics.drain()
    assert ours["objective/kl"] == pytest.approx(sum(kl) / 8, rel=1e-4, abs=1e-5)
    assert ours["objective/entropy"] == pytest.approx(sum(entropy) / 8, rel=1e-5)
    assert abs(stats["objective/entropy"][0] - sum(entropy) / 8) > 1  # the incumbent's, padding included


def test_every_field_of_trls_configuration_exists_with_the_same_name(tmp_path):
    from dataclasses import fields

    ours = {f.name for f in fields(config(tmp_path))}
    assert {f.name for f in fields(TRLConfig)} - ours == set()


def test_the_documented_example_of_trl_runs_with_the_import_changed(tmp_path, monkeypatch):
    """The example names hub models; here the same three names are folders with tiny models (Llama's, since for Qwen's
    transformers would put another decoder into the tiny tokenizer).
    """
    monkeypatch.chdir(tmp_path)
    tiny.causal_lm(sharpness=1.0, max_position_embeddings=512).save_pretrained("Qwen/Qwen2-0.5B-Instruct")
    tiny.tokenizer(chat=True).save_pretrained("Qwen/Qwen2-0.5B-Instruct")
    reward = LlamaForSequenceClassification(tiny.config("llama", num_labels=1))
    reward.save_pretrained("trl-lib/Qwen2-0.5B-Reward")
    tiny.tokenizer(chat=True).save_pretrained("trl-lib/Qwen2-0.5B-Reward")
    rows = [{"prompt": [{"role": "user", "content": p.content}]} for p in tiny.prompts([4] * 8)]
    Dataset.from_list(rows).to_parquet("trl-lib/ultrafeedback-prompt/train.parquet")

    example = EXAMPLE.replace("trl.experimental.online_dpo", "online_dpo")
    exec(compile(example, "example.py", "exec"), {})
    assert (tmp_path / "Qwen2-0.5B-OnlineDPO" / "checkpoint-3" / "model.safetensors").is_file()


EXAMPLE = """
from datasets import load_dataset
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
reward_model = AutoModelForSequenceClassification.from_pretrained("trl-lib/Qwen2-0.5B-Reward", num_labels=1)
train_dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")

training_args = OnlineDPOConfig(output_dir="Qwen2-0.5B-OnlineDPO")
trainer = OnlineDPOTrainer(
    model=model, reward_funcs=reward_model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset
)
trainer.train()
"""
