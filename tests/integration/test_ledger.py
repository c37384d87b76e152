"""The record of each group of a step: log-ratios of tokens against one sequence at a time, in every layout, with passes
made again, accumulated and skipped; and the same records in a resumed run."""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from online_dpo import OnlineDPOTrainer
from support import tiny
from support.endpoint import serving
from support.llm_judges import judge_of, longer_wins
from support.recorded import TakesRecords, trained_pairs, without_seconds
from support.training import LORA, config, dataset, trainer, weights, word_reward

TOKENS_WITH_ROOM = 30
BETA = 0.1


class WeightsBefore(TrainerCallback):
    """The policy as each step found it."""

    def __init__(self, made: OnlineDPOTrainer) -> None:
        self.models: list[torch.nn.Module] = []
        made.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        copied = tiny.causal_lm(sharpness=1.0)
        copied.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        self.models.append(copied.eval())


@torch.no_grad()
def logps(model: Any, prompt: Any, completion: Any) -> torch.Tensor:
    """The log-probability of each token of a completion: one sequence, no padding, no mask."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    every = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    start = len(prompt.token_ids)
    return torch.stack([every[start - 1 + i, token] for i, token in enumerate(completion.token_ids)])


def out_of_memory(where: str) -> Any:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if len(gradient) > TOKENS_WITH_ROOM:
                raise torch.OutOfMemoryError("no room for the backward pass")
            return gradient

    def hook(module: Any, args: Any, output: Any) -> Any:
        if module.training and where == "forward" and len(output[0]) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the forward pass")
        return (Failing.apply(output[0]), output[1]) if module.training and where == "backward" else None

    return hook


class Feedbacks(TrainerCallback):
    """The feedback of each step, whose prompts and completions have token ids."""

    def __init__(self, made: OnlineDPOTrainer) -> None:
        self.made, self.all = made, []
        made.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.all.append(self.made.last_feedback)


CASES: dict[str, dict[str, Any]] = {
    "shared": dict(share_prompts=True),
    "padded": dict(share_prompts=False),
    "accumulated": dict(gradient_accumulation_steps=3, per_device_train_batch_size=2),
    "passes": dict(max_tokens_per_pass=40, per_device_train_batch_size=6),
    "all_pairs": dict(num_completions=4, pair_selection="all_pairs"),
    "forward": dict(per_device_train_batch_size=6, gradient_accumulation_steps=2),
    "backward": dict(per_device_train_batch_size=6, gradient_accumulation_steps=2, share_prompts=False),
    "xpo": dict(method="xpo"),
}


@pytest.mark.parametrize("case", CASES)
def test_log_ratios_are_those_of_one_sequence_at_a_time(tmp_path, case):
    model = tiny.causal_lm(sharpness=1.0)
    if case in ("forward", "backward"):
        model.register_forward_hook(out_of_memory(case))
    start = copy.deepcopy(tiny.causal_lm(sharpness=1.0)).eval()
    made = trainer(tmp_path, model=model, max_steps=2, learning_rate=1e-2, beta=BETA, **CASES[case])
    taken, before, feedbacks = TakesRecords(made), WeightsBefore(made), Feedbacks(made)
    made.train()

    assert {row["step"] for row in taken.rows} == {1, 2}
    checked = moved = 0
    for row, pair in trained_pairs(taken.rows):
        group = feedbacks.all[row["step"] - 1].groups[row["index"]]
        policy, sums = before.models[row["step"] - 1], []
        for k in (pair["chosen"], pair["rejected"]):
            record, completion = row["completions"][k], group.completions[k]
            expected = logps(policy, group.prompt, completion)
            reference = logps(start, group.prompt, completion)
            assert record["log_ratios"] == pytest.approx((expected - reference).tolist(), abs=1e-5)
            assert record["logp"] == pytest.approx(float(expected.sum()), abs=1e-4)
            assert record["ref_logp"] == pytest.approx(float(reference.sum()), abs=1e-4)
            assert len(record["tokens"]) == len(record["log_ratios"]) == record["length"]
            moved += max(map(abs, record["log_ratios"])) > 1e-3
            sums.append(float((expected - reference).sum()))
        implied = BETA * (sums[0] - sums[1])
        assert pair["implied"] == pytest.approx(implied, abs=1e-4)
        if case != "xpo":
            assert pair["loss"] == pytest.approx(math.log1p(math.exp(-implied)), abs=1e-4)
        checked += 1
    logs = [log for log in made.state.log_history if "pairs/count" in log]
    assert checked == sum(log["pairs/count"] for log in logs) > 4
    assert moved > 0  # the second step has another policy than the reference
    if case in ("forward", "backward"):
        assert made.passes.tokens_that_fit < 200


def test_every_group_of_a_step_has_a_row_that_adds_up_to_the_log(tmp_path):
    made = trainer(tmp_path, max_steps=3, missing_eos_penalty=0.5, length_penalty=0.25, num_completions=3)
    taken = TakesRecords(made)
    made.train()
    for log in [log for log in made.state.log_history if "pairs/count" in log]:
        rows = taken.of(log["step"])
        assert [(row["rank"], row["index"], row["round"]) for row in rows] == [(0, i, 0) for i in range(4)]
        assert sum(len(row.get("pairs", [])) for row in rows) == log["pairs/count"]
        reasons = [row["reason"] for row in rows if "reason" in row]
        assert all(("reason" in row) != ("pairs" in row) for row in rows)
        dropped = {name.partition("/")[2]: count for name, count in log.items() if name.startswith("dropped/")}
        assert {r: reasons.count(r) for r in dropped} == {r: int(count) for r, count in dropped.items()}
        for row in rows:
            assert row["columns"] == {"name": f"row {row['prompt_row']}"}
            for completion in row["completions"]:
                [raw] = word_reward([completion["text"]])
                penalties = {"missing_eos": 0.5} if completion["finish"] == "length" else {}
                penalties["length"] = 0.25 * completion["length"]
                assert completion["rewards"] == completion["weighted"] == {"word_reward": raw}
                assert completion["penalties"] == penalties
                assert completion["score"] == raw - sum(penalties.values())
                assert completion["version"] == log["step"] - 1 and completion["author"] == "policy"
            trained = {k for pair in row.get("pairs", []) for k in (pair["chosen"], pair["rejected"])}
            assert trained == {k for k, one in enumerate(row["completions"]) if "tokens" in one}


def test_recording_changes_nothing_that_is_computed_and_off_keeps_nothing(tmp_path):
    plain, on = (trainer(tmp_path / name, max_steps=3) for name in ("plain", "on"))
    taken = TakesRecords(on)
    for made in (plain, on):
        made.train()
    assert all(torch.equal(weights(plain.model)[name], weight) for name, weight in weights(on.model).items())
    assert taken.rows and plain.ledger.take(3) == []


def test_a_step_that_is_not_finite_is_marked(tmp_path):
    def hook(module, args, output):
        if module.training and made.state.global_step == 1:
            return output[0] * float("nan"), output[1]

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    made = trainer(tmp_path, model=model, max_steps=3)
    taken = TakesRecords(made)
    made.train()
    assert made.guard.skipped == 1
    assert all(row.get("skipped", False) == (row["step"] == 2) for row in taken.rows)
    skipped = trained_pairs(taken.of(2))
    assert skipped and all("loss" not in pair for _, pair in skipped)
    assert all(ratio is None for row, pair in skipped for ratio in row["completions"][pair["chosen"]]["log_ratios"])


def test_a_step_without_a_pair_has_rows_too(tmp_path):
    def tied_in_step_1(completions, trainer_state, **_):
        return word_reward(completions) if trainer_state.global_step else [0.0] * len(completions)

    made = trainer(tmp_path, reward_funcs=tied_in_step_1, max_steps=2)
    taken = TakesRecords(made)
    made.train()
    assert [row.get("reason") for row in taken.of(1)] == ["tie"] * 4
    assert not any("tokens" in completion for row in taken.of(1) for completion in row["completions"])
    assert trained_pairs(taken.of(2)) and not any("skipped" in row for row in taken.rows)


def test_losses_without_a_reference_have_no_ratios(tmp_path):
    made = trainer(tmp_path, max_steps=1, loss_type="simpo", reference_free=True)
    taken = TakesRecords(made)
    made.train()
    pairs = trained_pairs(taken.rows)
    assert pairs
    for row, pair in pairs:
        chosen = row["completions"][pair["chosen"]]
        assert chosen["logp"] == pytest.approx(chosen["sampled_logp"], abs=1e-4)
        assert len(chosen["tokens"]) == chosen["length"]
        assert not {"log_ratios", "ref_logp"} & set(chosen) and "implied" not in pair and pair["loss"] > 0


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_groups_of_a_step_are_recorded(tmp_path, most):
    every, some = (trainer(tmp_path / name, max_steps=3) for name in ("every", "some"))
    of_all, of_some = TakesRecords(every), TakesRecords(some, most)
    for made in (every, some):
        made.train()
    rows = without_seconds(of_all.rows)
    assert all(len(of_some.of(step)) == most for step in (1, 2, 3))
    assert all(row in rows for row in without_seconds(of_some.rows))


@pytest.mark.parametrize("ahead", [{}, {"max_staleness": 2}])
def test_a_resumed_run_has_the_same_records(tmp_path, ahead):
    fields = dict(max_steps=5, save_strategy="steps", save_steps=2, num_completions=3, learning_rate=1e-2, **ahead)
    whole = trainer(tmp_path / "whole", **fields)
    expected = TakesRecords(whole, most=3)
    whole.train()
    stopped = trainer(tmp_path / "resumed", **{**fields, "max_steps": 5})
    stopped.add_callback(StopsAt(2))
    before = TakesRecords(stopped, most=3)
    stopped.train()
    resumed = trainer(tmp_path / "resumed", **fields)
    after = TakesRecords(resumed, most=3)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in after.rows] == [3] * 3 + [4] * 3 + [5] * 3
    assert without_seconds(before.rows + after.rows) == without_seconds(expected.rows)
    stale = [row["step"] - 1 - row["completions"][0]["version"] for row in expected.rows]
    assert max(stale) == (2 if ahead else 0)


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


# rounds and notes -----------------------------------------------------------------------------------------------------


def noted_coin(completions, log_extra, log_metric, **_):
    """0 or 1 by the text, and three columns: one of numbers, one of its own kind, one of bytes."""
    scores = [float(zlib.crc32(text.strip().encode()) % 2) for text in completions]
    log_extra("coin", scores)
    log_extra("shown", [f"<{text}>" for text in completions])
    log_extra("raw", [text.encode() for text in completions])
    return scores


def test_prompts_that_are_answered_again_have_a_row_for_each_round(tmp_path):
    made = trainer(tmp_path, reward_funcs=noted_coin, resample_rounds=2, max_steps=3, per_device_train_batch_size=8)
    taken, feedbacks = TakesRecords(made), Feedbacks(made)
    made.train()
    logs = {log["step"]: log for log in made.state.log_history if "pairs/count" in log}
    again = 0
    for step, feedback in enumerate(feedbacks.all, start=1):
        rows = taken.of(step)
        assert [(row["index"], row["round"]) for row in rows] == sorted((row["index"], row["round"]) for row in rows)
        rounds = [(range(8), feedback.groups), *((one.places, one.groups) for one in feedback.further)]
        texts = {(i, r): [c.text for c in g.completions] for r, (p, gs) in enumerate(rounds) for i, g in zip(p, gs)}  # noqa: B905
        assert {(row["index"], row["round"]): [c["text"] for c in row["completions"]] for row in rows} == texts
        for row in rows:
            last = (row["index"], row["round"] + 1) not in texts
            scores = [completion["score"] for completion in row["completions"]]
            assert row["notes"]["coin"] == scores
            assert row["notes"]["shown"] == [f"<{completion['text']}>" for completion in row["completions"]]
            assert row["notes"]["raw"] == [{"left_out": "bytes"}] * 2
            if scores[0] != scores[1]:
                assert last and row["pairs"][0]["margin"] == 1.0 and "reason" not in row
            else:
                same = row["completions"][0]["text"] == row["completions"][1]["text"]
                assert row["reason"] == ("tie" if last else "resampled") and "pairs" not in row
                assert same or row.get("resampled_for") == (None if last else "tie")
        again += sum(row["round"] > 0 for row in rows)
        assert logs[step]["resample/groups"] == sum(row["round"] == 1 for row in rows)
        assert logs[step].get("dropped/tie", 0) == sum(row.get("reason") == "tie" for row in rows)
    assert again > 3


def test_chats_columns_and_bytes(tmp_path):
    columns = {"label": ["red"] * 12, "image": [b"\x89PNG"] * 12, "nested": [{"a": [1, 2.5]}] * 12}
    made = trainer(tmp_path, train_dataset=dataset(**columns), max_steps=1)
    taken = TakesRecords(made)
    made.train()
    for row in taken.rows:
        assert row["columns"] == {"label": "red", "nested": {"a": [1, 2.5]}, "name": f"row {row['prompt_row']}"}
        assert row["columns_left_out"] == ["image"]
        assert isinstance(row["prompt"], str) and row["prompt_length"] > 0 and row["prompt_cut"] is False
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(12)])
    made = OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=lambda completions, **_: [float(len(one[0]["content"])) for one in completions],
        args=config(tmp_path),
        train_dataset=chats,
        processing_class=tiny.tokenizer(chat=True),
    )
    taken = TakesRecords(made)
    made.train()
    assert [row["prompt"] for row in taken.rows] == [chats[row["prompt_row"]]["prompt"] for row in taken.rows]


def test_a_judge_s_comparisons_stand_in_the_rows(tmp_path):
    with serving(longer_wins) as endpoint:
        made = trainer(
            tmp_path,
            reward_funcs=None,
            kwargs={"judge": judge_of(endpoint)},
            num_completions=4,
            max_steps=2,
            missing_eos_penalty=0.5,
        )
        taken = TakesRecords(made)
        made.train()
    logs = {log["step"]: log for log in made.state.log_history if "pairs/count" in log}
    for step in (1, 2):
        compared = [(row, one) for row in taken.of(step) for one in row.get("comparisons", [])]
        assert len(compared) == logs[step]["judge/duels"] > 4
        for row, comparison in compared:
            texts = [row["completions"][comparison[which]]["text"] for which in ("first", "second")]
            assert [order["shown"] for order in comparison["orders"]] == [
                [comparison["first"], comparison["second"]],
                [comparison["second"], comparison["first"]],
            ]
            longer = [order["words"] == "A" for order in comparison["orders"]]
            assert longer[0] == (len(texts[0]) > len(texts[1])) and longer[1] == (len(texts[1]) > len(texts[0]))
    assert not any("score" in completion for row in taken.rows for completion in row["completions"])
    for _, pair in trained_pairs(taken.rows):
        assert pair["margin"] is None and 0.5 < pair["probability"] < 1
    penalties = [completion.get("penalties") for row in taken.rows for completion in row["completions"]]
    assert {"missing_eos": 0.5} in penalties and None in penalties


def test_lora_has_the_policy_without_its_adapter_as_reference(tmp_path):
    made = trainer(tmp_path, kwargs={"peft_config": LoraConfig(**LORA)}, max_steps=2, learning_rate=1e-1)
    taken, feedbacks = TakesRecords(made), Feedbacks(made)
    made.train()
    start = tiny.causal_lm(sharpness=1.0).eval()
    moved = 0.0
    for row, pair in trained_pairs(taken.rows):
        group = feedbacks.all[row["step"] - 1].groups[row["index"]]
        record = row["completions"][pair["chosen"]]
        reference = logps(start, group.prompt, group.completions[pair["chosen"]])
        assert record["ref_logp"] == pytest.approx(float(reference.sum()), abs=1e-4)
        assert sum(record["log_ratios"]) == pytest.approx(record["logp"] - record["ref_logp"], abs=1e-4)
        moved = max(moved, *map(abs, record["log_ratios"]))
    assert moved > 1e-3
