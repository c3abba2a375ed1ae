"""What a run does when it is told to stop, when its numbers go wrong, and when a rank hangs.

This file is imported before torch is, and imports nothing that takes long.
"""

from __future__ import annotations

from pathlib import Path

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop, and saved: the same command goes on (EX_TEMPFAIL)."""

EXIT_HUNG = 76
"""Exit code of a run that ended itself because a rank hung: the same command goes on from the last checkpoint."""


def write_outcome(folder: Path, outcome: str) -> None:
    """Leave word of how this start ended: a scheduler sees the exit code of whichever rank died last."""
    (folder / "outcome").write_text(f"{outcome}\n", encoding="utf-8")
