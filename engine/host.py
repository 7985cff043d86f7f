"""One process that hosts stages: a thread for each worker and lane, and whatever else runs beside them (the sink).

The first thread that fails stops the others, and its error is the process's error. `close` drains in order: lanes finish
the batch in hand, workers commit what is finished, the rest follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from engine.worker import Lane, Worker

Run = Callable[[threading.Event], None]


class Host:
    """Runs workers, their lanes and other loops in threads; `failure` is the first error of any of them."""

    def __init__(
        self, workers: Sequence[Worker], others: dict[str, Run] | None = None, closing: Sequence[Callable[[], None]] = ()
    ) -> None:
        self.workers = list(workers)
        self.lanes: list[Lane] = list({id(worker.lane): worker.lane for worker in workers}.values())
        self.others = others or {}
        self.closing = list(closing)  # what the threads use, given back when they have ended
        self.failure: BaseException | None = None
        self.failed = threading.Event()
        self.groups: list[tuple[threading.Event, list[threading.Thread]]] = []

    def start(self) -> None:
        lanes: dict[str, Run] = {f"{lane.name}-{n}": lane.run for lane in self.lanes for n in range(lane.threads)}
        workers: dict[str, Run] = {worker.stage.name: worker.run for worker in self.workers}
        # In the order in which they are stopped.
        self.groups = [self.threads(group) for group in (lanes, workers, self.others)]

    def threads(self, runs: dict[str, Run]) -> tuple[threading.Event, list[threading.Thread]]:
        stop = threading.Event()
        threads = [threading.Thread(target=self.guard, args=(run, stop), name=name) for name, run in runs.items()]
        for thread in threads:
            thread.start()
        return stop, threads

    def guard(self, run: Run, stop: threading.Event) -> None:
        try:
            run(stop)
        except BaseException as error:  # carried to the main thread, which raises it
            if self.failure is None:
                self.failure = error
            self.failed.set()

    def check(self) -> None:
        """Raise the first error of any thread."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Stop everything in order and wait for it."""
        for stop, threads in self.groups:
            stop.set()
            for thread in threads:
                thread.join()
        self.groups = []
        while self.closing:
            self.closing.pop(0)()

    def __enter__(self) -> Host:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
