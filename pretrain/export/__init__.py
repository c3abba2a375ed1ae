"""A checkpoint as a folder that transformers loads with no custom code.

    DIR/config.json, generation_config.json           LlamaForCausalLM
    DIR/model.safetensors                             the trunk and head; in shards with an index where large
    DIR/tokenizer.json, tokenizer_config.json
    DIR/nextlat/config.json, model.safetensors        p_ψ, where the objective has it
    DIR/custom_generate/                              with it: drafting inside transformers' own `generate`
    DIR/mtp/config.json, model.safetensors            MTP's extra heads, likewise
    DIR/README.md, curves.png                         a model card
    DIR/nextlat_manifest.json                         source, config, what was verified, sha256 of each file

The folder is written beside DIR, verified as transformers loads it, and then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from data_pipeline import UserError
from pretrain.config import Config, MtpConfig, NextLatConfig
from pretrain.decoding.llama import llama_config
from pretrain.decoding.loading import MANIFEST
from pretrain.export.curves import write_curves
from pretrain.export.custom_generate import write_custom_generate
from pretrain.export.model_card import model_card
from pretrain.export.token_ranks import write_token_ranks
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.export.verification import verify_export
from pretrain.export.weights import Advance, Plan, plan_weights, write_safetensors, write_weights
from pretrain.jobs.submission import commit
from pretrain.latent_dynamics import LatentDynamics

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9

__all__ = ["DTYPES", "SHARD_BYTES", "check_target", "export"]


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

    Memory stays below twice the largest tensor and 1 GB, whatever the size of the model; see `streaming`.

    Args:
        checkpoint: from `pretrain.checkpoints.open_checkpoint`.
        out: the new folder.
        dtype: float32 (the trained weights as they are), bfloat16 or float16.
        shard_bytes: largest safetensors file.
        overwrite: replace an earlier export in `out`.
        console: where the progress bar goes.

    Raises UserError for what `check_target` refuses, a full disk, weights that do not fit the config or are not finite,
    and an exported model or tokenizer that is not exactly the trained one.
    """
    out = Path(out)
    check_target(out, dtype, overwrite)
    torch_dtype = DTYPES[dtype]
    trunk, drafter = plan_weights(checkpoint)
    _check_room(out, sum(plan.bytes(torch_dtype) for plan in trunk + drafter))
    unfinished = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made here ({error.strerror}); give another folder") from None
    try:
        values = sum(plan.values for plan in trunk + drafter)
        with _progress(2 * values, console) as advance:
            _write(unfinished, checkpoint, trunk, drafter, torch_dtype, shard_bytes, advance)
            measured = verify_export(unfinished, checkpoint, torch_dtype, advance)
            advance("sha256 of each file", 0)
            has_curves = write_curves(unfinished, checkpoint)
            (unfinished / "README.md").write_text(model_card(checkpoint, dtype, measured, has_curves), encoding="utf-8")
            _write_manifest(unfinished, checkpoint, dtype, measured)
        _move_into_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def check_target(out: Path, dtype: str, overwrite: bool) -> None:
    """Raise UserError for an unknown precision, or a folder that is in use or cannot be written."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: no such precision of weights; there are {', '.join(DTYPES)}")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {above} is no folder that you may write to; give another folder")
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


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    trunk: list[Plan],
    drafter: list[Plan],
    dtype: torch.dtype,
    shard_bytes: int,
    advance: Advance,
) -> None:
    """All files but the card, its picture and the manifest."""
    eos_id = int(checkpoint.dataset["eos_id"])
    config = checkpoint.config
    _write_json(folder / "config.json", llama_config(config, checkpoint.vocab_size, eos_id, dtype))
    generation = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(checkpoint.tokenizer(), eos_id, config.data.sequence_length, folder)
    if drafter:
        subfolder = folder / config.objective.name
        described = _describe_drafter(config) | {"step": checkpoint.step, "dtype": str(dtype).removeprefix("torch.")}
        write_safetensors(subfolder / "model.safetensors", drafter, checkpoint, dtype, advance)
        _write_json(subfolder / "config.json", described)
    if isinstance(config.objective, NextLatConfig):
        write_token_ranks(folder, checkpoint.dataset)
        write_custom_generate(folder)
    write_weights(folder, trunk, checkpoint, dtype, shard_bytes, advance)


def _describe_drafter(config: Config) -> dict[str, Any]:
    """The config.json of what drafts; its folder has the objective's name."""
    match config.objective:
        case NextLatConfig() as objective:
            return {
                "width": config.model.width,
                "hidden_width": objective.dynamics_width,
                "norm_epsilon": LatentDynamics.norm_epsilon,
                "horizon": objective.horizon,
                "next_latent_weight": objective.next_latent_weight,
                "kl_weight": objective.kl_weight,
            }
        case MtpConfig() as objective:
            return {"horizon": objective.horizon, "multi_token_weight": objective.multi_token_weight}
        case other:
            raise AssertionError(f"{other.name} has nothing that drafts beside a Llama")


def _write_manifest(folder: Path, checkpoint: Checkpoint, dtype: str, measured: dict[str, Any]) -> None:
    import transformers

    from pretrain.checkpoints.manifest import flush_and_hash

    tokenizer = checkpoint.tokenizer()
    content = {
        "format": FORMAT,
        "source": {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "tokens": checkpoint.tokens},
        "dtype": dtype,
        "config": checkpoint.config.model_dump(mode="json"),
        "dataset": checkpoint.dataset,
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        "verified": measured,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "exporter": commit()},
        "files": flush_and_hash(folder, sorted(path for path in folder.rglob("*") if path.is_file())),
    }
    _write_json(folder / MANIFEST, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
def _progress(values: int, console: Console | None) -> Iterator[Advance]:
    """A progress bar over so many values."""
    columns = (TextColumn("exporting"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}")
    with Progress(*columns, description, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=values)
        yield lambda what, done: progress.update(task, description=what, advance=done)
