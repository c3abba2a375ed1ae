"""The objective section: one configuration class per objective, told apart by `objective.name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pretrain.config.section import NonNegativeFloat, Section


class NextTokenConfig(Section):
    """Plain next-token prediction (GPT)."""

    name: Literal["next_token"]


class NextLatConfig(Section):
    """Next-latent prediction (arXiv 2511.05963)."""

    name: Literal["nextlat"]
    horizon: PositiveInt
    """Number of rollout steps d of the latent dynamics model."""
    next_latent_weight: NonNegativeFloat
    """λ_h, the weight of the SmoothL1 term."""
    kl_weight: NonNegativeFloat
    """λ_KL, the weight of the KL term."""
    dynamics_width: PositiveInt
    """Hidden width of the latent dynamics model p_psi."""


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
    """Share of the pairs of a prefix and a suffix that are trained on, chosen by `run.seed`; pairs with a prefix or
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
