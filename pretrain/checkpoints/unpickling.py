"""Opening DeepSpeed's files without trusting them: a pickle can run any code, so only data may come out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_pipeline import UserError


def load_data_only(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """A `.pt` file's content on the CPU, refusing any pickled class or function but DeepSpeed's three plain records.

    Raises UserError for a file that is damaged or holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:  # torch raises many kinds for a damaged file; each means the same to the user
        lines = [line for line in str(error).strip().splitlines() if "Unsupported" in line] or str(error).splitlines()
        reason = lines[0].strip() if lines else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint file ({reason}); use another checkpoint") from None
