"""Pairs of a prefix and a suffix of one document: which there are, and which of them are trained on.

A pair (t, s), t < s, is the prefix that ends with x_t and the suffix that begins with x_s. Both lie in one document,
to which here the EOS belongs that opens the next one, for a suffix may be that EOS alone. So x_{t+1} … x_{s−1} is what
lies between, and with s = t + 1 nothing does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.base import TokenBatch, next_token_mask

# Odd constants with well-mixed bits, as in the finaliser of MurmurHash3 and in splitmix64; int64 products wrap around.
_MIX = (-0x00AE502812AA7333, -0x3B314601E57A13AD)
_STRIDES = (-0x61C8864680B583EB, 0x5851F42D4C957F2D)
_BITS = 53


def backward_documents(batch: TokenBatch) -> Tensor:
    """(B, T) the document that each of the first T tokens belongs to as the start of a suffix; −1 for padding.

    The document's own, but for the EOS that opens the next one: that closes this one. A piece of a document that does
    not begin with its EOS closes nothing (its first token is no target), nor does a row's first column.
    """
    documents_BT = batch.document_ids[:, :-1]
    before_BT = torch.cat([documents_BT[:, :1], documents_BT[:, :-1]], dim=1)
    closes_BT = (before_BT != documents_BT) & batch.target_mask[:, :-1]
    return torch.where(closes_BT, before_BT, documents_BT)


def backward_positions(backward_documents_BT: Tensor) -> Tensor:
    """(B, T) places from the document's last column in the row, which is 0.

    That may be its EOS or not: rotary positions only tell how far apart two tokens are.
    """
    T = backward_documents_BT.shape[1]
    columns_T = torch.arange(T, device=backward_documents_BT.device)
    changes_BT = backward_documents_BT[:, 1:] != backward_documents_BT[:, :-1]
    ends_BT = torch.where(F.pad(changes_BT, (0, 1), value=True), columns_T, T)
    return ends_BT.flip(1).cummin(1).values.flip(1) - columns_T


def kept_pairs(batch: TokenBatch, fraction: float) -> Tensor:
    """(P, 3) int64: row, t and s of each pair that is trained on, in that order.

    A pair counts where x_{t+1} is a target; a prompt begins its document, so then x_{s−1} is one as well, unless
    nothing lies between.

    Of the pairs a `fraction` is kept. Which ones follows from the row's seed and the places alone, on any device; rows
    without seeds (validation) keep the same places. Pairs whose prefix is the document's first token, or whose suffix
    is its last EOS, are always kept, as the authors do: the latter are what the next token without a known suffix is
    predicted from. (Their fraction is one of all pairs, and of a running mean of those, so that what is kept depends
    on what was read before.)
    """
    documents_BT, suffix_documents_BT = batch.document_ids[:, :-1], backward_documents(batch)
    pair_BTT = documents_BT[:, :, None] == suffix_documents_BT[:, None, :]
    pair_BTT &= (next_token_mask(batch) & (documents_BT >= 0))[:, :, None]
    pair_BTT = pair_BTT.triu(1)
    if fraction < 1:
        seeds_B = torch.tensor(batch.row_seeds or (0,) * len(documents_BT), device=documents_BT.device)
        opening_BT, closing_BT = batch.positions[:, :-1] == 0, suffix_documents_BT != documents_BT
        always_BTT = opening_BT[:, :, None] | closing_BT[:, None, :]
        pair_BTT &= always_BTT | (_uniform(seeds_B, documents_BT.shape[1]) < fraction)
    return pair_BTT.nonzero()


def _uniform(seeds_B: Tensor, length: int) -> Tensor:
    """(B, length, length) float64 in [0, 1): a hash of the row's seed and both places."""
    places_T = torch.arange(1, length + 1, device=seeds_B.device)
    t_T, s_T = (_mix(places_T * stride) for stride in _STRIDES)
    hashed_BTT = _mix(_mix(seeds_B)[:, None, None] ^ (t_T[:, None] + s_T))
    return (hashed_BTT & (2**_BITS - 1)).double() / 2**_BITS


def _mix(values: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the input moves every bit of the output."""
    for factor in _MIX:
        values = (values ^ _shifted(values, 33)) * factor
    return values ^ _shifted(values, 33)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
