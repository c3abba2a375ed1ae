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


OBJECTIVES: dict[str, type[Section]] = {"next_token": NextTokenConfig, "nextlat": NextLatConfig}
ObjectiveConfig = Annotated[NextTokenConfig | NextLatConfig, Field(discriminator="name")]
