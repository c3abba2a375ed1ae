"""A checkpoint as a folder that transformers loads with no custom code.

    DIR/config.json, generation_config.json           LlamaForCausalLM
    DIR/model.safetensors                             the trunk and head; in shards with an index where large
    DIR/tokenizer.json, tokenizer_config.json
    DIR/nextlat/config.json, model.safetensors        p_ψ, where the objective has it
    DIR/custom_generate/                              with it: drafting inside transformers' own `generate`
    DIR/mtp/config.json, model.safetensors            MTP's extra heads, likewise
    DIR/README.md                                     a model card
    DIR/nextlat_manifest.json                         source, config, what was verified, sha256 of each file

The folder is written beside DIR, verified as transformers loads it, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from data_pipeline import UserError
from pretrain.config import Config, MtpConfig, NextLatConfig
from pretrain.decoding.llama import DYNAMICS_PREFIX, llama_config, llama_name
from pretrain.decoding.loading import MANIFEST, check_names
from pretrain.decoding.rivals import HEADS_PREFIX
from pretrain.export.custom_generate import write_custom_generate
from pretrain.export.model_card import model_card
from pretrain.export.token_ranks import write_token_ranks
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.export.verification import verify_export
from pretrain.export.weights import Plan, write_safetensors, write_weights
from pretrain.latent_dynamics import LatentDynamics
from pretrain.model import PretrainingModel

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9

__all__ = ["DTYPES", "SHARD_BYTES", "export"]


def export(
    checkpoint: Checkpoint,
    out: str | Path,
    dtype: str = "float32",
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a checkpoint as an exported folder, verified, or leave nothing behind.

    Args:
        checkpoint: from `pretrain.checkpoints.open_checkpoint`.
        out: the new folder.
        dtype: float32 (the trained weights as they are), bfloat16 or float16.
        shard_bytes: largest safetensors file.
        overwrite: replace an earlier export in `out`.
        console: where the progress bar goes.

    Raises UserError for a folder in use, a full disk, weights that do not fit the config or are not finite, and
    an exported model or tokenizer that is not exactly the trained one.
    """
    out = Path(out)
    torch_dtype = DTYPES[dtype]
    _check_target(out, overwrite)
    trunk, drafter = _plan(checkpoint)
    _check_room(out, sum(plan.bytes(torch_dtype) for plan in trunk + drafter))
    unfinished = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with _progress(len(trunk) + len(drafter), console) as advance:
            _write(unfinished, checkpoint, trunk, drafter, torch_dtype, shard_bytes, advance)
            advance("verifying", 0)
            measured = verify_export(unfinished, checkpoint, torch_dtype)
        (unfinished / "README.md").write_text(model_card(checkpoint, dtype, measured), encoding="utf-8")
        _write_manifest(unfinished, checkpoint, dtype, measured)
        _move_into_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _plan(checkpoint: Checkpoint) -> tuple[list[Plan], list[Plan]]:
    """Every weight of the model exactly once: those of LlamaForCausalLM, and those that draft.

    Raises UserError for an objective that needs more to predict the next token: a folder that loads as a Llama and is
    not the model that was trained would be worse than none.
    """
    with torch.device("meta"):
        model = PretrainingModel(checkpoint.config, checkpoint.vocab_size)
    if model.objective.needed_at_inference:
        raise UserError(
            f"{checkpoint.path}: objective.name={checkpoint.config.objective.name} predicts the next token with "
            "modules of its own, which LlamaForCausalLM has no place for; evaluate the checkpoint itself with "
            "python -m pretrain.evaluate"
        )
    check_names(model, checkpoint)
    trunk, drafter = [], []
    for name, parameter in model.named_parameters():
        target = llama_name(name)
        if target is not None:
            trunk.append(Plan(target, name, tuple(parameter.shape)))
        else:
            own = name.removeprefix(DYNAMICS_PREFIX).removeprefix(HEADS_PREFIX)
            drafter.append(Plan(own, name, tuple(parameter.shape)))
    return trunk, drafter


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    trunk: list[Plan],
    drafter: list[Plan],
    dtype: torch.dtype,
    shard_bytes: int,
    advance: Callable[[str, int], None],
) -> None:
    """All files but the card and the manifest."""

    def read(name: str) -> Tensor:
        advance(name, 1)
        return checkpoint.weight(name)

    eos_id = int(checkpoint.dataset["eos_id"])
    config = checkpoint.config
    _write_json(folder / "config.json", llama_config(config, checkpoint.vocab_size, eos_id, dtype))
    generation = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(checkpoint.tokenizer(), eos_id, config.data.sequence_length, folder)
    if drafter:
        subfolder, described = _describe_drafter(config)
        described |= {"step": checkpoint.step, "dtype": str(dtype).removeprefix("torch.")}
        write_safetensors(folder / subfolder / "model.safetensors", drafter, read, dtype)
        _write_json(folder / subfolder / "config.json", described)
    if isinstance(config.objective, NextLatConfig):
        write_token_ranks(folder, checkpoint.dataset)
        write_custom_generate(folder)
    write_weights(folder, trunk, read, dtype, shard_bytes)


def _describe_drafter(config: Config) -> tuple[str, dict[str, Any]]:
    """The folder that what drafts goes into, and the content of its config.json."""
    match config.objective:
        case NextLatConfig() as objective:
            return "nextlat", {
                "width": config.model.width,
                "hidden_width": objective.dynamics_width,
                "norm_epsilon": LatentDynamics.norm_epsilon,
                "horizon": objective.horizon,
                "next_latent_weight": objective.next_latent_weight,
                "kl_weight": objective.kl_weight,
            }
        case MtpConfig() as objective:
            return "mtp", {"horizon": objective.horizon, "multi_token_weight": objective.multi_token_weight}
        case other:
            raise AssertionError(f"{other.name} has nothing that drafts beside a Llama")


def _write_manifest(folder: Path, checkpoint: Checkpoint, dtype: str, measured: dict[str, Any]) -> None:
    import transformers

    tokenizer = checkpoint.tokenizer()
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    content = {
        "format": FORMAT,
        "source": {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "tokens": checkpoint.tokens},
        "dtype": dtype,
        "config": checkpoint.config.model_dump(mode="json"),
        "dataset": checkpoint.dataset,
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        "verified": measured,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "files": files,
    }
    _write_json(folder / MANIFEST, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give a new folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: exists and is not empty; give a new folder, or --overwrite to replace an export")
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: is no exported model, so --overwrite leaves it alone; give a new folder")


def _check_room(out: Path, weights_bytes: int) -> None:
    needed = weights_bytes + 64 * 2**20
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{out}: the export needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some space, "
            "or choose a smaller --dtype"
        )


def _move_into_place(unfinished: Path, out: Path) -> None:
    """Rename; an earlier export steps aside first and is removed last."""
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    unfinished.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _progress(total: int, console: Console | None) -> Iterator[Callable[[str, int], None]]:
    """A progress bar; the function that it gives takes what is being done and by how much to advance."""
    columns = (TextColumn("exporting"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda what, by: progress.update(task, description=what, advance=by)
