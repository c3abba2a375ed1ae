"""The trunk as decoding sees it: texts of different lengths in, hidden states out, with a KV cache between.

The token at position p of a text lies in slot p of the cache, whatever the other texts' lengths. So forgetting tokens
is no more than writing over their slots: until then they lie behind every position that is read, where the causal
mask hides them, as it hides what pads the shorter texts of a batch.

Shapes: B texts, T new tokens, S slots, K key/value heads, C their width, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Trunk(Protocol):
    """Reads B texts on from where it stands."""

    def read(self, tokens_BT: Tensor, starts_B: Tensor) -> Tensor:
        """Final, post-norm hidden states (B, T, D) of tokens at positions starts_B … starts_B + T − 1.

        All earlier positions must have been read; later ones are forgotten.
        """

    def keep(self, rows: list[int]) -> None:
        """Leave out all texts but these, in ascending order."""


class CachedTrunk:
    """A LlamaForCausalLM that reads B texts on from where it stands.

    It is itself the cache that transformers' attention layers call: `update`.
    """

    def __init__(self, model: Any):
        self._model = model
        self._keys: list[Tensor] = []  # by layer (B, K, S, C)
        self._values: list[Tensor] = []
        self._positions_BT = torch.empty(0)
        self._slots = 0

    def read(self, tokens_BT: Tensor, starts_B: Tensor) -> Tensor:
        """See `Trunk`."""
        self._positions_BT = starts_B[:, None] + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self._slots = int(starts_B.max()) + tokens_BT.shape[1]
        slots_S = torch.arange(self._slots, device=tokens_BT.device)
        states: Tensor = self._model.model(
            input_ids=tokens_BT,
            position_ids=self._positions_BT,
            attention_mask=(slots_S <= self._positions_BT[..., None])[:, None],
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        return states

    def keep(self, rows: list[int]) -> None:
        """See `Trunk`.

        Only texts behind one that left are moved, and no further than they are read: a cache is large.
        """
        for stored in (self._keys, self._values):
            for layer, all_BKSC in enumerate(stored):
                for row, before in enumerate(rows):
                    if row != before:
                        all_BKSC[row, :, : self._slots] = all_BKSC[before, :, : self._slots]
                stored[layer] = all_BKSC[: len(rows)]

    def update(self, keys_BKTC: Tensor, values_BKTC: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; all of them up to the last one that is read, (B, K, S, C) each."""
        if layer == len(self._keys):
            self._keys.append(keys_BKTC[:, :, :0])
            self._values.append(values_BKTC[:, :, :0])
        return self._store(self._keys, layer, keys_BKTC), self._store(self._values, layer, values_BKTC)

    def _store(self, stored: list[Tensor], layer: int, new_BKTC: Tensor) -> Tensor:
        slots, end = stored[layer].shape[2], self._slots
        if end > slots:  # double, so that growing costs little
            more = new_BKTC.new_zeros(*new_BKTC.shape[:2], max(end, 2 * slots) - slots, new_BKTC.shape[3])
            stored[layer] = torch.cat([stored[layer], more], dim=2)
        if len(new_BKTC) == 1:
            stored[layer][:, :, end - new_BKTC.shape[2] : end] = new_BKTC
        else:
            rows_B1 = torch.arange(len(new_BKTC), device=new_BKTC.device)[:, None]
            stored[layer][rows_B1, :, self._positions_BT] = new_BKTC.transpose(1, 2)
        return stored[layer][:, :, :end]
