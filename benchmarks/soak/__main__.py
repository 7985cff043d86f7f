"""Run generation, chains, training and the lake export under kills, for `--minutes` minutes, and check the result (soak test).

    python -m benchmarks.soak --minutes 60 --kills 24 --data /tmp/soak

There are four processes on the embedded log:

* The stream runs every stage and the sink. Its policy is the small language model of `benchmarks.learning`, and its critic and
  judge are programs.
* The trainer is an unchanged `charter train --loop --force`, because this test needs RL updates, also with labels that teach little.
* The generator is the code of `charter produce --generate`, with its recipe, gates and index of near-duplicates. A program writes
  its texts in place of a language model (benchmarks/soak/questions.py). It is the only source of prompts: they have enough
  details that none of an hour is a near-duplicate of another one. The lag of the stage respond and the pacing of the trainer
  limit its rate.
* The export is an unchanged `charter export lake`, which starts again 20 seconds after its end.

`--kills` is the number of SIGKILLs. They are spread over the four processes at random times, and each killed process starts again
at once. An export is killed while it writes to the lake.

At the end, the generator stops first. Then the trainer stops, so that the stage respond holds no prompts any more, and the stream
finishes all prompts. So in a test that passes, no prompt is held or unfinished. Then a last export runs.

The results are counted from the records. If one of these numbers is not 0, the exit code is 1 (`must_be_0`):

* rollouts that were older than the settings allow when they were used for training
* responses that were not sampled with the weights of their policy version
* rows that a phase used twice for training, missing versions, batches that cannot be rebuilt, dead letters
* indexes of the generator that are missing, or that were published twice or with other prompts than their position counts
* prompts without exactly one response, one end of a chain and one outcome of the judge
* records on the log that are not exactly once in their table, and record ids that are twice on the log or in a table. A trainer that
  starts again after a kill publishes the metrics of its unfinished batch again, and the scores and dropped rollouts that the sink had
  not written. They have the same ids and content. They are counted (`records_repeated_by_the_trainer`), and the tables have each of
  them once
* rows or columns in which the lake and the database differ, compared with DuckDB, and the exit codes of the processes and of
  `charter export lake --verify`

The exit code is also 1 if one of these limits does not hold (`limits`). The first two count the completions since the first reward
model:

* at most 10 % were dropped
* RL trained on at least 75 %. A test of a few minutes ends with many unused completions, so this limit may not hold in it
* no update was starved: while no phase was paused, a new batch began at least every 300 seconds

`failed` lists everything that failed. Further results are the lag of the sink, the number of prompts, rejected texts, records,
exports and files of the lake, DuckDB's share of the trainer's time, and the memory of the processes. SIGTERM ends the test early
and prints the results so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.soak.processes import run_generator, run_stream
from benchmarks.soak.results import compute_result, drain_log, export_last_rows
from benchmarks.soak.supervision import SoakTest, run_processes
from engine.stop_signals import stop_on_signals

_BASE_MODEL_STEPS = 300
_PROCESSES = {"stream": run_stream, "generator": run_generator}


def _train_base_model(folder: Path) -> None:
    from benchmarks.learning.base_model import train_base_model

    print(f"base model: loss {train_base_model(folder, steps=_BASE_MODEL_STEPS):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=0, help="number of times that a process is killed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--process", choices=_PROCESSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    changes = dict(text.split("=", 1) for text in options.set)
    if options.process:
        _PROCESSES[options.process](options.data.resolve(), changes)
        return
    if (options.data / "data").exists():
        parser.error(
            f"{options.data} has the data of another test; its records would be counted too; give another folder: --data FOLDER"
        )
    stop = stop_on_signals()
    options.data.mkdir(parents=True, exist_ok=True)
    if not (options.data / "base").exists():
        _train_base_model(options.data / "base")
    if stop.is_set():
        sys.exit("stopped before the processes were started")
    soak = SoakTest(options.data.resolve(), changes)
    exit_codes = run_processes(soak, options.minutes, options.kills, stop)
    drain_log(soak)
    exit_codes |= export_last_rows(soak)
    result = compute_result(soak, exit_codes)
    text = json.dumps(result, indent=2)
    (options.data / "soak.json").write_text(text)
    print(text)
    sys.exit(f"not as in a test that passes: {', '.join(result['failed'])}" if result["failed"] else 0)


if __name__ == "__main__":
    main()
