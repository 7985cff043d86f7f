"""Processes of a paced stream, to be killed: `python -m tests.support.paced_responder ROLE ADDRESS PREFIX INSTANCE`.

The role "respond" runs a copy of the stage respond without a model. The role "loop" only shows that a training loop runs.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from engine.bus import open_bus
from engine.host import Host
from engine.pacing import PacedAdmission, TrainingLoopLease
from engine.worker import ModelExecutor, Stage, Worker
from tests.support.respond_worker import make_response

BATCH_SIZE = 2


def answer(prompts):
    return [[make_response(prompt).model_copy(update={"policy_version": 0})] for prompt in prompts]


def make_paced_worker(bus, instance="0", process=answer, batch_size=BATCH_SIZE):
    stage = Stage("respond", ("prompts",), ("responses",), 0, batch_size, process)
    executor = ModelExecutor("test", downstream_wait_s=0.0)
    return Worker(bus, stage, executor, run_id="r", instance=instance, pacing=PacedAdmission(bus, 1))


def start_process(role, address, prefix, instance):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.paced_responder", role, address, prefix, instance]
    return subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})


def main(role, address, prefix, instance):
    bus = open_bus(address, prefix=prefix)
    if role == "loop":
        TrainingLoopLease(bus, instance)
        threading.Event().wait()
    with Host([make_paced_worker(bus, instance)]) as host:
        host.failure_event.wait()
    host.raise_if_failed()


if __name__ == "__main__":
    main(*sys.argv[1:])
