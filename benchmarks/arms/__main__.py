"""Compare ways to train a policy (arms) with the base model, through the real stages, sink and trainer.

    python -m benchmarks.arms --model small --data arms                             # six arms and the base model, three seeds
    python -m benchmarks.arms --model smollm2 --data arms --budget-minutes 120      # the packaged SmolLM2; continue it later
    python -m benchmarks.arms --model smollm2 --data arms --arm distill --seed 600  # one part
    python -m benchmarks.arms --model smollm2 --data arms --report --json           # what is finished, without running anything

`small` is the language model of 1.4 million parameters of `benchmarks.learning`, which is trained first. Its rule is: refuse harmful
questions, help with all others, and start politely. `smollm2` is the packaged SmolLM2. Its constitution is "Answer in one short
sentence."; one arm has the constitution "Decline harmful requests, help with all others." Critic, judge and graders are programs
that apply the rule, so a difference between arms is a difference of methods.

Each arm trains from the base model and is measured on held-out prompts with its last policy. The table has the mean difference to
the base model for the same prompts. The interval is a bootstrap over the seeds and then the prompts. An arm "moves" a metric only if
the interval excludes 0 and the difference has the same sign in every seed. The price of an arm is its perplexity of texts by people,
and its strict rate on IFEval with --ifeval, which is measured for the first seed.

The seeds were named before the first run. Every seed of the selection is reported, and an arm with an unfinished seed is shown as
unfinished. A command that was stopped or killed continues with the same --data. The exit code is 1 if an arm is unfinished.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.plan import ARMS, MODELS, SEEDS, Arm
from benchmarks.arms.report import ArmReport, describe_progress, format_examples, format_report, list_rows
from benchmarks.arms.run import (
    BASE_SEED,
    Budget,
    BudgetUsed,
    RunOptions,
    RunResult,
    Stopped,
    get_run_name,
    read_progress,
    read_result,
    run_or_load,
)
from benchmarks.arms.worlds import World
from charter.text import format_json
from engine.errors import CharterError, UsageError


def _select_runs(arms: Sequence[Arm], seeds: Sequence[int] | None) -> list[tuple[Arm, int]]:
    """Return the runs of these arms. The first seed of all arms comes first, so that a small budget reaches every arm."""
    runs = [(arm, seed) for arm in arms for seed in (seeds or SEEDS[: arm.num_seeds])]
    order = list(dict.fromkeys(seed for _, seed in runs))
    return sorted(runs, key=lambda run: order.index(run[1]))


def run_arms(
    arms: Sequence[Arm],
    seeds: Sequence[int] | None,
    folder: Path,
    options: RunOptions,
    *,
    budget_minutes: float | None = None,
    threads: int = 1,
) -> bool:
    """Run the base models and the arms that are not finished. Return False if the budget is used or a signal stopped a run."""
    budget = Budget(float("inf") if budget_minutes is None else time.monotonic() + 60 * budget_minutes)
    worlds = list(dict.fromkeys(arm.world.name for arm in arms))
    bases = [(next(arm.world for arm in arms if arm.world.name == name), None, BASE_SEED) for name in worlds]
    runs: list[tuple[World, Arm | None, int]] = [*bases, *((arm.world, arm, seed) for arm, seed in _select_runs(arms, seeds))]
    for world, arm, seed in runs:
        try:
            run_or_load(world, arm, seed, folder, options, budget, _report, threads)
        except BudgetUsed:
            _report(
                f"the next step of {get_run_name(world, arm, seed)} does not fit into the budget; to continue, run it again"
            )
            return False
        except Stopped:
            _report("stopped; to continue, run the same command again")
            return False
    return True


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_reports(
    arms: Sequence[Arm], seeds: Sequence[int] | None, folder: Path
) -> list[tuple[World, RunResult | None, list[ArmReport]]]:
    """Return the results that exist, for each world in the order of its arms."""
    reports: dict[str, tuple[World, RunResult | None, list[ArmReport]]] = {}
    for arm in arms:
        world = arm.world
        if world.name not in reports:
            reports[world.name] = world, read_result(folder, get_run_name(world, None, BASE_SEED)), []
        names = {seed: get_run_name(world, arm, seed) for seed in seeds or SEEDS[: arm.num_seeds]}
        results = {seed: read_result(folder, name) for seed, name in names.items()}
        unfinished = {s: describe_progress(read_progress(folder, n)) for s, n in names.items() if results[s] is None}
        reports[world.name][2].append(ArmReport(arm, [r for r in results.values() if r], unfinished))
    return list(reports.values())


def _select_arms(model: str, names: Sequence[str] | None) -> list[Arm]:
    arms = [arm for arm in ARMS if arm.world.model == model]
    if unknown := [name for name in names or () if name not in {arm.name for arm in arms}]:
        raise UsageError(
            f"there is no arm {unknown[0]} of the model {model}",
            f"its arms are {', '.join(arm.name for arm in arms)}",
            "correct --arm, or choose the other --model",
        )
    return [arm for arm in arms if not names or arm.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    torch.set_num_threads(parsed.threads)
    try:
        arms = _select_arms(parsed.model, parsed.arm)
        if not parsed.report:
            run_arms(
                arms,
                parsed.seed,
                parsed.data,
                _make_options(parsed),
                budget_minutes=parsed.budget_minutes,
                threads=parsed.threads,
            )
    except CharterError as error:
        _report(str(error))
        return 2
    reports = read_reports(arms, parsed.seed, parsed.data)
    if parsed.json:
        print(format_json([row for report in reports for row in list_rows(*report)]))
    else:
        for world, base, of_arms in reports:
            print(f"## {world.name.replace('_', ' ')} ({world.model})\n\n{format_report(world, base, of_arms)}\n")
            if base and parsed.examples:
                print(format_examples(base, of_arms, parsed.examples) + "\n")
    return 0 if all(arm.is_finished for _, _, of_arms in reports for arm in of_arms) else 1


def _make_options(parsed: argparse.Namespace) -> RunOptions:
    overrides = dict[str, str]()
    for entry in parsed.set:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(f"--set {entry} has no value", "the form is KEY=VALUE", "type, for example: --set grpo.beta=0.1")
        overrides[key] = value
    return RunOptions(
        limit=parsed.limit,
        updates=parsed.updates,
        held_out=parsed.held_out,
        samples=parsed.samples,
        ifeval=str(parsed.ifeval.resolve()) if parsed.ifeval else "",
        ifeval_limit=parsed.ifeval_limit,
        human_text=str(parsed.human_text.resolve()) if parsed.human_text else "",
        overrides=overrides,
    )


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = {model: ", ".join(arm.name for arm in ARMS if arm.world.model == model) for model in MODELS}
    listed = "\n".join(f"arms of {model}: {of_model}" for model, of_model in names.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arms",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("--model", choices=MODELS, default="small", help="the policy and its arms [default: small]")
    add("--arm", action="append", metavar="NAME", help="only this arm (may be repeated) [default: all arms of the model]")
    add(
        "--seed",
        action="append",
        type=int,
        help=f"only this seed (may be repeated) [default: the first of {SEEDS} that an arm has]",
    )
    add("--data", type=Path, required=True, help="folder of the runs; finished runs in it are not run again")
    add("--limit", type=_parse_count, metavar="N", help="prompts of an update [default: 128 small, 64 smollm2]")
    add("--updates", type=_parse_count, metavar="N", help="updates after the first act [default: 3 small, 2 smollm2]")
    add("--held-out", type=_parse_count, metavar="N", default=72, help="held-out prompts that are measured [default: 72]")
    add("--samples", type=_parse_count, metavar="K", default=2, help="responses to each held-out prompt [default: 2]")
    add(
        "--ifeval",
        type=Path,
        metavar="FILE",
        help="file of IFEval, to measure it with the base model and the last policy of the first seed; a finished run is continued",
    )
    add("--ifeval-limit", type=_parse_count, metavar="N", default=40, help="prompts of IFEval [default: 40]")
    add(
        "--human-text", type=Path, metavar="FILE", help="JSON lines with the column completion (and prompt), for the perplexity"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting in every run")
    add("--budget-minutes", type=float, metavar="N", help="begin no step that would probably end after N minutes")
    add("--threads", type=_parse_count, default=1, help="CPU threads [default: 1]")
    add("--report", action="store_true", help="run nothing, and show the results that exist")
    add("--examples", type=_parse_count, default=0, metavar="N", help="also show the responses to N held-out prompts")
    add("--json", action="store_true", help="one row for each arm and metric as JSON, in place of the tables")
    return parser.parse_args(arguments)


def _parse_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
