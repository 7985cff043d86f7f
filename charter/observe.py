"""What a process shows of itself: its figures for Prometheus, and the traces of what it works on, as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from engine.bus.port import Bus, Offsets
from engine.errors import BusUnreachable, UsageError
from engine.policy import updates
from schemas.records import PolicyKind
from schemas.topics import TOPICS

if TYPE_CHECKING:
    from consumers.sink import Sink
    from engine.metrics import Figure
    from engine.settings import Settings
    from engine.tracing import Tracing
    from engine.worker import Worker

Closes = Callable[[], None]


def tracing_of(settings: Settings) -> Tracing | None:
    """The spans of this process, if the settings ask for traces."""
    if not settings.observe.traces:
        return None
    try:
        from engine.tracing import Tracing
    except ModuleNotFoundError as error:
        raise UsageError(
            "observe.traces needs OpenTelemetry", f"{error.name} is not installed", "type: pip install -e '.[otel]'"
        ) from error
    return Tracing()


def show(settings: Settings, read: Callable[[Bus], Iterable[Figure]]) -> list[Closes]:
    """Serve what `read` says of this process and of the log, if the settings name a port; returns what ends that.

    The log is asked over a connection of its own, made at the first question, so that a scrape never waits for a worker. While
    the log is away the figures that come from it are left out.
    """
    if not settings.observe.metrics_port:
        return []
    from engine.metrics import serve

    asking = Asking(settings, read)
    return [serve(settings.observe.metrics_host, settings.observe.metrics_port, asking), asking.close]


class Asking:
    """Answers one scrape after the other."""

    def __init__(self, settings: Settings, read: Callable[[Bus], Iterable[Figure]]) -> None:
        self.settings, self.read = settings, read
        self.bus: Bus | None = None
        self.lock = threading.Lock()

    def __call__(self) -> list[Figure]:
        from charter.pipeline import open_settings

        figures: list[Figure] = []
        with self.lock, suppress(BusUnreachable):
            self.bus = self.bus or open_settings(self.settings)
            for figure in self.read(self.bus):  # one by one: what came before the log went away is kept
                figures.append(figure)
        return figures

    def close(self) -> None:
        if self.bus:
            self.bus.close()


def figures_of(workers: Sequence[Worker], sinks: Sequence[Sink]) -> Callable[[Bus], Iterator[Figure]]:
    """What a host's workers and sinks say; the lags, which need the log, come last. `sinks` may still grow."""

    def read(bus: Bus) -> Iterator[Figure]:
        from engine.metrics import of_sink, of_worker

        for worker in workers:
            yield from of_worker(worker)
        for sink in sinks:
            yield from of_sink(sink)
        for worker in workers:
            topics = worker.stage.inputs
            stands = bus.begin_offsets(topics) | bus.committed(worker.group, topics)
            yield lag(worker.run_id, worker.stage.name, stands, bus.end_offsets(topics))
        for sink in sinks:
            yield lag("all", "sink", sink.next_offsets, bus.end_offsets(list(TOPICS)))

    return read


def lag(run_id: str, stage: str, stands: Offsets, ends: Offsets) -> Figure:
    from engine.metrics import Figure

    behind = sum(max(0, end - stands.get(place, 0)) for place, end in ends.items())
    labels = (("run", run_id), ("stage", stage))
    return Figure("charter_lag_records", "Offsets between the stage's last commit and the ends of its topics.", behind, labels)


def figures_of_trainer(
    latest: Mapping[str, Mapping[str, float]], steps: Mapping[str, int]
) -> Callable[[Bus], Iterator[Figure]]:
    """The newest metrics of each phase in this process, and the versions on the log."""

    def read(bus: Bus) -> Iterator[Figure]:
        from engine.metrics import Figure

        for phase, count in list(steps.items()):
            yield Figure("charter_train_steps_total", "Optimiser steps of this process.", count, (("phase", phase),))
        for phase, metrics in list(latest.items()):
            for name, value in metrics.items():
                yield Figure("charter_train_metric", "The newest step's numbers.", value, (("phase", phase), ("metric", name)))
        known = updates(bus)
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            newest = max((update.version for update in known if update.kind is kind), default=0)
            yield Figure("charter_version", "The newest published version.", newest, (("kind", kind.value.lower()),))

    return read
