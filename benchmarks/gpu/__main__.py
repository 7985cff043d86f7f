"""Measure Charter on one GPU, in two parts of four minutes. Without a GPU, a small shape runs the same code.

    python -m benchmarks.gpu --part 1                      generation, labels and the stream, 1B and 8B shapes
    python -m benchmarks.gpu --part 2                      a PPO and a GRPO step
    python -m benchmarks.gpu --part 1 --part 2             both; the same command continues a run that was ended
    python -m benchmarks.gpu --shapes small --part 1 --part 2          a rehearsal on a CPU (about a minute)
    python -m benchmarks.gpu --report                      print the table again, without running anything

Models have random weights and the shapes of published models. Each result is stored at once (`--results FILE`). A measurement that
has a result is not run again. A measurement has a time limit. It is skipped if this limit does not fit into the rest of `--seconds`,
which one part gets. Running out of memory is a result. The exit code is 1 if a measurement has no figures.

The command needs torch, transformers, peft, pydantic and fastavro. Only the stream also needs duckdb, pydantic-settings and
prometheus-client. The command does not import trl or datasets, and does not reach a hub.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch

from benchmarks.gpu.measurements import list_measurements
from benchmarks.gpu.runner import ResultsFile, format_table, run_measurements
from benchmarks.gpu.shapes import SHAPES, get_device
from engine.errors import UsageError

_DEFAULT_SHAPES = ["1b", "8b"]


def describe_device() -> str:
    """Return the name of the device and the versions of Python and of the libraries."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}, Python {platform.python_version()}"
    return f"{name} ({versions})"


def _require_feasible_shapes(shapes: list[str]) -> None:
    large = [name for name in shapes if name != "small"]
    if get_device() == "cpu" and large:
        raise UsageError(
            f"the shapes {', '.join(large)} need a GPU",
            "torch.cuda.is_available() is false, and on a CPU one measurement would take hours",
            "python -m benchmarks.gpu --shapes small --part 1 --part 2",
        )


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2), action="append", default=[], help="1: inference, 2: training")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=_DEFAULT_SHAPES)
    parser.add_argument("--seconds", type=float, default=240.0, help="the time of one part (default: 240)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="only measurements whose name contains a TEXT")
    parser.add_argument("--results", type=Path, default=Path("gpu-results.json"), metavar="FILE")
    parser.add_argument("--report", action="store_true", help="only print the table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    options = _parse_arguments(arguments)
    all_measurements = list_measurements(list(SHAPES.values()))
    order = [measurement.name for measurement in all_measurements]
    results = ResultsFile(options.results, describe_device())
    try:
        results.load(any_device=options.report)
        if options.report:
            print(format_table(results, order))
            return 0
        _require_feasible_shapes(options.shapes)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.part:
        print("no part is selected, so nothing is measured; type: python -m benchmarks.gpu --part 1 --part 2", file=sys.stderr)
        return 2
    is_complete = True
    measurements = list_measurements([SHAPES[name] for name in options.shapes])
    for number, part in enumerate(dict.fromkeys(options.part)):
        selected = [m for m in measurements if m.part == part and any(text in m.name for text in options.only)]
        begin = started if number == 0 else time.monotonic()
        is_complete &= run_measurements(selected, results, begin + options.seconds)
    print(format_table(results, order))
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
