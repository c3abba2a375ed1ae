"""GPUs that a plan knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline import UserError
from pretrain.flops import PEAK_TFLOPS

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links; speeds are of one direction, where data sheets give the sum of both."""

    memory_bytes: float
    """The total that nvidia-smi shows."""
    peak_tflops: float
    """Dense bfloat16: half of what data sheets from the A100's on give "with sparsity"."""
    node_gbytes_per_second: float
    """To the other GPUs of its node: NVLink, or PCIe where there is none."""
    network_gbytes_per_second: float
    """To other nodes: the network card beside each GPU in the vendor's own system."""


# Speeds as NVIDIA's data sheets of the GPUs and of the DGX systems give them.
GPUS = {
    # NVLink 3, 600 GB/s; DGX A100: ConnectX-6, 200 Gb/s
    "A100-40": Gpu(40_960 * MIB, PEAK_TFLOPS["A100"], 300, 25),
    "A100-80": Gpu(81_920 * MIB, PEAK_TFLOPS["A100"], 300, 25),
    # NVLink 4, 900 GB/s; DGX H100 and H200: ConnectX-7, 400 Gb/s. These are the SXM modules: PCIe cards are slower
    "H100": Gpu(81_559 * MIB, PEAK_TFLOPS["H100"], 450, 50),
    "H200": Gpu(143_771 * MIB, PEAK_TFLOPS["H200"], 450, 50),
    # NVLink 5, 1.8 TB/s; DGX B200: ConnectX-7, 400 Gb/s
    "B200": Gpu(183_359 * MIB, PEAK_TFLOPS["B200"], 900, 50),
    # PCIe 4.0 x16, 64 GB/s; there is no DGX of it: 100 Gb/s a GPU is assumed
    "L40S": Gpu(46_068 * MIB, 362.0, 32, 12.5),
}
FOR_CUDA_AND_FRAGMENTS = 0.08
"""Share of the memory that the CUDA context, NCCL and the gaps of the allocator take."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case; UserError lists those there are."""
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu {name}: not known; one of {', '.join(GPUS)}")
    return known[name.lower()]
