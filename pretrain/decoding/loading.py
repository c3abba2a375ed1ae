"""Models to decode with: from an exported folder, or straight from a checkpoint's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from data_pipeline import UserError
from pretrain.decoding.adaptive_length import AdaptiveLength
from pretrain.decoding.drafting import DraftStep, draft_with_latent_dynamics
from pretrain.decoding.dynamics_folder import load_dynamics
from pretrain.decoding.llama import DYNAMICS_PREFIX, llama_config, llama_name
from pretrain.decoding.rivals import JointLlama, MultiTokenLlama, load_heads
from pretrain.latent_dynamics import LatentDynamics
from pretrain.model import PretrainingModel
from pretrain.objectives import BeliefState, JointToken, MultiToken

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

MANIFEST = "nextlat_manifest.json"
TOKEN_RANKS = "nextlat/tokens_by_frequency.json"
SMALL_PARAMETERS = 100_000_000


@dataclass(frozen=True)
class Export:
    """A model that generates."""

    path: Path
    model: Any
    """transformers' LlamaForCausalLM, or one of `rivals`, which hold one; in evaluation mode."""
    tokenizer: Any
    """transformers' tokenizer; None for a model that comes straight from a checkpoint."""
    dynamics: LatentDynamics | None
    """p_ψ; None where the objective has none."""
    manifest: dict[str, Any]
    """The content of nextlat_manifest.json, or at least its `dataset`."""

    @property
    def can_draft(self) -> bool:
        """Whether there is something to draft with: p_ψ, or what MTP and JTP have."""
        return self.dynamics is not None or hasattr(self.model, "draft_step")

    @cached_property
    def adaptive_length(self) -> AdaptiveLength:
        """The rule of `--draft auto`: what it learns from one text, of costs above all, serves the next."""
        return AdaptiveLength(getattr(self.model, "longest_draft", AdaptiveLength.LONGEST))

    @cached_property
    def _draft_steps(self) -> dict[tuple[int, ...] | None, DraftStep]:
        return {}

    def draft_step(self, vocabulary: Sequence[int] | None = None) -> DraftStep | None:
        """How it drafts, the same for every text: a GPU's captured steps are kept. None where it cannot.

        vocabulary: tokens that may be drafted, where p_ψ drafts; None for all.
        """
        if self.dynamics is None:
            return self.model.draft_step if self.can_draft else None
        key = None if vocabulary is None else tuple(vocabulary)
        if key not in self._draft_steps:
            self._draft_steps[key] = draft_with_latent_dynamics(self.model, self.dynamics, vocabulary)
        return self._draft_steps[key]

    @property
    def eos_id(self) -> int:
        """The token that opens and ends a document."""
        return int(self.model.config.eos_token_id)


@contextmanager
def fitting_threads(model: nn.Module) -> Iterator[None]:
    """On a CPU, decode a small model on one thread: its products are too short to share, and waiting costs more.

    OMP_NUM_THREADS, where it is set, has the last word.
    """
    parameters = list(model.parameters())
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    small = sum(parameter.numel() for parameter in parameters) < SMALL_PARAMETERS
    threads = torch.get_num_threads()
    if on_cpu and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an exported folder. Raises UserError for any other folder."""
    file = Path(path) / MANIFEST
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not an exported model, {MANIFEST} cannot be read ({error.__class__.__name__}); "
            f"make one with python -m pretrain.export RUN --out {path}"
        ) from None


def load_export(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Export:
    """Load a folder written by `pretrain.export`.

    dtype: None for the folder's own. device: None for the first GPU where there is one.
    Raises UserError for a folder that is no export or is damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _check_sizes(path, manifest)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, dynamics = load_folder(path, dtype)
    heads = load_heads(path / "mtp", model.config, model.dtype)
    if heads is not None:
        model = MultiTokenLlama(model, heads)
    return Export(path, model.to(device), tokenizer, dynamics.to(device) if dynamics is not None else None, manifest)


