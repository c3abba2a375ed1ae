"""README.md of an exported folder: what the model is, made from the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.config import MtpConfig, NextLatConfig

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint


def model_card(checkpoint: Checkpoint, dtype: str, measured: dict[str, Any]) -> str:
    """The text of README.md."""
    config, data = checkpoint.config, checkpoint.dataset
    model, objective = config.model, config.objective
    drafting = ""
    aim = "next-token prediction"
    if isinstance(objective, NextLatConfig):
        aim = (
            f"next-latent prediction (arXiv 2511.05963), horizon {objective.horizon}, next-latent weight "
            f"{objective.next_latent_weight:g}, KL weight {objective.kl_weight:g}"
        )
        drafting = """
`nextlat/` holds the latent dynamics model, which plain inference ignores and which drafts tokens:

    python -m pretrain.generate DIR --prompt "def main(" --draft auto --stats
"""
    elif isinstance(objective, MtpConfig):
        aim = f"multi-token prediction with {objective.horizon} extra heads, weight {objective.multi_token_weight:g}"
        drafting = """
`mtp/` holds the extra heads, which plain inference ignores and which draft tokens:

    python -m pretrain.generate DIR --prompt "def main(" --draft auto --stats
"""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.run.name}

A decoder-only language model of Llama's architecture, pretrained from scratch. It loads with no custom code:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIR")
    tokenizer = AutoTokenizer.from_pretrained("DIR")
{drafting}
| | |
|---|---|
| trunk | {model.layers} layers, width {model.width}, {model.heads} heads, {model.key_value_heads} key/value heads |
| embeddings | {checkpoint.vocab_size:,} rows, {"tied" if model.tie_embeddings else "untied"} |
| objective | {aim} |
| trained | {checkpoint.step:,} steps, {checkpoint.tokens:,} tokens |
| context | {config.data.sequence_length:,} tokens |
| data | {_data(data)} |
| tokenizer | {checkpoint.tokenizer().kind}, fingerprint {data["tokenizer_fingerprint"][:12]} |
| weights | {dtype} |

**BOS is EOS.** Every training document began with token {data["eos_id"]}; the tokenizer puts it in front of a text by
default (`add_special_tokens=True`), and a model ends a text with it.

**Checked before this folder got its name**: logits equal to the trained model's to {measured["logit_difference"]:.1e};
{measured["greedy_tokens_equal"]} greedy tokens equal; {measured["tokenizer_texts_equal"]:,} texts encoded and decoded
as in training. `nextlat_manifest.json` has the source, the whole config and the sha256 of each file.

Limits: a base model, not tuned to follow instructions; it repeats what is in its training text, errors included.
"""


def _data(described: dict[str, Any]) -> str:
    """The data set, or each of a mixture with its share."""
    sources = list(described.get("sources", {}).values()) or [described]
    shares = [f"{source['share']:.1%} of " if len(sources) > 1 else "" for source in sources]
    return ", ".join(
        f"{share}{source['path']} (fingerprint {source['fingerprint'][:12]})"
        for share, source in zip(shares, sources, strict=True)
    )
