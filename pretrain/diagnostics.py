"""What the losses do not tell: how hidden states and p_ψ are doing, on a few validation sequences.

Every rank measures the same sequences, so nothing is added up and the values do not depend on the number of ranks;
nothing is random, and nothing is left changed. One forward pass without gradients, at an interval.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import deepspeed
import torch
from torch import Tensor

from data_pipeline import Batch
from pretrain.model import PretrainingModel
from pretrain.objectives import NextLat, TokenBatch
from pretrain.objectives.base import next_token_mask
from pretrain.objectives.nextlat import rollout_mask

SEQUENCES = 8
DRAFT_TOKENS = 5
LOGIT_POSITIONS = 1024
RANKED_STATES = 512
"""States whose effective rank is taken: its price grows with their square."""

Values = dict[str, float]


def diagnose(engine: deepspeed.DeepSpeedEngine, batches: Sequence[Batch], device: torch.device) -> Values:
    """The measures of `measure` on the first `SEQUENCES` rows of some batches, by name."""
    parts, left = [], SEQUENCES
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            batch = batch.rows(0, left)
            parts.append(engine(TokenBatch.from_numpy(batch, device), measure=measure))
            left -= len(batch.tokens)
            if not left:
                break
    engine.train()
    return summarise([{name: value.double().cpu() for name, value in part.items()} for part in parts])


def measure(model: PretrainingModel, batch: TokenBatch) -> dict[str, Tensor]:
    """Sums over one batch, from which `summarise` makes the diagnostics. To be called inside the model's forward."""
    states = model.trunk_states(batch)
    hidden_BTD = states.hidden
    valid_BT = batch.document_ids[:, :-1] >= 0
    hidden_PD = hidden_BTD[valid_BT].float()
    parts = {
        "positions": torch.tensor(valid_BT.numel()),
        "next_token_positions": next_token_mask(batch).sum(),
        "norm": hidden_PD.norm(dim=-1),
        "states": hidden_PD[:: max(1, valid_BT.shape[1] * SEQUENCES // RANKED_STATES)],
    }
    if isinstance(model.objective, NextLat):
        d = model.objective.horizon
        longest = max(d, min(DRAFT_TOKENS, hidden_BTD.shape[1] - 1))
        rollouts_dBTD = model.objective.dynamics(hidden_BTD, states.embeddings, longest)
        mask_dBT = rollout_mask(batch, longest)
        parts |= _prediction_parts(hidden_BTD, rollouts_dBTD[:d], mask_dBT[:d])
        parts["kl_positions"] = (mask_dBT[:d] & next_token_mask(batch)).sum((1, 2))
        parts |= _draft_parts(model, hidden_BTD, rollouts_dBTD[:DRAFT_TOKENS], mask_dBT[:DRAFT_TOKENS])
    return parts


def summarise(parts: Sequence[dict[str, Tensor]]) -> Values:
    """The diagnostics, from the sums of several batches."""
    names = set(parts[0]) - {"norm", "states"}
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in names}
    positions = total["positions"]
    values = {
        "hidden_norm": torch.cat([part["norm"] for part in parts]).mean(),
        "hidden_effective_rank": effective_rank(torch.cat([part["states"] for part in parts])),
        "masked_next_token": 1 - total["next_token_positions"] / positions,
    }
    if "drafts" in total:
        count_d1 = total["latent_positions"][:, None].clamp(min=1)
        steps = len(count_d1)
        values["masked_next_latent"] = 1 - total["latent_positions"].sum() / (steps * positions)
        values["masked_kl"] = 1 - total["kl_positions"].sum() / (steps * positions)
        for name in ("target", "prediction"):
            mean_dD, square_dD = total[f"{name}_sum"] / count_d1, total[f"{name}_square_sum"] / count_d1
            values |= _by_step(f"latent_{name}_variance", (square_dD - mean_dD.square()).mean(-1))
        values |= _by_step("latent_cosine", total["cosine_sum"] / count_d1[:, 0])
        values["draft_acceptance"] = total["drafts_accepted"] / total["drafts"].clamp(min=1)
    return {name: float(value) for name, value in values.items()}


def effective_rank(states_PD: Tensor) -> Tensor:
    """exp of the entropy of σ / Σσ, with σ the singular values of the uncentred matrix of states."""
    sigma = torch.linalg.svdvals(states_PD)
    share = sigma / sigma.sum()
    return torch.special.entr(share).sum().exp()


def _prediction_parts(hidden_BTD: Tensor, rollouts_dBTD: Tensor, mask_dBT: Tensor) -> dict[str, Tensor]:
    """Sums over supervised landings, for each rollout step and, where it matters, each feature."""
    parts: dict[str, list[Tensor]] = {}
    for rollout_BTD, mask_BT in zip(rollouts_dBTD, mask_dBT, strict=True):
        target_PD, prediction_PD = hidden_BTD[mask_BT].double(), rollout_BTD[mask_BT].double()
        sums = {
            "latent_positions": mask_BT.sum(),
            "cosine_sum": torch.cosine_similarity(target_PD, prediction_PD, -1).sum(),
            "target_sum": target_PD.sum(0),
            "target_square_sum": target_PD.square().sum(0),
            "prediction_sum": prediction_PD.sum(0),
            "prediction_square_sum": prediction_PD.square().sum(0),
        }
        for name, value in sums.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in parts.items()}


