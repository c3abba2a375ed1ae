"""What a run will need of a cluster, before one is booked: memory, time, network.

    python -m pretrain.plan --config FILE --nodes N --gpus-per-node G --gpu NAME [--mfu X] [section.key=value …]

Memory per GPU, part by part; FLOPs, tokens per second at the stated MFU, days and GPU-hours; bytes per step on each
link against its speed. Warns where it will not fit, and says what would do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline import UserError, run_command
from pretrain.config import Config, load_config
from pretrain.flops import flops_per_token
from pretrain.planning.activations import ModelSizes, model_sizes
from pretrain.planning.hardware import FOR_CUDA_AND_FRAGMENTS, GIB, GPUS, Gpu, find_gpu
from pretrain.planning.memory import Memory, memory
from pretrain.planning.traffic import traffic
from pretrain.run_data import open_data

DEFAULT_MFU = 0.4
DEPENDS_ON_DATA = "what it keeps depends on the data, and `loss` counts the next-token part alone; leave room"


@dataclass(frozen=True)
class Cluster:
    """What is to be booked."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gbytes_per_second: float
    """Of one GPU to other nodes."""

    @property
    def ranks(self) -> int:
        """One per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, for tensors."""
        return self.gpu.memory_bytes * (1 - FOR_CUDA_AND_FRAGMENTS)


@dataclass(frozen=True)
class Plan:
    """The figures of one run on one cluster; bytes, seconds and FLOPs."""

    parameters: int
    memory: Memory
    usable_bytes: float
    flops_per_token: float
    flops: float
    steps: int
    tokens: int
    tokens_per_second: float
    seconds_per_step: float
    days: float
    gpu_hours: float
    in_node_bytes: float
    in_node_seconds: float
    network_bytes: float
    network_seconds: float
    warnings: list[str]


def plan(config: Config, vocab_size: int, cluster: Cluster, mfu: float = DEFAULT_MFU) -> Plan:
    """Work it all out. UserError where the batch does not fit the number of GPUs."""
    dtype = torch.float32 if config.run.precision == "float32" else torch.bfloat16
    sizes, w = model_sizes(config, vocab_size, dtype), dtype.itemsize
    used = memory(config, sizes, cluster.ranks, w)
    per_token = flops_per_token(config, vocab_size)
    tokens = config.total_steps * config.tokens_per_step
    speed = cluster.ranks * cluster.gpu.peak_tflops * 1e12 * mfu / per_token
    moved = traffic(config, sizes.parameters, cluster.nodes, cluster.gpus_per_node, w)
    step = config.tokens_per_step / speed
    near = moved.in_node / (cluster.gpu.node_gbytes_per_second * 1e9)
    far = moved.network / (cluster.network_gbytes_per_second * 1e9)
    warnings = [
        *memory_warnings(config, sizes, cluster, w),
        *network_warnings(config, cluster, step, near, far),
        *([] if sizes.loss_is_whole else [f"objective.name={config.objective.name}: {DEPENDS_ON_DATA}"]),
    ]
    return Plan(
        parameters=sizes.parameters,
        memory=used,
        usable_bytes=cluster.usable_bytes,
        flops_per_token=per_token,
        flops=per_token * tokens,
        steps=config.total_steps,
        tokens=tokens,
        tokens_per_second=speed,
        seconds_per_step=step,
        days=tokens / speed / 86_400,
        gpu_hours=tokens / speed / 3600 * cluster.ranks,
        in_node_bytes=moved.in_node,
        in_node_seconds=near,
        network_bytes=moved.network,
        network_seconds=far,
        warnings=warnings,
    )


def memory_warnings(config: Config, sizes: ModelSizes, cluster: Cluster, bytes_per_weight: int) -> Iterator[str]:
    """One line if it does not fit, with the changes each of which alone would make it."""

    def needed(changed: Config, on: Cluster) -> float:
        # Activations grow with the micro-batch; what the loss takes is taken to stay, so that this never promises more.
        share = changed.batch.micro_sequences / config.batch.micro_sequences
        smaller = replace(sizes, activation_bytes=int(sizes.activation_bytes * share))
        return memory(changed, smaller, on.ranks, bytes_per_weight).gpu

    if needed(config, cluster) <= cluster.usable_bytes:
        return
    fitting = [
        change
        for change, changed, other in alternatives(config, cluster)
        if needed(changed, other) <= cluster.usable_bytes
    ]
    remedy = f"Any of these would do: {'; '.join(fitting)}" if fitting else "Take larger GPUs, or a smaller model"
    most, usable = needed(config, cluster) / GIB, cluster.usable_bytes / GIB
    yield f"will not fit: {most:.1f} GiB are needed on each GPU and {usable:.1f} are usable. {remedy}"


