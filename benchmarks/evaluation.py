"""Measure what evaluation adds: milliseconds per prompt of the machinery, and the share of grading in a run.

    python -m benchmarks.evaluation                 # both (minutes)
    python -m benchmarks.evaluation --only machinery

Machinery: `charter eval run` with the scripted model, which takes no time, on a small and on a large suite. The difference between
the two, divided by the difference of the prompts, is what one prompt costs: log, stages, grading with the default graders, and sink.
Start and end are not part of it.

Grading: SmolLM2 responds to shipped prompts, and then the stage grade (graders refusal and length) and the sink process the
responses. The share is the CPU time of the second part, without start and end, divided by that of the first part. The stages
critique, revise and judge are left out. With them, a run takes longer, and the share is smaller.

CPU time of the whole process is compared, because other work on the machine changes the elapsed time. The exit code is 1 if a limit
is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.stream import run_stages
from charter.connect import connect_bus, open_store
from charter.evaluation.suite_run import EvaluationRequest, make_evaluation_plan, run_evaluation
from engine.models import open_model, smollm2
from engine.settings import Settings, load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer

_MAX_MS_PER_PROMPT = 5.0
_MAX_GRADING_SHARE = 0.10
_GRADING_SETTINGS = {"respond.max_tokens": "64", "prompts.eval_fraction": "0"}


def _make_settings(folder: Path, policy: str, **more: str) -> Settings:
    return load_settings({"data.folder": str(folder), "models.policy": policy, **more}, environment={})[0]


def _measure(call: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Return the CPU seconds of this process and the elapsed seconds of a call."""
    cpu, elapsed = time.process_time(), time.monotonic()
    call(*arguments)
    return time.process_time() - cpu, time.monotonic() - elapsed


# The machinery


def _evaluate(folder: Path, num_prompts: int) -> None:
    folder.mkdir()
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"What is the meaning of the number {n} in this long list?"} for n in range(num_prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bus = connect_bus(settings := _make_settings(folder, "scripted"))
    plan = make_evaluation_plan(settings, bus, EvaluationRequest((f"numbers={file}",), ("0",)))
    assert run_evaluation(plan, bus), "the evaluation was stopped"
    bus.close()
    sql = "SELECT count(*) FROM suite_grades"
    ((num_grades,),) = open_store(settings).query(sql, limit_s=60.0).rows
    assert num_grades == 2 * num_prompts, f"{num_grades} grades of {num_prompts} prompts"


def measure_machinery(small: int, large: int, rounds: int) -> float:
    """Print the table, and return the CPU milliseconds per prompt (median of the rounds)."""
    print("| prompts | CPU s | elapsed s |\n|---|---|---|")
    slopes = []
    for _ in range(rounds):
        measured = []
        for count in (small, large):
            with tempfile.TemporaryDirectory() as folder:
                measured.append(_measure(_evaluate, Path(folder) / "data", count))
            print(f"| {count:,} | {measured[-1][0]:.2f} | {measured[-1][1]:.2f} |", flush=True)
        slopes.append(1000 * (measured[1][0] - measured[0][0]) / (large - small))
    print(f"\n{median(slopes):.2f} ms of CPU time per prompt (limit {_MAX_MS_PER_PROMPT:g})\n")
    return median(slopes)


# Grading


def measure_grading(num_prompts: int, rounds: int) -> float:
    """Print the table, and return the share of CPU time that grading adds (median of the rounds)."""
    open_models: dict[str, Any] = {"smollm2": open_model(str(smollm2.get_model_folder()), threads=1, max_batch_size=32)}
    print(f"{num_prompts} prompts, SmolLM2, CPU seconds\n\n| respond | grade | start and end |\n|---|---|---|")
    shares = []
    for number in range(rounds + 1):
        count = num_prompts if number else 2  # the first batches of a process are slower, so round 0 does not count
        with tempfile.TemporaryDirectory() as folder:
            bus = connect_bus(settings := _make_settings(Path(folder), "smollm2", **_GRADING_SETTINGS))
            FileProducer(bus, settings.run.id, eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=count)
            # The last run finds nothing to grade. Its time is that of starting and ending the processes.
            respond, grade, fixed = (
                _measure(run_stages, settings, bus, open_store(settings), stages, open_models)[0]
                for stages in (("respond",), ("grade",), ("grade",))
            )
            sql = "SELECT count(*) FROM grades"
            ((num_grades,),) = open_store(settings).query(sql, limit_s=60.0).rows
            assert num_grades == 2 * settings.respond.num_completions * count, f"{num_grades} grades of {count} prompts"
            bus.close()
        if number:
            print(f"| {respond:.2f} | {grade:.2f} | {fixed:.2f} |", flush=True)
            shares.append((grade - fixed) / respond)
    print(f"\ngrading adds {median(shares):.1%} to the stage respond (limit {_MAX_GRADING_SHARE:.0%})")
    return median(shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("machinery", "grading"), help="measure only this")
    parser.add_argument("--small", type=int, default=200, help="prompts of the small suite [default: 200]")
    parser.add_argument("--large", type=int, default=2200, help="prompts of the large suite [default: 2200]")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the measurement of grading [default: 32]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts [default: 3]")
    options = parser.parse_args()
    os.environ["CHARTER_ALLOW_SCRIPTED"] = "1"
    is_good = True
    if options.only != "grading":
        is_good &= measure_machinery(options.small, options.large, options.rounds) <= _MAX_MS_PER_PROMPT
    if options.only != "machinery":
        is_good &= measure_grading(options.prompts, options.rounds) <= _MAX_GRADING_SHARE
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