def _draft_parts(
    model: PretrainingModel, hidden_BTD: Tensor, rollouts_dBTD: Tensor, mask_dBT: Tensor
) -> dict[str, Tensor]:
    """How many drafts stand, and of how many, where p_ψ drafts greedily from every position of the text.

    The i-th draft from t is the likeliest token after ĥ_{t+i}, rolled out over the text's own tokens. It stands if it
    is the trunk's likeliest token after h_{t+i} and all drafts before it stood. On text that the trunk itself writes,
    these are exactly the drafts that greedy speculative decoding accepts (its free first token is not a draft).
    """
    choice_BT = _likeliest_tokens(model, hidden_BTD)
    length = len(rollouts_dBTD)
    whole_BS = mask_dBT[-1][:, length:]  # by start t: the path of all steps lies in one document
    stands_BS, accepted = whole_BS, torch.zeros((), dtype=torch.long, device=hidden_BTD.device)
    for i, rollout_BTD in enumerate(rollouts_dBTD, start=1):
        landings = slice(i, i + whole_BS.shape[1])
        drafts_BS = _likeliest_tokens(model, rollout_BTD[:, landings])
        stands_BS = stands_BS & (drafts_BS == choice_BT[:, landings])
        accepted = accepted + stands_BS.sum()
    return {"drafts_accepted": accepted, "drafts": whole_BS.sum() * length}


def _likeliest_tokens(model: PretrainingModel, states_BTD: Tensor) -> Tensor:
    """(B, T): what the head would choose, with the logits of a bounded number of positions at a time."""
    parts_PD = states_BTD.flatten(0, 1).split(LOGIT_POSITIONS)
    return torch.cat([model.lm_head(part_PD).argmax(-1) for part_PD in parts_PD]).view(states_BTD.shape[:2])


def _by_step(name: str, values_d: Tensor) -> dict[str, Tensor]:
    """The mean over rollout steps and, where there are several, each of them."""
    return {name: values_d.mean()} | {f"{name}_{i}": v for i, v in enumerate(values_d, 1) if len(values_d) > 1}


def warn_if_nothing_is_predicted(counts: Tensor, step: int, is_first: bool) -> None:
    """One line on stderr where no token of a global batch is a target: its losses are zero."""
    if is_first and not counts[0] > 0:
        print(
            f"warning: step {step + 1}: no token of the batch is a target (all are prompt or padding), so its "
            "next-token loss is zero; look at the data's prompts",
            file=sys.stderr,
            flush=True,
        )
