"""Command: continue a prompt with an exported model, and show what drafting gains."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data_pipeline import UserError, run_command
from pretrain.decoding import DecodingStatistics, Export, Sampling, load_export
from pretrain.decoding.continuation import DEFAULT_DRAFT, continue_texts
from pretrain.decoding.loading import draft_vocabulary, fitting_threads
from pretrain.decoding.speculative import check_room

DEFAULT_NEW_TOKENS = 128
TIMED_RUNS = 3

OnTokens = Callable[[int, list[int]], None]
Decoded = tuple[list[list[int]], DecodingStatistics]


def parse_draft(text: str | None, can_draft: bool, where: str | Path) -> int | str:
    """`--draft`: a number of tokens, "auto", or 0 for off. Without one: DEFAULT_DRAFT where the model can.

    Raises UserError for anything else, and for drafting where the model cannot.
    """
    if text is None:
        return DEFAULT_DRAFT if can_draft else 0
    if text == "off":
        return 0
    if text != "auto" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"--draft {text}: give a number of tokens of at least 1, auto or off")
    if not can_draft:
        raise UserError(
            f"--draft {text}: {where} has no latent dynamics model to draft with; use --draft off, or a model "
            "trained with objective.name=nextlat or mtp"
        )
    return text if text == "auto" else int(text)


class TextStream:
    """Writes a growing text; characters of which only some bytes have come are held back."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]):
        self._decode, self._write = decode, write
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, tokens: list[int], last: bool = False) -> None:
        """Add tokens; `last` shows what was held back."""
        self._tokens += tokens
        text = self._decode(self._tokens)
        if not last:
            text = text.rstrip("\ufffd")
        if text.startswith(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = _parse(argv)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1")
    parse_draft(arguments.draft, True, arguments.export)
    texts = [*arguments.prompt, *(read_prompts(arguments.prompts) if arguments.prompts else [])]
    if not texts:
        raise UserError("give at least one --prompt TEXT, or --prompts FILE")
    export = load_export(arguments.export)
    draft = parse_draft(arguments.draft, export.can_draft, arguments.export)
    vocabulary = draft_vocabulary(arguments.draft_vocabulary, export) if arguments.draft_vocabulary else None
    prompts = [export.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    longest = max(map(len, prompts))
    room = export.model.config.max_position_embeddings - longest
    if room < 1:
        raise UserError(f"--prompt has {longest} tokens and the model's context {room + longest}; shorten the prompt")
    new = arguments.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
    check_room(export.model, longest, new)
    seed = torch.seed() % 2**31 if arguments.seed is None else arguments.seed

    def decode(draft: int | str, on_tokens: OnTokens | None = None) -> Decoded:
        return continue_texts(export, prompts, new, draft, sampling, seed, on_tokens, vocabulary)

    with fitting_threads(export.model):
        show = stream_text if len(prompts) == 1 else print_texts
        tokens, counted = show(texts, export, partial(decode, draft))
        if arguments.stats:
            print_statistics(decode, draft, sampling, tokens, counted)


def read_prompts(path: str) -> list[str]:
    """One prompt a line. Raises UserError for a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--prompts {path}: cannot be read ({error}); give a text file with one prompt a line"
        ) from None


def stream_text(texts: list[str], export: Export, decode: Callable[..., Decoded]) -> Decoded:
    """Write the prompt, and what follows as it comes, to standard output."""

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    stream = TextStream(lambda ids: str(export.tokenizer.decode(ids, skip_special_tokens=True)), write)
    write(texts[0])
    result = decode(lambda _, tokens: stream(tokens))
    stream([], last=True)
    write("\n")
    return result


def print_texts(texts: list[str], export: Export, decode: Callable[..., Decoded]) -> Decoded:
    """Decode all prompts in one batch, then write them with what follows, each under its number."""
    result = decode()
    for number, (text, tokens) in enumerate(zip(texts, result[0], strict=True), start=1):
        print(f"── {number}/{len(texts)}\n{text}{export.tokenizer.decode(tokens, skip_special_tokens=True)}")
    return result


def print_statistics(
    decode: Callable[[int | str], Decoded],
    draft: int | str,
    sampling: Sampling,
    tokens: list[list[int]],
    counted: DecodingStatistics,
) -> None:
    """Print the drafts' acceptance; decode again, plain and drafting in turn, and print the ratio of speeds."""
    plain_rates, drafting_rates = [], []
    plain_tokens: list[list[int]] = []
    for _ in range(TIMED_RUNS):
        plain_tokens, plain = decode(0)
        plain_rates.append(plain.tokens_per_second)
        if draft:
            drafting_rates.append(decode(draft)[1].tokens_per_second)
    plain_rate = statistics.median(plain_rates)
    print(f"\n{counted.tokens} tokens in {counted.cycles} cycles; plain {plain_rate:,.1f} tokens/s")
    if not draft:
        return
    rate = statistics.median(drafting_rates)
    positions = ", ".join(f"{share:.0%}" for share in counted.acceptance_by_position)
    print(f"draft {draft}: {counted.drafted} drafted, {counted.accepted} accepted")
    print(f"accepted per cycle {counted.accepted_per_cycle:.2f}; of those compared, by position: {positions}")
    print(f"drafting {rate:,.1f} tokens/s, {rate / plain_rate:.2f} times plain (medians of {TIMED_RUNS} runs in turn)")
    if sampling.temperature == 0:
        print(f"text equal to plain greedy text: {'yes' if tokens == plain_tokens else 'NO'}")
    else:
        print("texts are other draws from one distribution, so they need not be equal")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.generate",
        description="Continue a prompt with an exported model; drafts of the latent dynamics model make it faster "
        "and leave the distribution of the text as it is.",
    )
    parser.add_argument("export", metavar="EXPORT", help="a folder written by pretrain.export")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeat it for a batch"
    )
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one a line; all are decoded in one batch")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default: {DEFAULT_NEW_TOKENS}, or what the context holds"
    )
    parser.add_argument(
        "--draft",
        metavar="N|auto|off",
        help=f"tokens drafted per cycle (default: {DEFAULT_DRAFT}, off without a latent dynamics model)",
    )
    parser.add_argument(
        "--draft-vocabulary",
        metavar="N|FILE",
        help="draft only the N most frequent tokens of the training data, or the ids in a JSON file (default: all)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable tokens up to sum P")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random numbers; default: another each time")
    parser.add_argument("--stats", action="store_true", help="print acceptance, and speed against plain decoding")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
