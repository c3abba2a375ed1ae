"""Memory of one GPU, part by part, as DeepSpeed 0.19 lays it out.

P parameters, N ranks, w bytes per weight. Master weights and Adam's two moments are float32: 12·P bytes. Gradients
of micro-batches add up in float32: 4·P bytes.

    stage   weights   gradients       optimizer       buffers
    0, 1    w·P       w·P + 4·P       12·P / N (1)    reduce bucket
    2       w·P       4·P / N         12·P / N        reduce bucket
    3       w·P / N   4·P / N         12·P / N        reduce bucket + weights gathered at a time (+ hpZ's copy)

(1) 12·P on stage 0 in float32; in bfloat16 DeepSpeed spreads the optimizer over the ranks on stage 0 too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import Config
from pretrain.planning.activations import ModelSizes


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, part by part; and what its node's memory and NVMe hold for it."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float
    host: float
    """Of one rank, offloaded to the node's memory."""
    nvme: float
    """Of one rank, offloaded to NVMe."""

    @property
    def gpu(self) -> float:
        """All parts on the GPU."""
        return sum(size for name, size in asdict(self).items() if name not in ("host", "nvme"))


def memory(config: Config, sizes: ModelSizes, ranks: int, bytes_per_weight: int) -> Memory:
    """What one of `ranks` ranks holds at the peak of a step."""
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    stage, P, w = config.zero_stage, sizes.parameters, bytes_per_weight
    share = 1 / ranks
    whole_optimizer = stage == 0 and w == 4
    optimizer = 8.0 * P if whole_optimizer else 12.0 * P * share
    gradients = (w + 4.0) * P if stage < 2 and not whole_optimizer else 4.0 * P * (share if stage >= 2 else 1)
    weights = w * P * (share if stage == 3 else 1.0)
    buffers = float(zero.get("reduce_bucket_size", 5e8) * w) if stage > 0 else 0.0
    if stage == 3:
        weights += w * sizes.small_parameters * (1 - share)
        buffers += w * min(P, zero.get("stage3_max_live_parameters", 1e9))
        if (partition := zero.get("zero_hpz_partition_size", 1)) > 1:
            buffers += w * P / partition  # each node holds the weights once more
    places = {"cpu": 0.0, "nvme": 0.0}
    if (device := _device(zero, "offload_optimizer")) in places:
        places[device] += optimizer
        places["cpu"] += gradients
        optimizer = gradients = 0.0
    if stage == 3 and (device := _device(zero, "offload_param")) in places:
        places[device] += weights
        weights = 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=float(sizes.activation_bytes),
        loss=float(sizes.loss_bytes),
        buffers=buffers,
        host=places["cpu"],
        nvme=places["nvme"],
    )


def _device(zero: dict[str, Any], part: str) -> str:
    return str((zero.get(part) or {}).get("device", "none"))
