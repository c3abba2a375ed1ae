"""Objectives: each turns hidden states into named losses, inside the model's forward pass."""

from pretrain.config import NextLatConfig, ObjectiveConfig
from pretrain.objectives.base import LanguageModelHead, Objective, TokenBatch, row_seeds
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.nextlat import NextLat

__all__ = ["LanguageModelHead", "NextLat", "NextToken", "Objective", "TokenBatch", "build_objective", "row_seeds"]


def build_objective(config: ObjectiveConfig, width: int) -> Objective:
    """The objective that a run's `objective` section names, for hidden states of width `width`."""
    if isinstance(config, NextLatConfig):
        return NextLat(config, width)
    return NextToken()
