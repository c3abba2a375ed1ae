"""curves.png of an exported folder: the run's losses up to the exported step, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.metrics import METRICS_FILE

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

MOST_POINTS = 2_000
"""Steps of each kind, validated and not, that are drawn at least, where there are so many; twice as many at most."""
CURVES = "curves.png"


class _Thinned:
    """Evenly spread ones of any number of lines: whenever there are too many, every second is forgotten."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._stride, self._seen = 1, 0

    def add(self, line: dict[str, Any]) -> None:
        if self._seen % self._stride == 0:
            self.lines.append(line)
        self._seen += 1
        if len(self.lines) > 2 * MOST_POINTS:
            del self.lines[1::2]
            self._stride *= 2


def write_curves(folder: Path, checkpoint: Checkpoint) -> bool:
    """Draw into `folder`; whether there was something to draw, the run's metrics.jsonl beside its checkpoints."""
    from matplotlib.figure import Figure

    from pretrain.report import COLOURS, Run, draw_losses

    run = checkpoint.path.parent.parent
    lines = _read(run / METRICS_FILE, checkpoint.step)
    if not lines:
        return False
    figure = Figure(figsize=(11, 6.4), dpi=100, layout="constrained")
    draw_losses(figure, [Run(run, checkpoint.config, lines, {}, COLOURS[0])])
    figure.savefig(folder / CURVES)
    return True


def _read(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines of metrics up to a step, thinned; none where there is no file. A line that is being written ends it."""
    if not path.is_file():
        return []
    validated, others = _Thinned(), _Thinned()
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["step"] > step:
                break
            (validated if "val_loss_next_token" in line else others).add(line)
    return sorted(validated.lines + others.lines, key=lambda line: int(line["step"]))
