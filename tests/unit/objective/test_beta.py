"""The beta that adapts to a target KL."""

import pytest

from online_dpo.objective.beta import Beta, adapted
from online_dpo.training.metric_store import MetricStore


def test_first_steps_of_the_controller_by_hand():
    """Target 6: 12 is clipped to an error of 0.2, 6.6 is 0.1, 6 nothing, 0 and what is below are clipped to -0.2."""
    betas = [0.1]
    for kl in (12.0, 6.6, 6.0, 0.0, -3.0):
        betas.append(adapted(betas[-1], kl, target=6.0, gain=0.1))
    assert betas[1:] == pytest.approx(
        [0.1 * 1.02, 0.1 * 1.02 * 1.01, 0.1 * 1.02 * 1.01] + [0.1 * 1.02 * 1.01 * 0.98**n for n in (1, 2)]
    )


@pytest.mark.parametrize("start", [0.001, 10.0])
def test_the_controller_finds_the_beta_of_a_policy_whose_kl_falls_with_beta(start):
    """The best policy of a reward with KL ``1 / beta^2``: 4 nats at a beta of 1/2."""
    beta = start
    for _ in range(1000):
        beta = adapted(beta, 1 / beta**2, target=4.0, gain=0.1)
    assert beta == pytest.approx(0.5, rel=1e-3)


def test_only_this_steps_kl_counts_and_a_step_without_pairs_changes_nothing(tmp_path):
    from support.training import config

    store = MetricStore()
    beta = Beta(config(tmp_path, target_kl=2.0, beta=0.3, beta_gain=0.5, beta_range=4.0), lambda: store.take_mean("kl"))
    store.mean("kl", [4.0, 8.0])
    beta.on_step_end(None, None, None)
    assert beta.at(0.0) == pytest.approx(0.3 * 1.1)
    beta.on_step_end(None, None, None)
    assert beta.at(0.0) == pytest.approx(0.3 * 1.1)
    store.mean("kl", [2.0, 2.2])
    beta.on_step_end(None, None, None)
    assert beta.at(5.0) == pytest.approx(0.3 * 1.1 * 1.025) and store.drain() == {}

    for kl, limit in ((0.0, 0.3 / 4), (99.0, 0.3 * 4)):
        for _ in range(40):
            store.mean("kl", [kl])
            beta.on_step_end(None, None, None)
        assert beta.at(0.0) == limit

    beta.save(tmp_path, 0)
    other = Beta(config(tmp_path, target_kl=2.0), lambda: None)
    other.restore(tmp_path, 0)
    assert other.at(0.0) == beta.at(0.0)
    fixed = Beta(config(tmp_path, beta=[0.1, 0.4]), lambda: None)
    fixed.restore(tmp_path, 0)
    assert [fixed.at(epoch) for epoch in (0.5, 1.0, 7.0)] == [0.1, 0.4, 0.4]
