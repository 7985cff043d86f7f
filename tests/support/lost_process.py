"""Run as two processes with the variables of a launcher: process 1 gets SIGTERM, which it must ignore, and then SIGKILL."""

import os
import signal
import sys

import torch

from trainer import distributed


def add_ranks(*, number, hardware):
    """Return the sum of the ranks, computed by both processes. Before that, process 1 gets the signal `number`."""
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), number)
    total = torch.tensor([float(distributed.get_rank())])
    distributed.all_reduce_sum(total)
    return float(total)


if __name__ == "__main__":
    with distributed.join_processes() as is_main:
        if is_main:
            total = distributed.call_learner(add_ranks, number=signal.SIGTERM, hardware=None)
            sys.stdout.write(f"sum {total}\n")
            distributed.call_learner(add_ranks, number=signal.SIGKILL, hardware=None)
