"""Runs several configs, one after the other, in one start of the ranks: importing torch costs more than they do."""

import sys

import torch.distributed as dist

from pretrain.config import load_config
from pretrain.distributed import leave
from pretrain.train import train

if __name__ == "__main__":
    for path in [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]:
        config, _, overrides = path.partition("|")
        train(load_config(config, overrides.split("|") if overrides else []))
    dist.destroy_process_group()
    leave(0)
