"""`Evaluator`, built alone: what is recorded of held-out prompts, against the reference and by gold."""

import pytest
import torch

from online_dpo.evaluation.evaluator import Evaluator, ReferenceAnswers
from online_dpo.evaluation.gold import Gold
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.reference import FrozenReference
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, Stream
from online_dpo.scoring.assess import Assessor
from online_dpo.scoring.judges.adapters import FunctionJudge
from support import tiny
from support.stages import pair_former, sampler, words
from support.training import config, word_reward

PROMPTS = tiny.prompts([5, 9, 3, 7])


def texts(groups):
    return [[completion.text for completion in group.completions] for group in groups]


class Parts:
    """An evaluator and the real parts that it works with; ``asked`` counts the prompts of each `sync`."""

    def __init__(self, tmp_path, scorers=None, judge=None, gold=None, with_reference=True):
        self.args = config(tmp_path)
        self.sampler, self.asked = sampler(self.args), []
        enable_logprobs(self.sampler.policy)
        self.other = tiny.causal_lm(seed=3, sharpness=1.0)
        reference = FrozenReference(self.other, "another model")
        engine = TransformersEngine(self.other, tiny.tokenizer())
        self.answers = ReferenceAnswers(reference, engine, self.sampler) if with_reference else None
        self.evaluator = Evaluator(
            lambda: 2,
            self.sampler,
            Assessor([words()] if scorers is None else scorers, judge),
            pair_former(self.args),
            self.losses,
            self.answers,
            gold,
        )

    def losses(self, model, groups, pairs):
        rows = pack_groups(groups, pairs, shared=False)
        with torch.no_grad():
            policy = row_logprobs(model, rows)
        return rows, {"loss_N": torch.arange(1.0, len(pairs) + 1), "policy": policy, "reference": None}

    def evaluate(self, prompts=PROMPTS):
        groups = self.evaluator.sample(prompts, lambda given: self.asked.append(len(given)))
        return self.evaluator.evaluate(self.sampler.policy, groups)

    def policy_groups(self):
        key = RolloutKey(42, 0, Stream.EVALUATION)
        return self.sampler.engine.generate(PROMPTS, 2, self.sampler.params, key)

    def reference_groups(self):
        engine = TransformersEngine(self.other, tiny.tokenizer())
        return engine.generate(PROMPTS, 1, self.sampler.params, RolloutKey(42, 0, Stream.REFERENCE))


@pytest.mark.smoke
def test_scores_and_wins_against_the_reference_are_those_of_its_own_completions(tmp_path):
    parts = Parts(tmp_path)
    records = parts.evaluate()
    scores = [word_reward(group) for group in texts(parts.policy_groups())]
    reference = [word_reward(group)[0] for group in texts(parts.reference_groups())]
    assert [list(record.scores) for record in records] == scores
    assert [record.reference_score for record in records] == reference
    expected = [sum((s > r) + (s == r) / 2 for s in own) / 2 for own, r in zip(scores, reference, strict=True)]
    assert [record.win for record in records] == expected and len(set(expected)) > 1
    decided = [p for p, (first, second) in enumerate(scores) if first != second]
    losses = [record.losses for record in records]
    assert losses == [(decided.index(p) + 1.0,) if p in decided else () for p in range(4)]
    assert parts.asked == [4] and [record.prompt_ids for record in records] == [p.token_ids for p in PROMPTS]


def test_two_evaluations_are_the_same_and_the_reference_is_asked_once(tmp_path):
    parts = Parts(tmp_path)
    first = parts.evaluate()
    parts.answers.engine.generate = None
    assert parts.evaluate() == first and parts.evaluate([]) == [] and parts.asked == [4, 4, 0]


def test_a_judge_compares_with_the_reference(tmp_path):
    def more_words(prompt, first, second):
        return 0.75 if len(first.split()) > len(second.split()) else 0.25

    parts = Parts(tmp_path, scorers=[], judge=FunctionJudge(more_words))
    records = parts.evaluate()
    pairs = zip(texts(parts.policy_groups()), texts(parts.reference_groups()), strict=True)
    assert [record.win for record in records] == [
        0.5 if own[0] == other[0] else more_words("", own[0], other[0]) for own, other in pairs
    ]
    assert all(record.reference_score is None and set(record.scores) == {None} for record in records)


def test_gold_says_what_training_does_not_see(tmp_path):
    gold = Gold([words("gold", lambda completions, **_: [-float(len(t.split())) for t in completions])], None)
    parts = Parts(tmp_path, gold=gold)
    records = parts.evaluate()
    assert [record.gold.scores for record in records] == [
        tuple(-float(len(text.split())) for text in group) for group in texts(parts.policy_groups())
    ]
    reference = [-float(len(group[0].split())) for group in texts(parts.reference_groups())]
    for record, score in zip(records, reference, strict=True):
        assert record.gold.win == sum((s > score) + (s == score) / 2 for s in record.gold.scores) / 2


def test_without_a_reference_there_is_no_win_rate(tmp_path):
    parts = Parts(tmp_path, with_reference=False)
    assert {(record.win, record.reference_score) for record in parts.evaluate()} == {(None, None)}


def test_where_memory_runs_out_losses_are_computed_in_halves_and_the_records_stay(tmp_path):
    expected = Parts(tmp_path).evaluate()
    parts, sizes = Parts(tmp_path), []
    plain = parts.losses

    def room(model, groups, pairs):
        sizes.append(len(groups))
        if len(groups) > 1:
            raise torch.OutOfMemoryError("no room")
        rows, outputs = plain(model, groups, pairs)
        return rows, outputs | {"loss_N": torch.full((len(pairs),), 9.0)}

    parts.evaluator._losses = room
    records = parts.evaluate()
    assert sizes == [4, 2, 1, 1, 1, 1] and len(parts.asked) == 1
    for ours, theirs in zip(records, expected, strict=True):
        assert ours.losses == tuple(9.0 for _ in theirs.losses)
        assert (ours.scores, ours.win, ours.reference_score) == (theirs.scores, theirs.win, theirs.reference_score)
        assert (ours.lengths, ours.prompt_ids) == (theirs.lengths, theirs.prompt_ids)
        assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-5)
