"""One process that hosts stages: a thread for each worker and lane, and whatever else runs beside them (the sink).

The first thread that fails stops the others, and its error is the process's error. `close` drains in order and within a bound:
lanes finish the batch in hand, workers commit what is finished, the rest follows. A watchdog ends the process when a call to
the log hangs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from engine.watchdog import Calls, Watchdog
from engine.worker import Lane, Worker

Run = Callable[[threading.Event], None]
LANES_SHARE = 0.6  # of the time to drain; the rest is for commits


class Host:
    """Runs workers, their lanes and other loops in threads; `failure` is the first error of any of them.

    `drain_s` bounds `close`; what a lane is still working on then is left, and done again by whoever reads it next. `hang_s` is
    the longest that a call to the log may take.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        others: dict[str, Run] | None = None,
        closing: Sequence[Callable[[], None]] = (),
        *,
        watched: Sequence[Calls] = (),
        drain_s: float = 25.0,
        hang_s: float = 120.0,
    ) -> None:
        self.workers = list(workers)
        self.lanes: list[Lane] = list({id(worker.lane): worker.lane for worker in workers}.values())
        self.others = others or {}
        self.closing = list(closing)  # what the threads use, given back when they have ended
        self.drain_s = drain_s
        self.watchdog = Watchdog([*(worker.calls for worker in workers), *watched], hang_s, self.end)
        self.failure: BaseException | None = None
        self.failed = threading.Event()
        self.groups: list[tuple[threading.Event, list[threading.Thread]]] = []
        self.abandoned: list[str] = []  # threads that had not ended when the time to drain was over

    def start(self) -> None:
        lanes: dict[str, Run] = {f"{lane.name}-{n}": lane.run for lane in self.lanes for n in range(lane.threads)}
        workers: dict[str, Run] = {worker.stage.name: worker.run for worker in self.workers}
        # In the order in which they are stopped.
        watchdog: dict[str, Run] = {"watchdog": self.watchdog.run}
        self.groups = [self.threads(group) for group in (lanes, workers, self.others, watchdog)]

    def threads(self, runs: dict[str, Run]) -> tuple[threading.Event, list[threading.Thread]]:
        stop = threading.Event()
        # Daemons: a generation that outlasts the time to drain must not keep the process.
        threads = [threading.Thread(target=self.guard, args=(run, stop), name=name, daemon=True) for name, run in runs.items()]
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
        """Stop everything in order, waiting for it as long as there is time."""
        started = time.monotonic()
        for number, (stop, threads) in enumerate(self.groups):
            deadline = started + self.drain_s * (LANES_SHARE if number == 0 else 1.0)
            stop.set()
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    self.abandoned.append(thread.name)
        self.groups = []
        if self.abandoned:
            self.forgive()
            return
        while self.closing:
            self.closing.pop(0)()

    def forgive(self) -> None:
        """The records in work are not what ends this process."""
        for worker in self.workers:
            if worker.journal:
                worker.journal.clear()

    def end(self, code: int) -> NoReturn:
        self.forgive()
        os._exit(code)

    def __enter__(self) -> Host:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
