"""The objective section: one configuration class per objective, told apart by `objective.name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pretrain.config.section import NonNegativeFloat, NonNegativeInt, Section


class NextTokenConfig(Section):
    """Plain next-token prediction (GPT)."""

    name: Literal["next_token"]


class NextLatConfig(Section):
    """Next-latent prediction (arXiv 2511.05963)."""

    name: Literal["nextlat"]
    horizon: PositiveInt
    """Number of rollout steps d of the latent dynamics model."""
    next_latent_weight: NonNegativeFloat
    """λ_h, the weight of the next-latent term."""
    kl_weight: NonNegativeFloat
    """λ_KL, the weight of the rollouts' token term."""
    dynamics_width: PositiveInt
    """Hidden width of the latent dynamics model p_psi."""
    latent_loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    """Distance between predicted and true hidden state, a mean over features."""
    rollout_loss: Literal["kl", "cross_entropy"] = "kl"
    """The rollouts' token term: KL from the trunk's own distribution, or cross-entropy of the true next token."""
    stop_gradient_target: bool = True
    """Whether the true hidden state is a constant in the next-latent term."""
    stop_gradient_head: bool = True
    """Whether the output head is a constant in the rollouts' token term."""
    kl_positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of positions that the rollouts' token term reads in a training step: a random, unbiased choice."""
    dynamics_only_steps: NonNegativeInt = 0
    """First so many steps train p_psi alone; trunk and head stay as they started."""
    dynamics_learning_rate_multiple: PositiveFloat = 1.0
    """p_psi's learning rate, in multiples of the run's."""
    dynamics_weight_decay_multiple: NonNegativeFloat = 1.0
    """p_psi's weight decay, in multiples of the run's."""


class MtpConfig(Section):
    """Multi-token prediction with independent heads (Gloeckle et al., arXiv 2404.19737)."""

    name: Literal["mtp"]
    horizon: PositiveInt
    """Number of extra heads d; head k predicts the token k places after the next one."""
    multi_token_weight: NonNegativeFloat
    """λ, the weight of the mean loss of the extra heads."""


class JtpConfig(Section):
    """Joint multi-token prediction with teacher-forced tokens ("Fetch")."""

    name: Literal["jtp"]
    horizon: PositiveInt
    """Number of tokens d that are predicted beyond the next one, each given those before it."""
    joint_token_weight: NonNegativeFloat
    """λ, the weight of their mean loss."""


class BstConfig(Section):
    """The belief state transformer (arXiv 2410.23506): next and previous token from a prefix and a suffix."""

    name: Literal["bst"]
    pair_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pairs of a prefix and a suffix that are trained on, drawn for every sample; pairs with a prefix or
    suffix of a single token are always kept."""


OBJECTIVES: dict[str, type[Section]] = {
    "next_token": NextTokenConfig,
    "nextlat": NextLatConfig,
    "mtp": MtpConfig,
    "jtp": JtpConfig,
    "bst": BstConfig,
}
ObjectiveConfig = Annotated[
    NextTokenConfig | NextLatConfig | MtpConfig | JtpConfig | BstConfig, Field(discriminator="name")
]
