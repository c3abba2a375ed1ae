"""Is the written folder, as transformers reads it, the model that was trained?

Models are streamed, see `streaming`: however large they are, memory holds one weight, activations and LOGIT_BYTES of
logits a few times. A model of at most WHOLE_BYTES in float32 is loaded whole besides, by `from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from data_pipeline import UserError
from pretrain.decoding.dynamics_folder import empty_dynamics
from pretrain.decoding.loading import load_folder
from pretrain.decoding.rivals import MultiTokenLlama, empty_heads
from pretrain.decoding.trunk import CachedTrunk
from pretrain.export.fuzz import check_tokenizer
from pretrain.export.streaming import WeightFiles, stream, stream_llama
from pretrain.export.weights import BLOCK_VALUES, SAFETENSORS_NAME, Advance, Plan, blocks, plan_weights
from pretrain.latent_dynamics import LatentDynamics
from pretrain.model import PretrainingModel
from pretrain.resident_memory import release_freed

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

TOLERANCE = 1e-5
"""Largest difference of logits in float32 arithmetic, relative to the larger of 1 and the largest logit."""
LOG_PROBABILITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest mean difference, in nats, between log-probabilities of the folder as it is and of the float32 model."""
FUZZ_TEXTS = 2_400
ROWS, LONGEST_ROW, SHORTEST_ROW = 4, 128, 16
LOGIT_BYTES = 64 * 2**20
"""Rows are cut so that one model's logits take no more."""
MOST_PRODUCTS = 2 * 10**11
"""Rows are cut so that a pass over them multiplies about so often at most: some seconds on a CPU core."""
MOST_GREEDY_TOKENS, FEWEST_GREEDY_TOKENS = 16, 4
GREEDY_READ_BYTES = 32 * 10**9
"""Greedy texts end, after FEWEST_GREEDY_TOKENS, where their passes would read more weights than this."""
WHOLE_BYTES = 256 * 2**20


def verify_export(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance = lambda what, done: None
) -> dict[str, Any]:
    """Compare a written folder with its checkpoint; what was measured. Raises UserError at a difference.

    - Weights: each one in the files, read by safetensors' own reader, bit by bit the trained one in `dtype`.
    - Models: see `compare_models`.
    - Tokenizer: ids and texts over FUZZ_TEXTS awkward strings.
    """
    from transformers import AutoTokenizer

    weights, values = compare_weights(folder, checkpoint, dtype, advance)
    measured = {"weights_equal": weights, "values_equal": values}
    measured |= compare_models(folder, checkpoint, dtype, advance)
    advance("checking the tokenizer", 0)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    eos_id = int(checkpoint.dataset["eos_id"])
    return measured | {"tokenizer_texts_equal": check_tokenizer(checkpoint.tokenizer(), tokenizer, eos_id, FUZZ_TEXTS)}


def compare_weights(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance = lambda what, done: None
) -> tuple[int, int]:
    """The numbers of weights and of values in the folder, all as trained. Raises UserError where one is not."""
    trunk, drafter = plan_weights(checkpoint)
    for where, plans in [(folder, trunk), (folder / checkpoint.config.objective.name, drafter)]:
        if not plans:
            continue
        files = WeightFiles(where)
        held = [name for path in sorted(where.glob("*.safetensors")) for name in _names(path)]
        if sorted(held) != sorted(plan.name for plan in plans) or set(held) != files.paths.keys():
            raise UserError(f"{where}: its files do not hold each weight once; nothing was exported, report this")
        for plan in plans:
            _compare_weight(files.paths[plan.name], plan, checkpoint, dtype, advance)
    plans = trunk + drafter
    return len(plans), sum(plan.values for plan in plans)


