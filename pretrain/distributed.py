"""Which rank am I, of how many, on which device: one answer for every launcher.

The `deepspeed` launcher and torchrun set RANK, LOCAL_RANK and WORLD_SIZE; `srun` sets SLURM's variables; a bare
`python -m` is one rank of one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import UserError, run_command

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes what is shared."""
        return self.rank == 0


def discover(environ: Mapping[str, str]) -> Ranks:
    """Read the launcher's variables; UserError where they are incomplete."""
    try:
        if "RANK" in environ:
            world = int(environ["WORLD_SIZE"])
            local_world = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or "1"
            return Ranks(int(environ["RANK"]), world, int(environ["LOCAL_RANK"]), int(local_world))
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            world, nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_NNODES", "1"))
            return Ranks(int(environ["SLURM_PROCID"]), world, int(environ["SLURM_LOCALID"]), -(-world // nodes))
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's environment is incomplete: {error} is missing or not a number") from None
    return Ranks(0, 1, 0, 1)


def start(timeout_minutes: float) -> tuple[Ranks, torch.device]:
    """Join the process group, and say which rank and device this process has.

    On CPUs each rank gets its share of the machine's cores, unless OMP_NUM_THREADS says otherwise.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # torch renamed the collectives that DeepSpeed calls; its users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    ranks = discover(os.environ)
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
        "LOCAL_RANK": str(ranks.local_rank),
    }
    os.environ.setdefault(
        "MASTER_ADDR", slurm_hosts(os.environ)[0] if "SLURM_JOB_NODELIST" in os.environ else "127.0.0.1"
    )
    os.environ.setdefault("MASTER_PORT", _slurm_port() if "SLURM_JOB_ID" in os.environ else _free_port())
    if interface := interface_to_another_node(os.environ):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))
        # DeepSpeed would compile a shared-memory collective at the first start, and a build that is killed leaves
        # a lock that hangs every later start. gloo needs no compiler and is fast enough for CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(ranks.local_rank)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    return ranks, torch.device(accelerator.current_device_name())


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place; also without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(mine: T) -> list[T]:
    """One object from every rank, on every rank; also without a process group."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank: the same answer on all of them."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item())


def first_to_say(message: str) -> bool:
    """Whether no other rank has said the same before: what all ranks meet is told once.

    Rank 0, which holds the table of what was said, gives the others a moment to look it up.
    """
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    key = hashlib.sha256(message.encode()).hexdigest()
    try:
        first = store.add(f"said/{key}", 1) == 1
        deadline = time.monotonic() + 2.0
        while dist.get_rank() == 0 and store.add(f"said/{key}", 0) < dist.get_world_size():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return first
    except RuntimeError:  # rank 0 has gone already
        return True


def barrier() -> None:
    """Wait for all ranks; nothing without a process group."""
    if dist.is_initialized():
        dist.barrier()


def run_and_leave(main: Callable[[list[str] | None], None]) -> NoReturn:
    """`data_pipeline.run_command` for a rank: see `leave`."""
    try:
        run_command(main)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, its output flushed and its atexit handlers done.

    The interpreter is not taken down: DeepSpeed's engine holds the process groups to the very end, and their threads
    with them. Now and then gloo's outlived the interpreter, and a rank that had finished died of SIGABRT
    ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """The job's nodes; from MASTER_ADDR alone where there is no scontrol, as in a container."""
    command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        if "MASTER_ADDR" in environ:
            return [environ["MASTER_ADDR"]]
        raise UserError(
            "there is no scontrol here to tell the job's nodes: set MASTER_ADDR to the first of them"
        ) from None


def interface_to_another_node(environ: Mapping[str, str]) -> str | None:
    """The network interface that the route to another of a SLURM job's nodes takes; None if there is none to ask.

    Gloo would take the one that this host's own name stands for, which on many systems is the loopback.
    """
    if int(environ.get("SLURM_NNODES", "1")) < 2:
        return None
    others = [host for host in slurm_hosts(environ) if host != environ.get("SLURMD_NODENAME")]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((others[0], 9))  # sends nothing: it only looks up the route
            own = probe.getsockname()[0]
    except (OSError, IndexError):
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in {a.address for a in addresses}), None)


def _slurm_port() -> str:
    """The same on every rank of one start, and another one after a requeue, whose old port may linger."""
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return str(20_000 + (job * 7 + restarts) % 20_000)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
