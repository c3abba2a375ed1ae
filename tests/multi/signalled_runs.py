"""Runs configs one after the other on one rank; a signal comes in the first call of a function of pretrain.train's.

Arguments: `config`, `config|function`, or `config|clock`: an hour passes in the first step. What train() returns is
written beside the run's folder, a line for each start.
"""

import functools
import signal
import sys

import torch.distributed as dist

from pretrain import train
from pretrain.config import load_config
from pretrain.distributed import leave


def signalling(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapped


def an_hour_passes(run, batch):
    run.stop._started -= 3600
    return one_step(run, batch)


one_step = train.one_step

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path, _, name = argument.partition("|")
        config = load_config(path)
        train.one_step = an_hour_passes if name == "clock" else one_step
        original = getattr(train, name, None)
        if original:
            setattr(train, name, signalling(original))
        with (config.run.folder.parent / f"{config.run.name}_returned").open("a") as file:
            file.write(f"{train.train(config)}\n")
        if original:
            setattr(train, name, original)
    dist.destroy_process_group()
    leave(0)
