"""Opening DeepSpeed's files without trusting them: a pickle can run any code, so only data may come out of one."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from data_pipeline import UserError


def _stage(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 wrote an enum's member as: getattr, of this enum and its members alone."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise UnpicklingError(f"Unsupported getattr of {kind}: {name}")
    return ZeroStageEnum[name]


# Once for all: torch's `safe_globals` context changes the whole process, and files are opened by several threads.
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address, (_stage, "builtins.getattr")])


def load_data_only(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """A `.pt` file's content on the CPU, refusing any pickled class or function but DeepSpeed's plain records.

    Raises UserError for a file that is damaged or holds anything else.
    """
    try:
        return _load(path, mmap)
    except Exception as error:  # torch raises many kinds for a damaged file; each means the same to the user
        raise UserError(f"{path}: cannot be read as a checkpoint file ({_reason(error)}); use another one") from None


def why_not_data_only(path: Path) -> str | None:
    """What `load_data_only` would refuse a file for, to be read after its name; None if nothing. Reads no tensor."""
    try:
        _load(path, mmap=True)
    except Exception as error:  # as above
        return f"is no file of plain data ({_reason(error)})"
    return None


def _load(path: str | Path, mmap: bool) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def _reason(error: Exception) -> str:
    """Of torch's long advice, the line that names what was found."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "Unsupported" in line), lines[0]).strip()
