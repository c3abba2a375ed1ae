"""Damage each file of a real checkpoint in each way in turn: is every case found, and the older checkpoint taken?

Part of `python -m benchmarks.kill_matrix`, whose reference run it damages a copy of.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoints import find_whole
from pretrain.distributed import Ranks

FLIPS = 16
"""Bits flipped in each file, one at a time."""


def _truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _delete(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "cut off somewhere": (_truncate, 1),
    "a bit flipped": (_flip, FLIPS),
    "deleted": (_delete, 1),
}


def damage_table(run: Path, scratch: Path, seed: int = 0) -> tuple[str, bool]:
    """A Markdown table of the damage done to a copy of a run's newest checkpoint; and whether all of it was found.

    Found means: the damaged checkpoint is left, its file named, and the older one taken, as a run's start does.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(run / "checkpoints", scratch)
    newest = scratch / (scratch / "latest").read_text(encoding="utf-8").strip()
    chance = random.Random(seed)
    heads = "".join(f" {name} |" for name in DAMAGES)
    lines = [f"| file |{heads}", f"|---|{'---:|' * len(DAMAGES)}"]
    everything_found = True
    for path in sorted(newest.iterdir()):
        cells = []
        for damage, times in DAMAGES.values():
            found = sum(_is_found(path, damage, chance) for _ in range(times))
            everything_found &= found == times
            cells.append(f" {found} of {times} |")
        lines.append(f"| {path.name} |{''.join(cells)}")
    return "\n".join(lines) + "\n", everything_found


def _is_found(path: Path, damage: Callable[[Path, random.Random], None], chance: random.Random) -> bool:
    """Damage one file, look for a checkpoint to go on from, and mend the file again."""
    alone, whole = Ranks(0, 1, 0, 1), path.read_bytes()
    assert find_whole(path.parent.parent, alone) == path.parent
    damage(path, chance)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        taken = find_whole(path.parent.parent, alone)
    path.write_bytes(whole)
    return taken is not None and taken != path.parent and f"{path.parent}: {path.name}" in said.getvalue()
