"""A NextLat run small enough that starting it costs more than its steps: what benchmarks and tests train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_run_config(folder: Path, data: Path, name: str, changes: dict[str, object]) -> Path:
    """The config of a run of 20 steps on `data`, in `folder` like the run's own folder `runs/NAME`.

    changes: by `section.key`, or by `section` for a whole one.
    """
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 1},
        "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2},
        "objective": {
            "name": "nextlat",
            "horizon": 2,
            "next_latent_weight": 1.0,
            "kl_weight": 1.0,
            "dynamics_width": 96,
        },
        "data": {"path": str(data), "sequence_length": 48},
        "batch": {"global_sequences": 8, "micro_sequences": 4},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "gradient_clip": 1.0},
        "schedule": {"name": "wsd", "steps": 20, "warmup_steps": 4, "decay_steps": 8},
        "validation": {"every": 10, "sequences": 12},
        # Without it every tensor of so small a model stays whole on each rank, and ZeRO-3 has nothing to gather.
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }
    for key, value in changes.items():
        *sections, last = key.split(".")
        target: dict[str, Any] = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
