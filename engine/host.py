"""Run stages in one process. Workers, model executors and other services (the sink) run in separate threads.

If a thread fails, the process stops all threads and raises the error of the first thread that failed. `close` stops the threads
in order and within a time limit. First the executors finish their current batches. Then the workers commit the finished
records. Then the services stop. A watchdog ends the process if a call to the log hangs.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from engine.watchdog import CallTracker, Watchdog
from engine.worker import ModelExecutor, Worker

ThreadTarget = Callable[[threading.Event], None]
_GC_THRESHOLDS = (1_000, 20, 100)  # Python's are 700, 10, 10
_EXECUTOR_SHUTDOWN_FRACTION = 0.6  # fraction of `shutdown_timeout_s`; the remaining time is for commits


def reduce_garbage_collection() -> None:
    """Leave the objects that exist now out of garbage collection, and collect newer objects less often.

    The objects of the libraries live until the process ends, and each full collection visits them all, which slows a stage
    (docs/performance.md). Call this once in a process that runs stages, before models are opened: the weights of an old policy
    must still be collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


class Host:
    """Runs workers, their executors and other services in threads. `failure` is the error of the first thread that failed.

    `shutdown_timeout_s` limits the duration of `close`. A batch that is not finished by then is abandoned, and its records are
    processed again after a restart. `call_timeout_s` limits the duration of each call to the log.
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
        self.cleanup_callbacks = list(cleanup_callbacks)  # called after the threads have ended, to release their resources
        self.shutdown_timeout_s = shutdown_timeout_s
        self.watchdog = Watchdog(
            [tracker for worker in workers for tracker in (worker.call_tracker, worker.commit_tracker)] + list(watched_calls),
            call_timeout_s,
            self.exit_process,
        )
        self.failure: BaseException | None = None
        self.failure_event = threading.Event()
        self.thread_groups: list[tuple[threading.Event, list[threading.Thread]]] = []
        self.abandoned_threads: list[str] = []  # threads that did not end within shutdown_timeout_s

    def note_stop(self) -> None:
        """Record a stop signal in the crash journals, so that the end of this process is not counted against a record."""
        for worker in self.workers:
            if worker.journal:
                worker.journal.note_stop()

    def start(self) -> None:
        """Start all threads."""
        executors: dict[str, ThreadTarget] = {
            f"{executor.name}-{n}": executor.run for executor in self.executors for n in range(executor.num_threads)
        }
        workers: dict[str, ThreadTarget] = {worker.stage.name: worker.run for worker in self.workers}
        watchdog: dict[str, ThreadTarget] = {"watchdog": self.watchdog.run}
        # `close` stops the groups in this order.
        self.thread_groups = [self.start_threads(group) for group in (executors, workers, self.services, watchdog)]

    def start_threads(self, targets: dict[str, ThreadTarget]) -> tuple[threading.Event, list[threading.Thread]]:
        stop = threading.Event()
        # Daemon threads are used because a generation that exceeds the shutdown timeout must not keep the process alive.
        threads = [
            threading.Thread(target=self.run_guarded, args=(run, stop), name=name, daemon=True) for name, run in targets.items()
        ]
        for thread in threads:
            thread.start()
        return stop, threads

    def run_guarded(self, target: ThreadTarget, stop: threading.Event) -> None:
        try:
            target(stop)
        except BaseException as error:  # the main thread raises this error
            if self.failure is None:
                self.failure = error
            self.failure_event.set()

    def raise_if_failed(self) -> None:
        """Raise the error of the first thread that failed, if there is one."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Stop the thread groups in order, each within the remaining time."""
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
        """Clear the crash journals. The records in progress are not the reason why this process ends."""
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
