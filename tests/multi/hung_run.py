"""A run whose rank 1 is stopped in its third forward, as by SIGSTOP, and once it gets on sleeps in its fifth."""

import os
import signal
import time

from pretrain import train
from pretrain.model import PretrainingModel

if __name__ == "__main__":
    forward, calls = PretrainingModel.forward, 0

    def planted_forward(self, *args, **kwargs):
        global calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        if os.environ["RANK"] == "1" and calls == 5:
            time.sleep(300)
        return forward(self, *args, **kwargs)

    PretrainingModel.forward = planted_forward
    train.main()