def load_folder(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any, LatentDynamics | None]:
    """Model, tokenizer and p_ψ of a folder with or without a manifest, on the CPU, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model, tokenizer, load_dynamics(path / "nextlat", model.dtype)


def draft_vocabulary(choice: str, export: Export) -> list[int]:
    """Token ids that may be drafted: the `choice` most frequent ones of the training data, or those in a JSON file.

    Raises UserError for a file that is no list of the model's token ids, or where frequencies were not recorded.
    """
    if export.dynamics is None:
        raise UserError(
            f"--draft-vocabulary {choice}: {export.path} has no latent dynamics model, whose drafts it "
            "limits; leave it out"
        )
    if choice.isascii() and choice.isdigit():
        ranks = export.path / TOKEN_RANKS
        if not ranks.is_file():
            raise UserError(
                f"--draft-vocabulary {choice}: {export.path} records no token frequencies; give a JSON file with a "
                "list of token ids, or export again where the training data can be read"
            )
        ids = json.loads(ranks.read_text(encoding="utf-8"))[: int(choice)]
    else:
        try:
            ids = json.loads(Path(choice).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--draft-vocabulary {choice}: cannot be read ({error}); give a number or a file") from None
    size = export.model.config.vocab_size
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
        raise UserError(f"--draft-vocabulary {choice}: give at least one token id, each from 0 to {size - 1}")
    return ids


def load_trained(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PretrainingModel:
    """The trained model itself in float32; weights rounded to `dtype` on the way, for a comparison.

    Raises UserError where the checkpoint's weights are not exactly those of its config.
    """
    with torch.device("meta"):
        model = PretrainingModel(checkpoint.config, checkpoint.vocab_size)
    check_names(model, checkpoint)
    for name in checkpoint.weight_names:
        _assign(model, name, checkpoint.weight(name).to(dtype).float())
    if checkpoint.config.model.tie_embeddings:
        model.lm_head.weight = model.trunk.embed_tokens.weight
    return model.eval()


def load_checkpoint_as_llama(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Export:
    """A checkpoint's trunk as LlamaForCausalLM in float32, with no folder between; it has no tokenizer.

    Raises UserError for BST, which cannot be decoded with.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    trained = load_trained(checkpoint)
    if isinstance(trained.objective, BeliefState):
        raise UserError(f"{checkpoint.path}: objective.name=bst cannot be decoded with; evaluate its perplexity")
    eos_id = int(checkpoint.dataset["eos_id"])
    shape = llama_config(checkpoint.config, checkpoint.vocab_size, eos_id, torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    for name, parameter in trained.named_parameters():
        target = llama_name(name)
        if target is not None:
            _assign(model, target, parameter.data)
    model.tie_weights()
    dynamics = getattr(trained.objective, "dynamics", None)
    match trained.objective:
        case MultiToken(heads=heads):
            model = MultiTokenLlama(model, heads)
        case JointToken(fetch=fetch):
            model = JointLlama(model, fetch)
    return Export(
        checkpoint.path,
        model.eval().to(device),
        None,
        dynamics.to(device) if dynamics is not None else None,
        {"dataset": checkpoint.dataset},
    )


def check_names(model: PretrainingModel, checkpoint: Checkpoint) -> None:
    """Raise UserError unless the checkpoint holds each of the model's weights exactly once, and no other."""
    expected, found = {name for name, _ in model.named_parameters()}, list(checkpoint.weight_names)
    problems = {
        "missing": expected - set(found),
        "left over": set(found) - expected,
        "twice there": {name for name in found if found.count(name) > 1},
    }
    for problem, names in problems.items():
        if names:
            raise UserError(
                f"{checkpoint.path}: {len(names)} weights are {problem}, such as {min(names)}; the checkpoint "
                "does not fit its own config, use another one"
            )


def uses_dynamics(name: str) -> bool:
    """Is this a weight of p_ψ?"""
    return name.startswith(DYNAMICS_PREFIX)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace one parameter by `value`, without a copy."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = getattr(owner, attribute).shape
    if value.shape != expected:
        raise UserError(
            f"{name} has shape {tuple(value.shape)} where the config makes it {tuple(expected)}; "
            "the checkpoint does not fit its own config, use another one"
        )
    setattr(owner, attribute, nn.Parameter(value, requires_grad=False))


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file}: missing or not of its recorded size; export the model again")
