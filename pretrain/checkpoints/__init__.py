"""Checkpoints: written beside, flushed, listed with checksums, and only then given their name; and read with no trust.

`saving` writes them while training goes on, `retention` says which stay, `mirror` copies them elsewhere. `loading`
finds the one to go on from, `same_run` refuses another run's, `elastic` fits it to other ranks; `reading` needs no
engine.
"""

from pretrain.checkpoints.loading import find_start, find_whole, load_checkpoint
from pretrain.checkpoints.reading import Checkpoint, open_checkpoint
from pretrain.checkpoints.same_run import check_same_run
from pretrain.checkpoints.saving import Saver, save_checkpoint
from pretrain.checkpoints.state import TrainState

__all__ = [
    "Checkpoint",
    "Saver",
    "TrainState",
    "check_same_run",
    "find_start",
    "find_whole",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