def alternatives(config: Config, cluster: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    """Changes to try, the cheapest in speed first: what to set, the config, the cluster."""

    def with_zero(**keys: Any) -> Config:
        zero = config.deepspeed.get("zero_optimization", {}) | {"stage": 3} | keys
        return config.model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": zero}})

    micro = config.batch.micro_sequences // 2
    while micro and config.batch.global_sequences % (cluster.ranks * micro) == 0:
        batch = config.batch.model_copy(update={"micro_sequences": micro})
        yield f"batch.micro_sequences={micro}", config.model_copy(update={"batch": batch}), cluster
        micro //= 2
    if config.zero_stage < 3:
        yield "deepspeed.zero_optimization.stage=3", with_zero(), cluster
    for factor in (2, 4, 8):
        nodes = cluster.nodes * factor
        if config.batch.global_sequences % (nodes * cluster.gpus_per_node * config.batch.micro_sequences) == 0:
            more = Cluster(nodes, cluster.gpus_per_node, cluster.gpu, cluster.network_gbytes_per_second)
            yield f"--nodes {nodes}", config, more
    yield "deepspeed=@configs/deepspeed/offload_cpu.yaml", with_zero(offload_optimizer={"device": "cpu"}), cluster


def network_warnings(config: Config, cluster: Cluster, step: float, near: float, far: float) -> Iterator[str]:
    """One line if the links cannot carry a step's bytes while it computes."""
    if max(near, far) <= step:
        return
    slower = "network" if far > near else "links within a node"
    helps = ["a larger batch.micro_sequences"]
    if cluster.nodes > 1 and config.zero_stage == 3:
        helps.append(f"deepspeed.zero_optimization.zero_hpz_partition_size={cluster.gpus_per_node}")
        helps.append("zero_quantized_weights and zero_quantized_gradients (configs/deepspeed/many_nodes.yaml)")
    yield (
        f"the {slower} will set the pace: {max(near, far):.2f} s of traffic a step against {step:.2f} s of computing. "
        f"What helps: {'; '.join(helps)}"
    )


def show(result: Plan, title: str) -> None:
    """Print the tables."""
    console = Console(width=120, soft_wrap=True, highlight=False)
    table = Table("part", "GiB on each GPU", title=title)
    for part, size in asdict(result.memory).items():
        if part not in ("host", "nvme"):
            table.add_row(part, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("all", f"{result.memory.gpu / GIB:.2f} of {result.usable_bytes / GIB:.1f} usable")
    for place, name in ((result.memory.host, "node's memory, per rank"), (result.memory.nvme, "NVMe, per rank")):
        if place:
            table.add_row(name, f"{place / GIB:.2f}")
    console.print(table)
    table = Table("what", "figure")
    rows = {
        "parameters": f"{result.parameters:,}",
        "FLOPs": f"{result.flops:.3g} ({result.flops_per_token:.3g} per token)",
        "steps": f"{result.steps:,} of {result.tokens // max(1, result.steps):,} tokens",
        "tokens per second": f"{result.tokens_per_second:,.0f}",
        "seconds per step": f"{result.seconds_per_step:.3f}",
        "time": f"{result.days:.2f} days, {result.gpu_hours:,.0f} GPU-hours",
        "within a node, per step": f"{result.in_node_bytes / 1e9:.2f} GB, {result.in_node_seconds:.3f} s",
        "between nodes, per step": f"{result.network_bytes / 1e9:.2f} GB, {result.network_seconds:.3f} s",
    }
    for what, figure in rows.items():
        table.add_row(what, figure)
    console.print(table)
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.plan", description="What a run will need of a cluster.")
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="the run's YAML file")
    add("--nodes", required=True, type=int, metavar="N", help="number of nodes")
    add("--gpus-per-node", required=True, type=int, metavar="G", help="GPUs of a node")
    add("--gpu", required=True, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    add("--mfu", type=float, default=DEFAULT_MFU, metavar="X", help="share of the peak FLOP/s that the run will reach")
    add("--network-gbytes", type=float, metavar="X", help="GB/s of one GPU to other nodes, if not what is usual")
    add("--vocab-size", type=int, metavar="V", help="where the data set is not at hand")
    add("--json", action="store_true", help="print JSON, in bytes, seconds and FLOPs")
    add("overrides", nargs="*", metavar="section.key=value", help="keys to set differently")
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.nodes, arguments.gpus_per_node) < 1 or not 0 < arguments.mfu <= 1:
        raise UserError("--nodes and --gpus-per-node are at least 1, and --mfu is above 0 and at most 1")
    config = load_config(arguments.config, arguments.overrides)
    gpu = find_gpu(arguments.gpu)
    network = arguments.network_gbytes or gpu.network_gbytes_per_second
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node, gpu, network)
    result = plan(config, arguments.vocab_size or vocabulary(config), cluster, arguments.mfu)
    if arguments.json:
        print(json.dumps(asdict(result) | {"memory": asdict(result.memory) | {"gpu": result.memory.gpu}}, indent=2))
    else:
        shape = f"{arguments.nodes} × {arguments.gpus_per_node} {arguments.gpu}, MFU {arguments.mfu:g}"
        show(result, f"{config.run.name} on {shape}")


def vocabulary(config: Config) -> int:
    """Rows of the embedding: the config's, or the data set's."""
    try:
        return config.model.vocab_size or open_data(config)[2]
    except UserError as error:
        raise UserError(f"{error} (or give --vocab-size, to plan without the data)") from None


if __name__ == "__main__":
    run_command(main)
