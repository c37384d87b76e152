"""The fields that say what is minimised: which values they take."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from online_dpo.config.loss import LossType
from support.configuration import check_range, ignored, made, refused


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside"),
    [
        ("beta", "above 0, or a list of such numbers", [1e-9, 2.0, [0.2, 0.1]], [0.0, -1.0, [0.1, 0.0], []]),
        ("label_smoothing", "in [0, 0.5)", [0.0, 0.499], [-0.1, 0.5]),
        ("simpo_gamma", "0 or more", [0.0, 3.0], [-0.1, math.inf]),
        ("dpop_lambda", "0 or more", [0.0, 3.0], [-0.1, math.inf]),
        ("loss_weights", "finite numbers above 0", [None, [1e-3], [2.0]], [[0.0], [-1.0], [math.inf]]),
        ("ref_model_mixup_alpha", "in (0, 1]", [1e-3, 1.0], [0.0, 1.1]),
        ("ref_model_sync_steps", "at least 1", [1, 512], [0]),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any]) -> None:
    check_range(name, wanted, inside, outside, sync_ref_model=True)


@pytest.mark.parametrize("choice", get_args(LossType))
def test_every_loss_is_a_choice(choice: str) -> None:
    smoothing = 1e-3 if choice == "exo_pair" else 0.0
    assert made(loss_type=choice, label_smoothing=smoothing).loss_types == [choice]
    assert made(loss_type=[choice], label_smoothing=smoothing).loss_type == choice


def test_another_loss_is_none() -> None:
    choices = ", ".join(get_args(LossType))
    refused(f"`loss_type` must be one of {choices}; it is 'sgmoid'. Did you mean `sigmoid`?", loss_type="sgmoid")
    refused(f"`loss_type` must be one of {choices}; it is 'stf'. Did you mean `sft`?", loss_type=["sigmoid", "stf"])
    refused("`loss_type` must name at least one loss, and each once; it is [].", loss_type=[])
    refused("and each once; it is ['ipo', 'ipo'].", loss_type=["ipo", "ipo"])


def test_each_loss_has_a_weight() -> None:
    refused(
        "`loss_weights` has 1 numbers, but `loss_type` names 2 losses. Give one for each.",
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0],
    )
    assert made(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0]).loss_weights == [1.0, 2.0]


def test_labels_are_as_the_losses_need_them() -> None:
    refused("`exo_pair` is infinite for certain labels: set `label_smoothing`", loss_type=["sigmoid", "exo_pair"])
    for name in ("label_smoothing", "label_temperature"):
        refused(
            f"`{name}` has no meaning for `loss_type='sft'`, which reads no labels.", loss_type="sft", **{name: 0.1}
        )
        assert getattr(made(loss_type=["sft", "sigmoid"], **{name: 0.1}), name) == 0.1


def test_only_losses_that_read_no_reference_go_without_one() -> None:
    for loss in ("simpo", "sft", ["simpo", "sft"]):
        assert made(loss_type=loss, reference_free=True).reference_free
    refused("The loss `sigmoid` needs a reference; leave `reference_free` off.", reference_free=True)
    refused("The loss `ipo` needs a reference", reference_free=True, loss_type=["sft", "ipo"])
    refused("`sync_ref_model` needs a reference", reference_free=True, loss_type="sft", sync_ref_model=True)


def test_options_of_a_reference_that_stays() -> None:
    ignored(
        "Ignored without `sync_ref_model`: ref_model_mixup_alpha, ref_model_sync_steps.",
        ref_model_mixup_alpha=0.5,
        ref_model_sync_steps=9,
    )


def test_beta_by_epochs() -> None:
    args = made(beta=[0.2, 0.1])
    assert [args.beta_at(epoch) for epoch in (0, 0.99, 1.0, 7.5)] == [0.2, 0.2, 0.1, 0.1]
    assert made(beta=0.3).beta_at(4.0) == 0.3
