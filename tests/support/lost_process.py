"""Run as two processes with the variables of a launcher.

Process 1 gets SIGTERM in a call, and must ignore it. Then process 0 gets SIGKILL, while process 1 waits for the next call.
"""

import os
import signal
import sys

import torch

from trainer import distributed


def add_ranks(*, hardware):
    """Return the sum of the ranks, computed by both processes. Before that, process 1 gets SIGTERM."""
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    total = torch.tensor([float(distributed.get_rank())])
    distributed.all_reduce_sum(total)
    return float(total)


if __name__ == "__main__":
    with distributed.join_processes() as is_main:
        if is_main:
            total = distributed.call_learner(add_ranks, hardware=None)
            sys.stdout.write(f"sum {total}\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
