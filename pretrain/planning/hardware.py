"""GPUs that a plan knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline import UserError
from pretrain.flops import PEAK_TFLOPS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links; speeds are of one direction, from the vendors' data sheets."""

    memory_bytes: float
    """What nvidia-smi shows as the total."""
    peak_tflops: float
    """Dense bfloat16."""
    node_gbytes_per_second: float
    """To the other GPUs of its node: NVLink, or PCIe where there is none."""
    network_gbytes_per_second: float
    """To other nodes: the network card that is usual beside it."""


GPUS = {
    "A100-40": Gpu(40.0 * GIB, PEAK_TFLOPS["A100"], 300, 25),
    "A100-80": Gpu(80.0 * GIB, PEAK_TFLOPS["A100"], 300, 25),
    "H100": Gpu(79.6 * GIB, PEAK_TFLOPS["H100"], 450, 50),
    "H200": Gpu(140.4 * GIB, PEAK_TFLOPS["H200"], 450, 50),
    "B200": Gpu(179.1 * GIB, PEAK_TFLOPS["B200"], 900, 50),
    "L40S": Gpu(45.0 * GIB, 362.0, 32, 12.5),
}
FOR_CUDA_AND_FRAGMENTS = 0.08
"""Share of the memory that the CUDA context, NCCL and the gaps of the allocator take."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case; UserError lists those there are."""
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu {name}: not known; one of {', '.join(GPUS)}")
    return known[name.lower()]
