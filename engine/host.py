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

from engine.watchdog import CallTracker, Watchdog
from engine.worker import ModelExecutor, Worker

ThreadTarget = Callable[[threading.Event], None]
_EXECUTOR_SHUTDOWN_FRACTION = 0.6  # of the time to drain; the rest is for commits


class Host:
    """Runs workers, their lanes and other loops in threads; `failure` is the first error of any of them.

    `shutdown_timeout_s` bounds `close`; what a lane is still working on then is left, and done again by whoever reads it next. `call_timeout_s` is
    the longest that a call to the log may take.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        services: dict[str, ThreadTarget] | None = None,
        cleanup_callbacks: Sequence[Callable[[], None]] = (),
        *,
        watched_calls: Sequence[CallTracker] = (),
        shutdown_timeout_s: float = 25.0,
        call_timeout_s: float = 120.0,
    ) -> None:
        self.workers = list(workers)
        self.executors: list[ModelExecutor] = list({id(worker.executor): worker.executor for worker in workers}.values())
        self.services = services or {}
        self.cleanup_callbacks = list(cleanup_callbacks)  # what the threads use, given back when they have ended
        self.shutdown_timeout_s = shutdown_timeout_s
        self.watchdog = Watchdog(
            [*(worker.call_tracker for worker in workers), *watched_calls], call_timeout_s, self.exit_process
        )
        self.failure: BaseException | None = None
        self.failure_event = threading.Event()
        self.thread_groups: list[tuple[threading.Event, list[threading.Thread]]] = []
        self.abandoned_threads: list[str] = []  # threads that had not ended when the time to drain was over

    def start(self) -> None:
        lanes: dict[str, ThreadTarget] = {
            f"{lane.name}-{n}": lane.run for lane in self.executors for n in range(lane.num_threads)
        }
        workers: dict[str, ThreadTarget] = {worker.stage.name: worker.run for worker in self.workers}
        # In the order in which they are stopped.
        watchdog: dict[str, ThreadTarget] = {"watchdog": self.watchdog.run}
        self.thread_groups = [self.start_threads(group) for group in (lanes, workers, self.services, watchdog)]

    def start_threads(self, targets: dict[str, ThreadTarget]) -> tuple[threading.Event, list[threading.Thread]]:
        stop = threading.Event()
        # Daemons: a generation that outlasts the time to drain must not keep the process.
        threads = [
            threading.Thread(target=self.run_guarded, args=(run, stop), name=name, daemon=True) for name, run in targets.items()
        ]
        for thread in threads:
            thread.start()
        return stop, threads

    def run_guarded(self, target: ThreadTarget, stop: threading.Event) -> None:
        try:
            target(stop)
        except BaseException as error:  # carried to the main thread, which raises it
            if self.failure is None:
                self.failure = error
            self.failure_event.set()

    def raise_if_failed(self) -> None:
        """Raise the first error of any thread."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Stop everything in order, waiting for it as long as there is time."""
        started = time.monotonic()
        for number, (stop, threads) in enumerate(self.thread_groups):
            deadline = started + self.shutdown_timeout_s * (_EXECUTOR_SHUTDOWN_FRACTION if number == 0 else 1.0)
            stop.set()
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    self.abandoned_threads.append(thread.name)
        self.thread_groups = []
        if self.abandoned_threads:
            self.clear_journals()
            return
        while self.cleanup_callbacks:
            self.cleanup_callbacks.pop(0)()

    def clear_journals(self) -> None:
        """The records in work are not what ends this process."""
        for worker in self.workers:
            if worker.journal:
                worker.journal.clear()

    def exit_process(self, code: int) -> NoReturn:
        self.clear_journals()
        os._exit(code)

    def __enter__(self) -> Host:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
