"""What is evaluated: a checkpoint through our own model, or an exported folder through transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import Dataset, UserError, open_dataset
from pretrain.decoding.loading import MANIFEST, Export, load_checkpoint_as_llama, load_export, load_trained
from pretrain.decoding.rivals import DRAFTING_OBJECTIVES
from pretrain.objectives import MultiToken, TokenBatch
from pretrain.transformer import document_mask

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint


@dataclass(frozen=True)
class Subject:
    """A model under evaluation."""

    path: Path
    kind: str
    """checkpoint or export."""
    step: int
    tokens: int
    sequence_length: int
    dataset: dict[str, Any]
    """The data set that it was trained on, as its checkpoint recorded it."""
    hidden_states: Callable[[TokenBatch], Tensor]
    """What the head reads to predict the next token, (B, T, D), at the first T tokens of a batch: final hidden states,
    unless the objective has more between. Documents do not see each other."""
    trunk_states: Callable[[TokenBatch], Tensor]
    """What the trunk has made of the text, (B, T, D), at the same tokens: final, post-norm hidden states, before Fetch
    and before BST's pair head; of MTP, what the shared blocks give to all heads, at unit root mean square."""
    head_VD: Tensor
    decoder: Callable[[], Export]
    """The same model to decode with, built when it is first asked for."""
    transformers_tokenizer: Callable[[], Any]
    """Its tokenizer as transformers has it, made when it is asked for."""
    can_draft: bool
    device: torch.device

    def described(self) -> dict[str, Any]:
        """For a result: which model this is."""
        return {"source": str(self.path), "kind": self.kind, "step": self.step, "trained_tokens": self.tokens}


def open_subject(path: str | Path) -> Subject:
    """Open a run, a checkpoint or an export. Raises UserError for anything else."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run, a checkpoint or an exported model")
    return _open_export(path) if (path / MANIFEST).exists() else _open_checkpoint(path)


def open_data(subject: Subject, path: str | None) -> Dataset:
    """The data set at `path`, or the one that the subject was trained on; of a mixture, that of the largest share.

    path: also the name of a source of the mixture; the first of several with commas between. Raises UserError where
    there is none, or its tokens mean something else to the model.
    """
    return _open(subject, subject.dataset["path"] if path is None else _places(subject, path)[0], path is not None)


def open_domains(subject: Subject, path: str | None) -> dict[str, Dataset]:
    """Data sets by name: every one in `path`, as in `open_data`, or every source that the subject was trained on."""
    trained = list(subject.dataset.get("sources", {})) or [subject.dataset["path"]]
    names = trained if path is None else _places(subject, path)
    return {name: _open(subject, name, path is not None) for name in names}


def _places(subject: Subject, path: str) -> list[str]:
    one = path in subject.dataset.get("sources", {}) or Path(path).exists()
    return [path] if one else [part.strip() for part in path.split(",")]


def _open(subject: Subject, place: str, asked: bool) -> Dataset:
    trained = subject.dataset
    sources = {name: source["path"] for name, source in trained.get("sources", {}).items()}
    chosen = sources.get(place, place)
    try:
        dataset = open_dataset(
            chosen,
            tokenizer=trained.get("tokenizer") if chosen.endswith(".bin") else None,
            cache=trained.get("cache"),
            cache_bytes=trained.get("cache_bytes"),
        )
    except UserError as error:
        if not asked:
            raise UserError(f"the data that {subject.path} was trained on: {error}; or give --data") from None
        raise
    if dataset.tokenizer_fingerprint != subject.dataset["tokenizer_fingerprint"]:
        raise UserError(
            f"{chosen}: made with another tokenizer ({dataset.tokenizer_fingerprint[:12]}) than {subject.path} was "
            f"trained with ({subject.dataset['tokenizer_fingerprint'][:12]}); prepare the text with that one"
        )
    return dataset


def _open_checkpoint(path: Path) -> Subject:
    from pretrain.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_trained(checkpoint).to(device)

    def trunk_states(batch: TokenBatch) -> Tensor:
        states = model.trunk_states(batch)
        return unit_rms(states.before_last_block) if isinstance(model.objective, MultiToken) else states.hidden

    return Subject(
        path=checkpoint.path,
        kind="checkpoint",
        step=checkpoint.step,
        tokens=checkpoint.tokens,
        sequence_length=checkpoint.config.data.sequence_length,
        dataset=checkpoint.dataset,
        hidden_states=lambda batch: model.next_token_states(batch, int(checkpoint.dataset["eos_id"])),
        trunk_states=trunk_states,
        head_VD=model.lm_head.weight,
        decoder=cache(lambda: load_checkpoint_as_llama(checkpoint, device)),
        transformers_tokenizer=lambda: _tokenizer_of(checkpoint),
        can_draft=checkpoint.config.objective.name in DRAFTING_OBJECTIVES,
        device=device,
    )


def _open_export(path: Path) -> Subject:
    export = load_export(path)
    source = export.manifest["source"]
    llama = getattr(export.model, "llama", export.model)

    def run(batch: TokenBatch) -> Any:
        return llama.model(
            input_ids=batch.tokens[:, :-1],
            position_ids=batch.positions[:, :-1].long(),
            attention_mask=document_mask(batch.document_ids[:, :-1]),
            output_hidden_states=llama is not export.model,  # MTP's
            use_cache=False,
        )

    def trunk_states(batch: TokenBatch) -> Tensor:
        out = run(batch)
        return unit_rms(out.hidden_states[-2]) if llama is not export.model else out.last_hidden_state

    return Subject(
        path=path,
        kind="export",
        step=source["step"],
        tokens=source["tokens"],
        sequence_length=export.manifest["config"]["data"]["sequence_length"],
        dataset=export.manifest["dataset"],
        hidden_states=lambda batch: run(batch).last_hidden_state,
        trunk_states=trunk_states,
        head_VD=llama.lm_head.weight,
        decoder=lambda: export,
        transformers_tokenizer=lambda: export.tokenizer,
        can_draft=export.can_draft,
        device=export.model.device,
    )


def unit_rms(x_BTD: Tensor) -> Tensor:
    """A norm without a weight."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=1e-5)


def _tokenizer_of(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    from pretrain.export.tokenizer_files import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        length = checkpoint.config.data.sequence_length
        write_tokenizer(checkpoint.tokenizer(), int(checkpoint.dataset["eos_id"]), length, Path(folder))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
