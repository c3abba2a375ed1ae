"""README.md of an exported folder: what the model is, made from the run."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from pretrain.config import Config, MtpConfig, NextLatConfig
from pretrain.export.curves import CURVES

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint


def model_card(checkpoint: Checkpoint, dtype: str, measured: dict[str, Any], has_curves: bool) -> str:
    """The text of README.md.

    measured: from `verification.verify_export`. has_curves: whether curves.png lies beside it.
    """
    config, data, model = checkpoint.config, checkpoint.dataset, checkpoint.config.model
    curves = (
        f"![losses over tokens]({CURVES})" if has_curves else "No metrics.jsonl lay beside the exported checkpoint."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.run.name}

A decoder-only language model of Llama's architecture, pretrained from scratch. It loads with no custom code:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIR")
    tokenizer = AutoTokenizer.from_pretrained("DIR")

| | |
|---|---|
| trunk | {model.layers} layers, width {model.width}, {model.heads} heads, {model.key_value_heads} key/value heads |
| embeddings | {checkpoint.vocab_size:,} rows, {"tied" if model.tie_embeddings else "untied"} |
| objective | {_aim(config)} |
| trained | {checkpoint.step:,} steps, {checkpoint.tokens:,} tokens |
| context | {config.data.sequence_length:,} tokens |
| data | {_data(data)} |
| tokenizer | {checkpoint.tokenizer().kind}, fingerprint {data["tokenizer_fingerprint"][:12]} |
| weights | {dtype} |

**BOS is EOS.** Every training document began with token {data["eos_id"]}; the tokenizer puts it in front of a text by
default (`add_special_tokens=True`), and a model ends a text with it.

## Training

{curves}
{_drafting(checkpoint)}
## Checked before this folder got its name

{_checked(measured)}
`nextlat_manifest.json` has the source, the whole config, what was measured and the sha256 of each file.

## Limits

A base model, not tuned to follow instructions or to refuse them; it repeats what is in its training text, errors and
biases included. It has seen no text beyond {config.data.sequence_length:,} tokens of context, and no other languages or
subjects than its data. Greedy text of a small model repeats itself.
"""


def _aim(config: Config) -> str:
    match config.objective:
        case NextLatConfig() as objective:
            return (
                f"next-latent prediction (arXiv 2511.05963), horizon {objective.horizon}, next-latent weight "
                f"{objective.next_latent_weight:g}, KL weight {objective.kl_weight:g}"
            )
        case MtpConfig() as objective:
            return (
                f"multi-token prediction with {objective.horizon} extra heads, weight {objective.multi_token_weight:g}"
            )
        case _:
            return "next-token prediction"


def _checked(measured: dict[str, Any]) -> str:
    """What verification found, as a list."""
    whole = "`from_pretrained` loaded it whole, to the same logits"
    if not measured["loaded_whole_by_transformers"]:
        whole = (
            "it ran with one weight in memory at a time, being too large to be loaded whole in the exporter's memory"
        )
    found = [
        f"{measured['weights_equal']:,} weights, {measured['values_equal']:,} values, are bit for bit the trained ones",
        f"logits of transformers' model equal the trained one's to {measured['logit_difference']:.1e} at "
        f"{measured['logit_positions']:,} positions; {whole}",
        f"{measured['greedy_tokens_equal']} tokens of transformers' greedy `generate` are the trained model's best",
        f"log-probabilities in the folder's own precision differ by {measured['log_probability_difference']:.1e} nats "
        "in the mean",
        f"{measured['tokenizer_texts_equal']:,} texts are encoded and decoded as in training",
    ]
    return "".join(f"- {line}\n" for line in found)


def _drafting(checkpoint: Checkpoint) -> str:
    """How to draft, and what it gains; nothing where there is nothing to draft with."""
    match checkpoint.config.objective:
        case NextLatConfig():
            what = "`nextlat/` holds the latent dynamics model, which plain inference ignores and which drafts tokens:"
        case MtpConfig(horizon=horizon):
            what = f"`mtp/` holds the {horizon} extra heads, which plain inference ignores and which draft tokens:"
        case _:
            return ""
    return f"""
## Drafting

{what}

    python -m pretrain.generate DIR --prompt "def main(" --draft auto --stats

{_draft_lengths(checkpoint)}
"""


def _draft_lengths(checkpoint: Checkpoint) -> str:
    """The table of draft lengths from the run's evaluation, or how to make it."""
    run = checkpoint.path.parent.parent
    try:
        found = json.loads((run / "evaluation" / "speculative.json").read_text(encoding="utf-8"))
        shares = [float(share) for share in found["acceptance_by_position"]]
        prompts, step = int(found["prompts"]), int(found["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return (
            "Draft lengths were not measured before this export. `python -m pretrain.evaluate RUN --suite speculative "
            "--out RUN/evaluation`, then export again, puts their table here."
        )
    alive = list(itertools.accumulate(shares, lambda so_far, share: so_far * share))
    rows = [
        f"| {length} | {share:.0%} | {sum(alive[:length]):.2f} | {1 + sum(alive[:length]):.2f} |"
        for length, share in enumerate(shares, start=1)
    ]
    return "\n".join(
        [
            f"Greedy, on {prompts} prompts of the validation data, at step {step:,}:",
            "",
            "| draft length | accepted here, where all before were | accepted per cycle | tokens per cycle |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _data(described: dict[str, Any]) -> str:
    """The data set, or each of a mixture with its share."""
    sources = list(described.get("sources", {}).values()) or [described]
    shares = [f"{source['share']:.1%} of " if len(sources) > 1 else "" for source in sources]
    return ", ".join(
        f"{share}{source['path']} (fingerprint {source['fingerprint'][:12]})"
        for share, source in zip(shares, sources, strict=True)
    )
