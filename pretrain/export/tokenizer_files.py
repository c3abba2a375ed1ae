"""tokenizer.json and tokenizer_config.json that AutoTokenizer loads with no custom code.

Whatever the kind, `add_special_tokens=True` puts EOS in front, as training documents begin with it, and text that
looks like a special token is encoded as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline import Tokenizer, UserError

BYTES_EOS = "<|endoftext|>"


def write_tokenizer(source: Tokenizer, eos_id: int, context: int, folder: Path) -> None:
    """Write the two files for `source` into `folder`.

    eos_id: the token that opens a document. context: tokens of the model's context.
    Raises UserError for a tokenizer that has no exact tokenizer.json.
    """
    builders = {"sentencepiece": _from_sentencepiece, "tokenizer.json": _from_json, "bytes": _from_bytes}
    content, special = builders[source.kind](source, eos_id)
    eos = next(token["content"] for token in content["added_tokens"] if token["id"] == eos_id)
    content["post_processor"] = _prepend(content.get("post_processor"), eos, eos_id)
    content["truncation"] = content["padding"] = None
    _write(folder / "tokenizer.json", content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # "</s>" in a document is text, in training as here.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write(folder / "tokenizer_config.json", settings | special)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _prepend(old: dict[str, Any] | None, eos: str, eos_id: int) -> dict[str, Any]:
    """A post-processor that puts EOS in front of each text; a byte-level one, which keeps offsets, stays."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=f"{eos}:0 $A:0", pair=f"{eos}:0 $A:0 {eos}:1 $B:1", special_tokens=[(eos, eos_id)]
    )
    mine: dict[str, Any] = json.loads(template.__getstate__())
    if old is not None and old["type"] == "ByteLevel":
        return {"type": "Sequence", "processors": [old, mine]}
    return mine


def _from_json(source: Tokenizer, eos_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    assert source.path is not None
    content = json.loads(source.path.read_text(encoding="utf-8"))
    known = {token["id"] for token in content.get("added_tokens") or []}
    if eos_id not in known:
        raise UserError(f"{source.path}: token {eos_id}, which ends a text, is no added token; add it to added_tokens")
    return content, {}


def _from_bytes(source: Tokenizer, eos_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Byte b is token b, written in the byte-level alphabet, whose decoder treats damaged UTF-8 as Python does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in _byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {BYTES_EOS: eos_id}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BYTES_EOS, special=True, normalized=False)])
    return json.loads(tokenizer.to_str()), {}


def _byte_alphabet() -> dict[int, str]:
    """Byte → character: itself where printable, else the next one from U+0100 on (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _from_sentencepiece(source: Tokenizer, eos_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A SentencePiece BPE model's vocabulary, merges and normaliser.

    Pieces hold a plain space where SentencePiece writes U+2581. So text needs no replacement, and a U+2581 of the
    text, which is no piece, falls back to bytes as it does in training.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import AddedToken, Tokenizer, decoders, models

    assert source.path is not None
    model = proto.ModelProto()
    model.ParseFromString(source.path.read_bytes())
    _check_supported(model, source.path)
    kinds = proto.ModelProto.SentencePiece
    texts = [piece.piece if piece.type == kinds.BYTE else piece.piece.replace("\u2581", " ") for piece in model.pieces]
    scores = {text: piece.score for text, piece in zip(texts, model.pieces, strict=True) if piece.type == kinds.NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: number for number, text in enumerate(texts)},
            merges=merges(scores),
            unk_token=texts[model.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {model.trainer_spec.unk_id, eos_id} | {
        number for number, piece in enumerate(model.pieces) if piece.type == kinds.CONTROL
    }
    tokenizer.add_special_tokens(
        [AddedToken(texts[number], special=True, normalized=False) for number in sorted(special)]
    )
    return json.loads(tokenizer.to_str()), {"unk_token": texts[model.trainer_spec.unk_id]}


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs of adjacent pieces that BPE joins, the best first: by the joined piece's score.

    SentencePiece joins the pair whose result scores best, the leftmost of equals; pairs with one result therefore
    stand together, the longest left part first.
    """
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in pairs]


def _check_supported(model: Any, path: Path) -> None:
    """Refuse what cannot be written exactly: the fuzz would find it, this says why."""
    normalizer = model.normalizer_spec
    problems = {
        "it is not a BPE model": model.trainer_spec.model_type != model.trainer_spec.BPE,
        "it normalises text": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it adds a space in front of a text": normalizer.add_dummy_prefix,
        "it has user-defined pieces": any(piece.type == piece.USER_DEFINED for piece in model.pieces),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(
                f"{path}: no exact tokenizer.json can be made from this SentencePiece model: {problem}; train on "
                "data prepared with --tokenizer train:sentencepiece:VOCAB or a tokenizer.json"
            )
