"""`FeedbackCollector`, built alone: which prompts it fetches, what it learns of them, and what it begins ahead."""

import pytest

from online_dpo.errors import ScoringError
from online_dpo.rollout.params import RolloutKey, Stream
from support import tiny
from support.stages import Run, batches, words
from support.training import LENGTHS, word_reward


def tokens(groups):
    return [[completion.token_ids for completion in group.completions] for group in groups]


def expected_groups(run, step, rows):
    prompts = tiny.prompts(LENGTHS)
    return run.sampler.engine.generate(
        [prompts[row] for row in rows], 2, run.sampler.params, RolloutKey(42, step, Stream.TRAINING)
    )


@pytest.mark.smoke
def test_pairs_are_the_best_and_worst_of_what_the_policy_samples(tmp_path):
    run = Run(tmp_path)
    pairing, num_batches = run.collector.collect(batches(run.args), 2)
    expected = expected_groups(run, 0, range(8))
    assert num_batches == 2 and tokens(run.collector.last.groups) == tokens(expected)
    scores = [word_reward([c.text for c in group.completions]) for group in expected]
    decided = [p for p, (first, second) in enumerate(scores) if first != second]
    assert [pair.group.prompt.row for pair in pairing.pairs] == decided and len(decided) not in (0, 8)
    assert [pair.chosen for pair in pairing.pairs] == [int(scores[p][1] > scores[p][0]) for p in decided]
    assert pairing.dropped == {"tie": 8 - len(decided)}
    metrics = run.metrics.drain()
    assert (metrics["prompts"], metrics["pairs/count"], metrics["dropped/tie"]) == (8, len(decided), 8 - len(decided))
    assert metrics["objective/scores"] == pytest.approx(sum(map(sum, scores)) / 16)
    assert {"time/rollout", "time/scoring", "time/sync", "time/waiting"} <= metrics.keys()


def test_the_last_step_fetches_what_is_left(tmp_path):
    run = Run(tmp_path)
    source = batches(run.args)
    assert [run.collector.collect(source, 2)[1] for _ in range(2)] == [2, 1]


def test_steps_are_begun_ahead_with_the_weights_of_now_and_only_those_that_there_will_be(tmp_path):
    run = Run(tmp_path, max_staleness=1, max_steps=2, gradient_accumulation_steps=1)
    source, calls, generate = batches(run.args), [], run.sampler.engine.generate
    run.sampler.engine.generate = lambda prompts, *rest: calls.append(len(prompts)) or generate(prompts, *rest)
    run.collector.collect(source, 1)
    run.collector.wait()
    assert calls == [4, 4]  # this step and the next
    run.state.global_step = 1
    run.collector.collect(source, 1)
    run.collector.wait()
    assert calls == [4, 4]  # there is no third step
    assert {c.policy_version for g in run.collector.last.groups for c in g.completions} == {0}
    assert len(list(source)) == 1


def test_what_was_begun_is_saved_and_not_sampled_again(tmp_path):
    run, source = Run(tmp_path, max_staleness=1, gradient_accumulation_steps=1), None
    source = batches(run.args)
    run.collector.collect(source, 1)
    run.state.global_step = 1
    run.collector.save(tmp_path, rank=0)
    pairing, _ = run.collector.collect(source, 1)

    again = Run(tmp_path, max_staleness=1, gradient_accumulation_steps=1, max_steps=2)
    again.state.global_step = 1
    again.collector.restore(tmp_path, rank=0)
    again.sampler.engine.generate = None  # nothing is sampled
    source = batches(again.args)
    next(source)  # that of the step which is done
    restored, _ = again.collector.collect(source, 1)
    assert restored == pairing and restored.pairs


def test_prompts_without_a_pair_are_answered_again_with_other_random_numbers(tmp_path):
    run = Run(tmp_path, resample_rounds=2)
    pairing, _ = run.collector.collect(batches(run.args), 2)
    plain, _ = Run(tmp_path).collector.collect(batches(run.args), 2)
    first, *_ = run.collector.last.further
    decided = {pair.group.prompt.row for pair in plain.pairs}
    assert first.places == [row for row in range(8) if row not in decided]
    key = RolloutKey(42, 0, Stream.TRAINING, first_sample=2)
    prompts = [tiny.prompts(LENGTHS)[row] for row in first.places]
    assert tokens(first.groups) == tokens(run.sampler.engine.generate(prompts, 2, run.sampler.params, key))
    assert decided < {pair.group.prompt.row for pair in pairing.pairs}


def test_a_reward_that_fails_ends_the_step_with_its_name(tmp_path):
    def broken(completions, **_):
        raise ConnectionError("away")

    run = Run(tmp_path, scorers=[words("broken", broken)])
    with pytest.raises(ScoringError, match="broken.*ConnectionError: away"):
        run.collector.collect(batches(run.args), 1)
    assert run.collector.errors.raised
