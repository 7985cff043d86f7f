"""Run measurements within a time budget, and store each result at once, so that a killed run continues.

The results file has one row for each measurement. A row with figures is final. A row says "out of memory" or "over time" if the
measurement ended in this way, and this is final, too. A measurement that raised another error, or that ended the process, is tried
again by the next run, at most twice in all.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.errors import UsageError

OK, OUT_OF_MEMORY, OVER_TIME, FAILED, STARTED = "ok", "out of memory", "over time", "failed", "started"
_FINAL = (OK, OUT_OF_MEMORY, OVER_TIME)
_MAX_ATTEMPTS = 2
Figure = tuple[str, float, str]  # name, value, unit


@dataclass(frozen=True)
class Measurement:
    """One measurement. It is stopped after `limit_s` seconds. `conditions` are the shape and all sizes. It needs `packages`."""

    part: int
    name: str
    conditions: str
    limit_s: float
    run: Callable[[], list[Figure]]
    packages: tuple[str, ...] = ()


class _OverTime(BaseException):
    """The time limit of a measurement. It is no Exception, so that no library catches it."""


@contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    """Raise _OverTime in the main thread when the time is over."""

    def stop(*_: Any) -> None:
        raise _OverTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class ResultsFile:
    """The rows of all measurements on one device, by their names. `device` also names the versions of the libraries."""

    path: Path
    device: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, *, any_device: bool = False) -> None:
        """Read the rows of earlier runs. Raise UsageError if they are from another device, unless `any_device` is true."""
        if not self.path.exists():
            return
        content = json.loads(self.path.read_text())
        if content["device"] != self.device and not any_device:
            raise UsageError(
                f"{self.path} has results of another machine: {content['device']}",
                f"this machine is {self.device}, and one table must not mix two machines",
                "give another file: --results FILE",
            )
        self.rows = content["rows"]

    def store(self, measurement: Measurement, **values: Any) -> None:
        """Replace the row of a measurement, and write the file."""
        self.rows[measurement.name] = {
            "part": measurement.part,
            "conditions": measurement.conditions,
            "command": f"python -m benchmarks.gpu --part {measurement.part}",
            "device": self.device,
            **values,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"device": self.device, "rows": self.rows}, indent=2))
        temporary.replace(self.path)

    def get_row(self, measurement: Measurement) -> dict[str, Any]:
        """Return the row of a measurement. A row with other sizes does not count."""
        row = self.rows.get(measurement.name, {})
        return row if row.get("conditions") == measurement.conditions else {}


def _find_reason_to_skip(measurement: Measurement, row: dict[str, Any], remaining_s: float) -> str:
    """Return why a measurement is not run now, or an empty string."""
    if row.get("status") in _FINAL:
        return f"already measured ({row['status']})"
    if row.get("attempts", 0) >= _MAX_ATTEMPTS:
        problem = "it ended the process" if row["status"] == STARTED else f"it failed: {row['reason']}"
        return f"{problem}, and was tried {_MAX_ATTEMPTS} times"
    if missing := [name for name in measurement.packages if importlib.util.find_spec(name) is None]:
        return f"it needs packages that are not installed: {', '.join(missing)}"
    if measurement.limit_s > remaining_s:
        return f"its time limit of {measurement.limit_s:.0f} s does not fit into the remaining {max(0, remaining_s):.0f} s"
    return ""


def run_measurements(measurements: Sequence[Measurement], results: ResultsFile, end: float) -> bool:
    """Run the measurements that have no final row, until `end` (in seconds of `time.monotonic`). Return whether all have figures.

    Print one line for each measurement, with its figures or the reason why it has none.
    """
    for measurement in measurements:
        row = results.get_row(measurement)
        if reason := _find_reason_to_skip(measurement, row, end - time.monotonic()):
            print(f"{measurement.name}: skipped: {reason}", flush=True)
            if row.get("status") not in (*_FINAL, FAILED, STARTED):
                results.store(measurement, status="skipped", reason=reason)
            continue
        attempts = row.get("attempts", 0) + 1
        results.store(measurement, status=STARTED, attempts=attempts, reason="the run was ended during this measurement")
        started = time.monotonic()
        figures, status, reason = _run_one(measurement)
        seconds = round(time.monotonic() - started, 1)
        results.store(measurement, status=status, attempts=attempts, reason=reason, figures=figures, seconds=seconds)
        text = ", ".join(f"{name} {format_value(value)} {unit}" for name, value, unit in figures) or f"{status}: {reason}"
        print(f"{measurement.name} ({measurement.conditions}): {text} [{seconds} s, {results.device}]", flush=True)
    return all(results.get_row(measurement).get("status") == OK for measurement in measurements)


def _run_one(measurement: Measurement) -> tuple[list[Figure], str, str]:
    """Return the figures, the status and the reason of a measurement, and release its memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with _limit_time(measurement.limit_s):
            return measurement.run(), OK, ""
    except _OverTime:
        return [], OVER_TIME, f"stopped after its limit of {measurement.limit_s:.0f} s"
    except (torch.OutOfMemoryError, MemoryError) as error:
        return [], OUT_OF_MEMORY, (str(error).splitlines() or ["no memory is left"])[0][:200]
    except Exception as error:  # the other measurements do not depend on this one, and time on a GPU is short
        traceback.print_exc(file=sys.stderr)
        return [], FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def format_value(value: float) -> str:
    """Return a value with three significant digits, and with commas from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_table(results: ResultsFile, order: Sequence[str]) -> str:
    """Return a table for each command and device, in the order of the names. A row without figures has its reason instead."""
    names = sorted(results.rows, key=lambda name: order.index(name) if name in order else len(order))
    tables: dict[str, list[str]] = {}
    for name in names:
        row = results.rows[name]
        title = f"`{row['command']}` on {row['device']}"
        lines = tables.setdefault(title, ["| measurement | figure | value | unit | shape and sizes |", "|---|---|---|---|---|"])
        for figure, value, unit in row.get("figures") or [(row["status"], None, row["reason"])]:
            text = "" if value is None else format_value(value)
            lines.append(f"| {name} | {figure} | {text} | {unit} | {row['conditions']} |")
    return "\n\n".join("\n".join([title, "", *lines]) for title, lines in tables.items())
