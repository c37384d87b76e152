"""Run files whose judge is a folder with PairRM that has learned something, or a function of one pair."""

import random

import pytest
import torch

from online_dpo.scoring.judges.adapters import FunctionJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.judges.pairwise.pairrm import DebertaV2PairRM
from online_dpo.scoring.judges.pairwise.reader import padded
from support import tiny
from support.endpoint import comparison
from support.pairwise_folders import pairrm_folder, pairrm_tokenizer
from support.run_files import fill_folder, trainer_of, write_run_file
from support.training import trainer as in_python

FEEDBACK = """
def words(text):
    return sum(len(word) == 2 for word in text.split())

def count_words(completions, **_):
    return [float(words(text)) for text in completions]

def more_words(prompt, first, second):
    if words(first) == words(second):
        return None
    return 0.75 if words(first) > words(second) else 0.25
"""


def words(text):
    return sum(len(word) == 2 for word in text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("run"), FEEDBACK, prompts=24)


def trainer(folder, **fields):
    return trainer_of(write_run_file(folder, **{"max_steps": 6, "learning_rate": 3e-2, "beta": 0.01, **fields}))


def random_comparisons(count, rng):
    """Prompt and two answers, of which one has more words of two letters."""

    def text(most):
        return " ".join(rng.choice(tiny.WORDS[:39]) for _ in range(rng.randint(1, most)))

    made = ((text(6), text(8), text(8)) for _ in iter(int, 1))
    return [next(d for d in made if words(d[1]) != words(d[2])) for _ in range(count)]


def learn(folder, steps=100):
    """Fit a fresh PairRM to that, without dropout, and save it over itself."""
    pairrm_folder(folder, num_hidden_layers=1, initializer_range=0.1)
    model = DebertaV2PairRM.from_pretrained(folder)
    reader, rng = PairwiseModelJudge(model, pairrm_tokenizer()).reader, random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = random_comparisons(32, rng)
        log_odds = model(*padded(reader.token_ids([comparison(a, b, prompt=p) for p, a, b in batch]), 0, model.device))
        label = torch.tensor([float(words(a) > words(b)) for _, a, b in batch])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.mark.slow
def test_a_policy_learns_what_pairrm_has_learned(folder):
    learn(folder / "house")
    gold = dict(eval_reward_funcs="feedback.py:count_words", eval_dataset_name="data.jsonl", eval_on_start=True)
    made = trainer(folder, judge="house", judge_kwargs={"batch_size": 32}, eval_strategy="steps", eval_steps=6, **gold)
    assert isinstance(made.judge, PairwiseModelJudge) and made.judge.name == "house"
    asked = random_comparisons(200, random.Random(1))
    told = made.judge.prefer([comparison(a, b, prompt=p) for p, a, b in asked])
    assert sum((p > 0.5) == (words(a) > words(b)) for p, (_, a, b) in zip(told, asked, strict=True)) > 180
    made.judge.drain()
    made.train()
    first, last = (log for log in made.state.log_history if "eval_gold_score" in log)
    error = (first["eval_gold_score_stderr"] ** 2 + last["eval_gold_score_stderr"] ** 2) ** 0.5
    assert last["eval_gold_score"] - first["eval_gold_score"] > 4 * error
    logs = [log for log in made.state.log_history if "judge/duels" in log]
    assert len(logs) == 6 and all(log["judge/too_long"] == log["judge/failed"] == 0 for log in logs)


def test_a_function_of_one_pair_in_a_run_file(folder):
    made = trainer(folder, judge="feedback.py:more_words", num_completions=2, max_steps=1)
    assert isinstance(made.judge, FunctionJudge) and made.judge.name == "more_words"
    made.train()
    log = next(log for log in made.state.log_history if "prompts" in log)
    assert log["pairs/count"] > 0 and log["pairs/probability"] == pytest.approx(0.75)
    assert log["pairs/count"] + log["dropped/no_answer"] + log.get("dropped/identical", 0) == 8


def test_the_folder_of_a_pairwise_model_in_python(tmp_path):
    pairrm_folder(tmp_path / "house")

    def preferences(judge):
        made = in_python(tmp_path, reward_funcs=None, kwargs={"judge": judge}, num_completions=2)
        return made.judge.prefer([comparison("w1 w2", "w3"), comparison("w4", "w5 w6")])

    named = preferences(str(tmp_path / "house"))
    assert named == preferences(PairwiseModelJudge.load(str(tmp_path / "house"))) and named[0] != 0.5


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("llm", r"`judge` needs settings: give `LLMJudge\(model=..., ...\)`"),
        ("/nowhere/house", "`judge`: there is no folder '/nowhere/house'"),
        (7, "`judge` must have `name` and .* path of a pairwise model; this is int 7"),
    ],
)
def test_a_judge_that_is_none_is_refused_before_a_model_is_loaded(tmp_path, judge, message):
    with pytest.raises((TypeError, ValueError), match=message):
        in_python(tmp_path, model="a/model-that-does-not-exist", reward_funcs=None, kwargs={"judge": judge})
