"""Decoding with a KV cache, plain or with drafts from the latent dynamics model."""

from pretrain.decoding.accounting import DecodingStatistics
from pretrain.decoding.adaptive_length import AdaptiveLength
from pretrain.decoding.draft_length import FixedLength
from pretrain.decoding.drafting import DraftStep, draft_with_latent_dynamics
from pretrain.decoding.loading import Export, load_export
from pretrain.decoding.sampling import Sampling
from pretrain.decoding.speculative import generate, generate_batch

__all__ = [
    "AdaptiveLength",
    "DecodingStatistics",
    "DraftStep",
    "Export",
    "FixedLength",
    "Sampling",
    "draft_with_latent_dynamics",
    "generate",
    "generate_batch",
    "load_export",
]
