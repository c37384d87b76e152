"""Fields of the configuration that say what is minimised: the loss, its beta and its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from online_dpo.config.checking import check_numbers, epoch_values, nonempty_and_all, warn_ignored
from online_dpo.config.field_specs import documented
from online_dpo.config.registry import names_having

LossType = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "simpo",
    "sft",
    "apo_zero",
    "apo_down",
    "dpop",
]
LOSSES_WITHOUT_LABELS = ("sft",)
LOSSES_WITHOUT_REFERENCE = ("simpo", "sft")
"""Losses of this package that do not read the one or the other; those of plugins say so where they are registered."""


@documented
@dataclass
class LossFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- loss ---------------------------------------------------------------------------------------------------------

    beta: list[float] = field(default_factory=lambda: [0.1])
    """Strength of the pull towards the reference; IPO's tau. A number, or a list with one for each epoch (the last one
    stays).
    """

    loss_type: LossType | list[LossType] = "sigmoid"
    """The loss, or a list of losses that are added up (see `loss_weights`): `sigmoid` (DPO, arXiv 2305.18290), `ipo`
    (2310.12036), `hinge` (SLiC, 2305.10425), `robust` (2403.00409), `exo_pair` (2402.00856), `simpo` (2405.14734),
    `sft` (likelihood of the chosen), `apo_zero` and `apo_down` (2408.06266), `dpop` (2402.13228).
    """

    loss_weights: list[float] | None = None
    """Weight of each loss in `loss_type`; when not set, each counts 1."""

    label_smoothing: float = 0.0
    """Share of the labels that is taken to be wrong, in [0, 0.5). With `robust`, the loss is corrected for it; with
    `exo_pair` it has to be above 0 (1e-3 is the paper's); `sft` does not read it; the others become conservative.
    """

    simpo_gamma: float = 0.5
    """The margin of `simpo`, in units of the loss: beta times nats a token. Its beta is usually 2 or more."""

    dpop_lambda: float = 50.0
    """How strongly `dpop` keeps the chosen completion as likely as under the reference; 0 is plain DPO."""

    use_weighting: bool = False
    """Weigh pairs by how likely the policy would write them itself (WPO, arXiv 2406.11827)."""

    reference_free: bool = False
    """Keep no reference, which saves its memory and its forward passes. Only with losses that do not read it (`simpo`,
    `sft`); there is then no KL, no `rewards/*` and no win rate.
    """

    sync_ref_model: bool = False
    """Let the reference follow the policy (TR-DPO, arXiv 2404.09656). Not with an adapter, whose reference is the
    policy without it.
    """

    ref_model_mixup_alpha: float = 0.6
    """With `sync_ref_model`: share of the policy that is mixed into the reference's weights; in (0, 1], 1 copies it."""

    ref_model_sync_steps: int = 512
    """With `sync_ref_model`: optimizer steps between two mixes. 1, with a small share: an exponential average."""

    disable_dropout: bool = True
    """Switch dropout off in the policy and the reference."""

    @property
    def loss_types(self) -> list[str]:
        """``loss_type`` as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)


def without_labels() -> set[str]:
    """Losses that do not read the labels: which completion is the better one, and how probably."""
    return names_having("loss", "without labels", LOSSES_WITHOUT_LABELS)


def without_reference() -> set[str]:
    """Losses that do not read the reference."""
    return names_having("loss", "without reference", LOSSES_WITHOUT_REFERENCE)


def check_loss(args: LossFields) -> None:
    """Check the losses and the reference. Options of `sync_ref_model` give a warning without it.

    Raises:
        ValueError: a number is out of range, or an option asks for what the losses or the reference cannot do.
    """
    positive = args.loss_weights is None or all(0 < weight < math.inf for weight in args.loss_weights)
    betas = epoch_values(args.beta)
    checks = [
        (nonempty_and_all(beta > 0 for beta in betas), "beta", "above 0, or a list of such numbers"),
        (positive, "loss_weights", "finite numbers above 0"),
        (0 <= args.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)"),
        (0 <= args.simpo_gamma < math.inf, "simpo_gamma", "0 or more"),
        (0 <= args.dpop_lambda < math.inf, "dpop_lambda", "0 or more"),
        (0 < args.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", "in (0, 1]"),
        (args.ref_model_sync_steps >= 1, "ref_model_sync_steps", "at least 1"),
    ]
    check_numbers(args, checks)
    _check_losses(args)
    if not args.sync_ref_model:
        names = [f.name for f in fields(LossFields) if f.name.startswith("ref_model_")]
        changed = [name for name in names if getattr(args, name) != getattr(LossFields, name)]
        warn_ignored(changed, "without `sync_ref_model`")


def _check_losses(args: LossFields) -> None:
    names, weights = args.loss_types, args.loss_weights
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`loss_type` must name at least one loss, and each once; it is {args.loss_type!r}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`loss_weights` has {len(weights)} numbers, but `loss_type` names {len(names)} losses. Give one for each."
        )
    if "exo_pair" in names and args.label_smoothing == 0:
        raise ValueError("`exo_pair` is infinite for certain labels: set `label_smoothing`, for example to 1e-3.")
    if set(names) <= without_labels():
        for name in ("label_smoothing", "label_temperature"):
            if getattr(args, name):
                raise ValueError(f"`{name}` has no meaning for `loss_type={args.loss_type!r}`, which reads no labels.")
    needing = [name for name in names if name not in without_reference()]
    if args.reference_free and (needing or args.sync_ref_model):
        needs = "`sync_ref_model`" if args.sync_ref_model else f"The loss `{needing[0]}`"
        raise ValueError(f"{needs} needs a reference; leave `reference_free` off.")
