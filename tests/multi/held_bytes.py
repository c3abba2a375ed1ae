"""Prints, as JSON, the bytes that each part of a real engine holds on the first rank: `held_bytes.py CONFIG VOCAB`."""

import json
import sys

import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.config import load_config
from pretrain.distributed import leave
from pretrain.engine import build_engine
from pretrain.objectives import TokenBatch

if __name__ == "__main__":
    path, vocab_size = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks, device = distributed.start(timeout_minutes=5)
    engine = build_engine(load_config(path), int(vocab_size), ranks.world, device)
    tokens = torch.ones(4, 49, dtype=torch.long)
    batch = TokenBatch(tokens, tokens, tokens, tokens > 0)
    engine.backward(engine(batch, engine.module.objective.valid_counts(batch))["loss"])
    engine.step()  # Adam makes its moments at the first step
    zero = engine.optimizer
    held = {
        "weights": sum(p.ds_tensor.nbytes for p in engine.module.parameters()),
        "gradients": zero.grad_partitions_flat_buffer.nbytes,
        "optimizer": sum(flat.nbytes for flat in zero.fp32_partitioned_groups_flat)
        + sum(state.nbytes for states in zero.optimizer.state.values() for state in states.values() if state.dim()),
    }
    if ranks.is_first:
        print("HELD " + json.dumps(held))
    dist.destroy_process_group()
    leave(0)
