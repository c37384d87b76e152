"""Fields of the configuration that say what is minimised: the loss, its beta and its reference."""

from __future__ import annotations

from dataclasses import dataclass, field

from online_dpo.config.field_specs import documented

LOSS_TYPES = (
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
)
CHOICES = (("loss_type", LOSS_TYPES),)


@documented
@dataclass
class LossFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- loss ---------------------------------------------------------------------------------------------------------

    beta: list[float] = field(default_factory=lambda: [0.1])
    """Strength of the pull towards the reference; IPO's tau. A number, or a list with one for each epoch (the last one
    stays).
    """

    loss_type: str | list[str] = "sigmoid"
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