def _compare_weight(path: Path, plan: Plan, checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance) -> None:
    row = plan.values // plan.shape[0]
    with safe_open(path, framework="pt") as file:
        written = file.get_slice(plan.name)
        same = written.get_dtype() == SAFETENSORS_NAME[dtype] and tuple(written.get_shape()) == plan.shape
        for first, rows in blocks(plan.shape[0], max(1, BLOCK_VALUES // row)) if same else ():
            trained = checkpoint.read(plan.source, first * row, rows * row).to(dtype)
            same = same and torch.equal(
                written[first : first + rows].flatten().view(torch.uint8), trained.view(torch.uint8)
            )
            advance(f"comparing {plan.name}", rows * row)
    if not same:
        raise UserError(
            f"{path.name}: {plan.name} does not read back as it was written; nothing was exported, look after the disk "
            "and export again"
        )


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@torch.no_grad()
def compare_models(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance = lambda what, done: None
) -> dict[str, Any]:
    """Run the folder as transformers makes it, and the trained model, on the same tokens.

    - Arithmetic and names: logits, and p_ψ's rollout or the extra heads' states, in float32 on the very weights that
      the folder holds.
    - Greedy text: transformers' own `generate` with its cache, each token the trained model's best.
    - Precision: log-probabilities in the folder's own dtype against the unrounded model.
    """
    trained = stream_trained(checkpoint, dtype, advance)
    exported = stream_llama(folder, torch.float32, lambda name: advance(f"checking logits: {name}", 0))
    values = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.weight_names)
    tokens_BT = _random_tokens(checkpoint, values)
    hidden_BTD, logits_BTV = _trained_logits(trained, tokens_BT)
    scale = max(1.0, float(logits_BTV.abs().max()))
    found_BTV = exported(tokens_BT).logits
    difference = _largest_difference(found_BTV, logits_BTV) / scale
    _require(difference, TOLERANCE, "logits")
    found, expected = _log_probabilities(found_BTV, tokens_BT), _log_probabilities(logits_BTV, tokens_BT)
    del found_BTV, logits_BTV
    _compare_drafters(folder, trained, exported, tokens_BT, hidden_BTD, TOLERANCE * scale)
    greedy = _check_greedy(trained, exported, tokens_BT, scale, GREEDY_READ_BYTES // (4 * values))
    if whole := 4 * values <= WHOLE_BYTES:
        loaded, _, _ = load_folder(folder, torch.float32)
        difference_whole = _largest_difference(loaded(tokens_BT).logits, exported(tokens_BT).logits) / scale
        _require(difference_whole, TOLERANCE, "logits, loaded whole,")
        del loaded
    if dtype != torch.float32:
        found, expected = _log_probabilities_as_they_are(folder, checkpoint, dtype, tokens_BT, advance)
    rounding = float((found - expected).abs().mean())
    _require(rounding, LOG_PROBABILITY_TOLERANCE[dtype], f"log-probabilities in {dtype}")
    return {
        "logit_difference": difference,
        "logit_positions": tokens_BT.numel(),
        "log_probability_difference": rounding,
        "greedy_tokens_equal": greedy,
        "loaded_whole_by_transformers": whole,
    }


def stream_trained(checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance) -> PretrainingModel:
    """The trained model in float32, streamed from its checkpoint; weights rounded to `dtype` on the way."""
    with torch.device("meta"):
        model = PretrainingModel(checkpoint.config, checkpoint.vocab_size)

    def read(name: str) -> Tensor:
        advance(f"checking logits: {name}", 0)
        release_freed()
        weight = checkpoint.weight(name)
        flat = weight.view(-1)
        for first, length in blocks(len(flat), BLOCK_VALUES):
            flat[first : first + length] = flat[first : first + length].to(dtype)
        return weight

    stream(model, read)
    return model


def _random_tokens(checkpoint: Checkpoint, values: int) -> Tensor:
    """(ROWS, T) token ids for a model of so many weight values: rows of one document each, opened by EOS."""
    fits = min(LOGIT_BYTES // (4 * checkpoint.vocab_size), MOST_PRODUCTS // values) // ROWS
    length = min(max(SHORTEST_ROW, fits), LONGEST_ROW, checkpoint.config.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(checkpoint.vocab_size, (ROWS, length), generator=generator)
    tokens_BT[:, 0] = int(checkpoint.dataset["eos_id"])
    return tokens_BT


def _trained_logits(model: PretrainingModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) and logits (B, T, V) of rows that are one document each."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    hidden_BTD = model.trunk(tokens_BT, torch.zeros_like(tokens_BT), positions_BT).hidden
    return hidden_BTD, model.lm_head(hidden_BTD)


def _compare_drafters(
    folder: Path, trained: PretrainingModel, exported: Any, tokens_BT: Tensor, hidden_BTD: Tensor, tolerance: float
) -> None:
    """p_ψ's next states, or the states of MTP's extra heads, where the folder has them."""
    if (subfolder := folder / "nextlat").is_dir():
        dynamics = empty_dynamics(subfolder)
        _stream_subfolder(dynamics, subfolder)
        ours: LatentDynamics = trained.objective.get_submodule("dynamics")  # type: ignore[assignment]  # no other
        next_BTD, from_BTD = trained.trunk.embed_tokens(tokens_BT)[:, 1:], hidden_BTD[:, :-1]
        states_BTD = ours.step(from_BTD, next_BTD)
        _require(_largest_difference(dynamics.step(from_BTD, next_BTD), states_BTD), tolerance, "p_psi's states")
    if (subfolder := folder / "mtp").is_dir():
        heads = empty_heads(subfolder, exported.config)
        _stream_subfolder(heads, subfolder)
        _require(_difference_of_heads(trained, exported, heads, tokens_BT), tolerance, "extra heads' states")


def _stream_subfolder(model: nn.Module, subfolder: Path) -> None:
    files = WeightFiles(subfolder)
    stream(model, lambda name: files.read(name, torch.float32))


def _difference_of_heads(trained: PretrainingModel, exported: Any, heads: nn.ModuleList, tokens_BT: Tensor) -> float:
    """Largest difference between the states of MTP's extra heads, as training makes them and as decoding does."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    states = trained.trunk(tokens_BT, torch.zeros_like(tokens_BT), positions_BT)
    inputs = (states.before_last_block, states.rotation, states.mask)
    ours = [head(*inputs) for head in trained.objective.heads]  # type: ignore[union-attr]  # MTP has them
    theirs = CachedTrunk(MultiTokenLlama(exported, heads)).read(
        tokens_BT, torch.zeros(len(tokens_BT), dtype=torch.long)
    )
    return _largest_difference(theirs, torch.cat([states.hidden, *ours], dim=-1))


def _check_greedy(trained: PretrainingModel, exported: Any, tokens_BT: Tensor, scale: float, passes: int) -> int:
    """Let transformers continue half of each row; each of its tokens must be the trained model's best one.

    A token whose logit equals the best to rounding counts as the best. Returns the number of tokens.
    """
    prompt_BT = tokens_BT[:, : tokens_BT.shape[1] // 2]
    new = min(MOST_GREEDY_TOKENS, max(FEWEST_GREEDY_TOKENS, passes), tokens_BT.shape[1] - prompt_BT.shape[1])
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


def _log_probabilities_as_they_are(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, tokens_BT: Tensor, advance: Advance
) -> tuple[Tensor, Tensor]:
    """The rows' log-probabilities from the folder in its own precision, and from the unrounded model in float32."""
    exported = stream_llama(folder, dtype, lambda name: advance(f"checking precision: {name}", 0))
    found = _log_probabilities(exported(tokens_BT).logits, tokens_BT)
    _, logits_BTV = _trained_logits(stream_trained(checkpoint, torch.float32, advance), tokens_BT)
    return found, _log_probabilities(logits_BTV, tokens_BT)


def _log_probabilities(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Of each token but the first of a row."""
    return -F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten(), reduction="none")


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs_().max())


def _require(difference: float, tolerance: float, what: str) -> None:
    if not difference <= tolerance:  # NaN fails too
        raise UserError(
            f"the exported model's {what} differ from the trained model's by {difference:.3g}, more than "
            f"{tolerance:.3g}; nothing was exported, this needs mending before the model is used"
        )
