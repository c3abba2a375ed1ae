"""What is evaluated: a checkpoint through our own model, or an exported folder through transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Dataset, UserError, open_dataset
from pretrain.decoding.loading import MANIFEST, Export, load_checkpoint_as_llama, load_export, load_trained
from pretrain.decoding.rivals import DRAFTING_OBJECTIVES
from pretrain.objectives import TokenBatch
from pretrain.transformer import document_mask


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
    head_VD: Tensor
    decoder: Callable[[], Export]
    """The same model to decode with, built when it is asked for."""
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

    path: also the name of a source of the mixture. Raises UserError where there is none, or its tokens mean something
    else to the model.
    """
    trained = subject.dataset
    sources = {name: source["path"] for name, source in trained.get("sources", {}).items()}
    chosen = sources.get(path, path) if path else trained["path"]
    try:
        dataset = open_dataset(
            chosen,
            tokenizer=trained.get("tokenizer") if chosen.endswith(".bin") else None,
            cache=trained.get("cache"),
            cache_bytes=trained.get("cache_bytes"),
        )
    except UserError as error:
        if path is None:
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
    return Subject(
        path=checkpoint.path,
        kind="checkpoint",
        step=checkpoint.step,
        tokens=checkpoint.tokens,
        sequence_length=checkpoint.config.data.sequence_length,
        dataset=checkpoint.dataset,
        hidden_states=lambda batch: model.next_token_states(batch, int(checkpoint.dataset["eos_id"])),
        head_VD=model.lm_head.weight,
        decoder=lambda: load_checkpoint_as_llama(checkpoint, device),
        can_draft=checkpoint.config.objective.name in DRAFTING_OBJECTIVES,
        device=device,
    )


def _open_export(path: Path) -> Subject:
    export = load_export(path)
    source = export.manifest["source"]
    llama = getattr(export.model, "llama", export.model)

    def hidden_states(batch: TokenBatch) -> Tensor:
        return llama.model(
            input_ids=batch.tokens[:, :-1],
            position_ids=batch.positions[:, :-1].long(),
            attention_mask=document_mask(batch.document_ids[:, :-1]),
            use_cache=False,
        ).last_hidden_state

    return Subject(
        path=path,
        kind="export",
        step=source["step"],
        tokens=source["tokens"],
        sequence_length=export.manifest["config"]["data"]["sequence_length"],
        dataset=export.manifest["dataset"],
        hidden_states=hidden_states,
        head_VD=llama.lm_head.weight,
        decoder=lambda: export,
        can_draft=export.can_draft,
        device=export.model.device,
    )
