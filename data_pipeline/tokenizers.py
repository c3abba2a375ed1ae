"""Text ↔ token ids: SentencePiece models, Hugging Face tokenizer.json files, and plain bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

BYTES_EOS = 256
# Hugging Face files do not say which of their special tokens ends a text; these are the names in use.
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
# SentencePiece writes a space as this character, so that the character itself would come back as a space.
SPACE_MARK = "\u2581"
PIECE = 1 << 20  # characters of a document that are encoded at a time, to bound memory
TRAINING_CHUNK = 2_000  # characters; SentencePiece drops sentences above max_sentence_length, in bytes


EncodeBatch = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: encode → decode is the identity on any text for the kinds "sentencepiece" (trained here)
    and "bytes".

    kind: "sentencepiece", "tokenizer.json" or "bytes"; path: its file, None for bytes; fingerprint: sha256 of
    that file; eos_id: the token that opens each document, which encode never yields.
    """

    kind: str
    path: Path | None
    vocab_size: int
    eos_id: int
    fingerprint: str
    encode_batch: EncodeBatch
    _decode: Callable[[list[int]], str]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._decode([int(number) for number in ids])


def load_tokenizer(spec: str | os.PathLike[str], *, eos_id: int | None = None) -> Tokenizer:
    """Load `bytes`, a SentencePiece .model file, a Hugging Face .json file, or a folder that holds one of these or
    GPT-2's vocab.json and merges.txt.

    eos_id: which token ends a text, where it is known and the file does not say. Raises UserError for
    anything else.
    """
    if spec == "bytes":
        return _bytes_tokenizer()
    path = Path(spec)
    loaders = {".model": _load_sentencepiece, ".json": _load_json}
    if path.suffix not in loaders and not path.is_dir():
        raise UserError(f"tokenizer {spec}: give a .model or .json file, train:sentencepiece:VOCAB, or bytes")
    name, content = tokenizer_file(path)
    path = path / name if path.is_dir() else path
    return loaders[path.suffix](path, content, eos_id)


def _bytes_tokenizer() -> Tokenizer:
    return Tokenizer(
        kind="bytes",
        path=None,
        vocab_size=257,
        eos_id=BYTES_EOS,
        fingerprint=hashlib.sha256(b"data_pipeline bytes tokenizer 1").hexdigest(),
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        _decode=lambda ids: bytes(i for i in ids if i < BYTES_EOS).decode(errors="replace"),
    )


def _load_sentencepiece(path: Path, content: bytes, eos_id: int | None) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer {path}: not a SentencePiece model: give a .model file") from error
    end = model.eos_id() if eos_id is None else eos_id
    if end < 0:
        raise UserError(f"tokenizer {path}: has no end-of-text piece: train it with an eos_id")
    return Tokenizer(
        kind="sentencepiece",
        path=path,
        vocab_size=model.get_piece_size(),
        eos_id=end,
        fingerprint=hashlib.sha256(content).hexdigest(),
        encode_batch=in_pieces(lambda texts: _encode_sentencepiece(model, texts)),
        _decode=model.decode,
    )


def _encode_sentencepiece(model: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = model.encode(list(texts), out_type=int, num_threads=1)
    for number, text in enumerate(texts):
        if SPACE_MARK in text and model.is_byte(model.piece_to_id("<0xE2>")):
            mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
            first, *rest = (model.encode(part, out_type=int) for part in text.split(SPACE_MARK))
            ids[number] = first + [token for part in rest for token in mark + part]
    return ids


def in_pieces(encode: EncodeBatch) -> EncodeBatch:
    """The same encoder with a bound on its memory: a long text is encoded in pieces, cut after a line's end.

    A merge across a cut is missed, which decoding does not notice. A tokenizer that puts something before a text
    (a space, say) is left alone.
    """
    try:
        joined, apart = encode(["a\nb", "a b"]), encode(["a\n", "b", "a ", "b"])
    except Exception:  # a vocabulary that lacks these characters
        return encode
    if joined[0] != apart[0] + apart[1]:
        return encode

    def encode_pieces(texts: Sequence[str]) -> list[list[int]]:
        if all(len(text) <= PIECE for text in texts):
            return encode(texts)
        return [[token for piece in _cut(text) for token in encode([piece])[0]] for text in texts]

    return encode_pieces


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start + PIECE // 2, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def tokenizer_file(spec: str | os.PathLike[str]) -> tuple[str, bytes]:
    """The name and content of the one file that a data set keeps of the tokenizer at a path.

    Raises UserError if there is none.
    """
    path = Path(spec)
    try:
        if not path.is_dir():
            return f"tokenizer{path.suffix}", path.read_bytes()
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return name, (path / name).read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error.strerror}): check the path") from error
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return "tokenizer.json", gpt2_json(path / "vocab.json", path / "merges.txt")
    raise UserError(f"tokenizer {path}: holds no tokenizer.json, .model, or vocab.json with merges.txt: give another")


def gpt2_json(vocabulary: Path, merges: Path) -> bytes:
    """The tokenizer.json of GPT-2's two files. Raises UserError for files that are not those."""
    from tokenizers import ByteLevelBPETokenizer

    try:
        model = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges), add_prefix_space=False)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {vocabulary.parent}: not GPT-2's files ({error}): restore them") from error
    for token in END_OF_TEXT:
        if token in model.get_vocab():
            model.add_special_tokens([token])
    return str(model.to_str()).encode()


def _load_json(path: Path, content: bytes, eos_id: int | None) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise UserError(f"tokenizer {path}: reading it needs the package tokenizers: pip install tokenizers") from error
    try:
        model = FastTokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer file: give its tokenizer.json") from error
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not an end
    vocabulary = model.get_vocab(with_added_tokens=True)
    return Tokenizer(
        kind="tokenizer.json",
        path=path,
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=_json_eos(path, vocabulary) if eos_id is None else eos_id,
        fingerprint=hashlib.sha256(content).hexdigest(),
        encode_batch=in_pieces(
            lambda texts: [e.ids for e in model.encode_batch_fast(list(texts), add_special_tokens=False)]
        ),
        _decode=lambda ids: str(model.decode(ids, skip_special_tokens=True)),
    )


def _json_eos(path: Path, vocabulary: dict[str, int]) -> int:
    """The end-of-text token's id: what tokenizer_config.json beside it says, or a name in common use."""
    names: tuple[str, ...] = END_OF_TEXT
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        names = (named, *names) if isinstance(named, str) else names
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise UserError(
        f"tokenizer {path}: no end-of-text token found: put the tokenizer_config.json that "
        "names its eos_token beside it"
    )


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-fallback BPE model whose encode → decode is the identity; returns the .model file's bytes.

    The same texts give the same bytes. Raises UserError if the texts cannot fill the vocabulary or it is too
    small.
    """
    import sentencepiece

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=4 * TRAINING_CHUNK,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split("] ")[-1].split())
        raise UserError(
            f"cannot train a SentencePiece vocabulary of {vocab_size:,} pieces on this text ({reason}): "
            "choose another size in train:sentencepiece:VOCAB or give more text"
        ) from error
    return model.getvalue()


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of several lines: newlines join with their neighbours only inside a training sentence."""
    for text in texts:
        chunk = ""
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), TRAINING_CHUNK):
                part = line[start : start + TRAINING_CHUNK]
                if len(chunk) + len(part) > TRAINING_CHUNK:
                    yield chunk
                    chunk = ""
                chunk += part
        if chunk:
            yield chunk
