"""Is the exported folder, as transformers loads it, the model that was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_pipeline import UserError
from pretrain.decoding.loading import load_folder, load_trained
from pretrain.decoding.rivals import MultiTokenLlama, load_heads
from pretrain.decoding.trunk import CachedTrunk
from pretrain.export.fuzz import check_tokenizer
from pretrain.model import PretrainingModel

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

TOLERANCE = 1e-5
"""Largest difference of logits in float32 arithmetic, relative to the larger of 1 and the largest logit."""
LOG_PROBABILITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest mean difference, in nats, between log-probabilities of the folder as it is and of the float32 model."""
FUZZ_TEXTS = 2_400


@torch.no_grad()
def verify_export(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """Compare a written folder with its checkpoint; what was measured. Raises UserError at a difference.

    - Arithmetic and names: logits, and p_ψ's rollout or the extra heads' states, in float32 on the very weights that
      the folder holds.
    - Greedy text: transformers' own `generate` with its cache, each token the trained model's best.
    - Precision: log-probabilities in the folder's own dtype against the unrounded model.
    - Tokenizer: ids and texts over FUZZ_TEXTS awkward strings.
    """
    eos_id = int(checkpoint.dataset["eos_id"])
    trained = load_trained(checkpoint, dtype)
    exported, tokenizer, dynamics = load_folder(folder, torch.float32)
    tokens_BT = _random_tokens(checkpoint, eos_id)
    hidden_BTD, logits_BTV = _trained_logits(trained, tokens_BT)
    scale = max(1.0, float(logits_BTV.abs().max()))
    difference = float((exported(tokens_BT).logits - logits_BTV).abs().max()) / scale
    _require(difference, TOLERANCE, "logits")
    if dynamics is not None:
        next_BTD, rollout_BTD = trained.trunk.embed_tokens(tokens_BT)[:, 1:], hidden_BTD[:, :-1]
        ours = trained.objective.get_submodule("dynamics").step(rollout_BTD, next_BTD)  # type: ignore[operator]  # p_ψ, not any module
        _require(float((dynamics.step(rollout_BTD, next_BTD) - ours).abs().max()), TOLERANCE * scale, "p_psi's states")
    heads = load_heads(folder / "mtp", exported.config, torch.float32)
    if heads is not None:
        _require(_difference_of_heads(trained, exported, heads, tokens_BT), TOLERANCE * scale, "extra heads' states")
    greedy = _check_greedy(trained, exported, tokens_BT, scale)
    texts = check_tokenizer(checkpoint.tokenizer(), tokenizer, eos_id, FUZZ_TEXTS)

    if dtype != torch.float32:
        del trained, exported
        _, logits_BTV = _trained_logits(load_trained(checkpoint), tokens_BT)
        exported, _, _ = load_folder(folder, dtype)
    change_BTV = exported(tokens_BT).logits.float().log_softmax(-1) - logits_BTV.log_softmax(-1)
    chosen_BT1 = tokens_BT[:, 1:, None]
    rounding = float(change_BTV[:, :-1].gather(2, chosen_BT1).abs().mean())
    _require(rounding, LOG_PROBABILITY_TOLERANCE[dtype], f"log-probabilities in {dtype}")
    return {
        "logit_difference": difference,
        "log_probability_difference": rounding,
        "greedy_tokens_equal": greedy,
        "tokenizer_texts_equal": texts,
    }


def _random_tokens(checkpoint: Checkpoint, eos_id: int) -> Tensor:
    """(4, T) token ids: rows of one document each, opened by EOS."""
    length = min(128, checkpoint.config.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(checkpoint.vocab_size, (4, length), generator=generator)
    tokens_BT[:, 0] = eos_id
    return tokens_BT


def _trained_logits(model: PretrainingModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) and logits (B, T, V) of rows that are one document each."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    hidden_BTD = model.trunk(tokens_BT, torch.zeros_like(tokens_BT), positions_BT).hidden
    return hidden_BTD, model.lm_head(hidden_BTD)


def _difference_of_heads(trained: PretrainingModel, exported: Any, heads: nn.ModuleList, tokens_BT: Tensor) -> float:
    """Largest difference between the states of MTP's extra heads, as training makes them and as decoding does."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    states = trained.trunk(tokens_BT, torch.zeros_like(tokens_BT), positions_BT)
    inputs = (states.before_last_block, states.rotation, states.mask)
    ours = [head(*inputs) for head in trained.objective.heads]  # type: ignore[union-attr]  # MTP has them
    theirs = CachedTrunk(MultiTokenLlama(exported, heads)).read(
        tokens_BT, torch.zeros(len(tokens_BT), dtype=torch.long)
    )
    return float((theirs - torch.cat([states.hidden, *ours], dim=-1)).abs().max())


def _check_greedy(trained: PretrainingModel, exported: Any, tokens_BT: Tensor, scale: float) -> int:
    """Let transformers continue half of each row; each of its tokens must be the trained model's best one.

    A token whose logit equals the best to rounding counts as the best. Returns the number of tokens.
    """
    prompt_BT = tokens_BT[:, : tokens_BT.shape[1] // 2]
    new = min(16, tokens_BT.shape[1] - prompt_BT.shape[1])
    text_BT = exported.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    _, logits_BTV = _trained_logits(trained, text_BT)
    logits_BTV = logits_BTV[:, prompt_BT.shape[1] - 1 : -1]
    # min_new_tokens forbids EOS, so the comparison leaves it out too.
    logits_BTV[..., exported.config.eos_token_id] = float("-inf")
    chosen_BT1 = logits_BTV.gather(2, text_BT[:, prompt_BT.shape[1] :, None])
    shortfall = float((logits_BTV.amax(-1, keepdim=True) - chosen_BT1).max())
    _require(shortfall, 2 * TOLERANCE * scale, "greedy texts")
    return int(text_BT.shape[0] * new)


def _require(difference: float, tolerance: float, what: str) -> None:
    if not difference <= tolerance:  # NaN fails too
        raise UserError(
            f"the exported model's {what} differ from the trained model's by {difference:.3g}, more than "
            f"{tolerance:.3g}; nothing was exported, this needs mending before the model is used"
        )
