"""Bytes over each kind of link in one step, against what it carries in that time.

Of S bytes gathered or scattered over N ranks on n nodes, (N − 1)/N pass the link of a GPU to its node; (n − 1)/n
come into each node once, over the network cards of its G GPUs together. ZeRO-3 gathers the weights twice a micro-batch,
and scatters the gradients once; stages 1 and 2 gather the weights once a step; stage 0 reduces, which is both.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import Config


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives in one step."""

    in_node: float
    network: float


def traffic(config: Config, parameters: int, nodes: int, gpus_per_node: int, bytes_per_weight: int) -> Traffic:
    """What a step moves; ZeRO++'s three switches are heeded (qwZ, qgZ, hpZ)."""
    zero = config.deepspeed.get("zero_optimization", {})
    stage, ranks = config.zero_stage, nodes * gpus_per_node
    micro_batches = config.batch.accumulation_steps(ranks)
    weights = parameters * (1 if zero.get("zero_quantized_weights") else bytes_per_weight)
    gradients = parameters * (0.5 if zero.get("zero_quantized_gradients") else bytes_per_weight)
    gathers = 2.0 * micro_batches if stage == 3 else 1.0
    scatters = float(micro_batches) if stage >= 2 else 1.0
    # hpZ: the backward pass gathers within the node, from its own copy.
    far_gathers = gathers / 2 if stage == 3 and zero.get("zero_hpz_partition_size", 1) > 1 else gathers
    return Traffic(
        in_node=(gathers * weights + scatters * gradients) * (ranks - 1) / ranks if gpus_per_node > 1 else 0.0,
        network=(far_gathers * weights + scatters * gradients) * (nodes - 1) / nodes / gpus_per_node,
    )
