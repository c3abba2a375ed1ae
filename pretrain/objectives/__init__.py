"""Objectives: each turns hidden states into named losses, inside the model's forward pass."""

from pretrain.config import BstConfig, Config, JtpConfig, MtpConfig, NextLatConfig, NextTokenConfig
from pretrain.objectives.base import LanguageModelHead, Objective, TokenBatch, row_seeds
from pretrain.objectives.bst import BeliefState
from pretrain.objectives.jtp import JointToken
from pretrain.objectives.mtp import MultiToken
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.nextlat import NextLat

__all__ = [
    "BeliefState",
    "JointToken",
    "LanguageModelHead",
    "MultiToken",
    "NextLat",
    "NextToken",
    "Objective",
    "TokenBatch",
    "build_objective",
    "row_seeds",
]


def build_objective(config: Config) -> Objective:
    """The objective that a run's `objective` section names, for the trunk that its `model` section describes."""
    match config.objective:
        case NextTokenConfig():
            return NextToken()
        case NextLatConfig() as objective:
            return NextLat(objective, config.model.width)
        case MtpConfig() as objective:
            return MultiToken(objective, config.model)
        case JtpConfig() as objective:
            return JointToken(objective, config.model)
        case BstConfig() as objective:
            return BeliefState(objective, config.model)
