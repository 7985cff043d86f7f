"""Measure whether the whole loop learns and keeps a known preference of its judge. The model is small. Ten seeds are run.

    python -m benchmarks.learning                                   # every arm and seed that docs/learning.md reports
    python -m benchmarks.learning --data DIR --arm judge --seed 500 # one part; finished runs in DIR are not run again
    python -m benchmarks.learning --data DIR --out docs             # finish all runs, then write the table and the plots

The benchmark trains a Llama of 1.4 million parameters once, on a small language (`language`). A run has one arm and one seed.
In a run, the model's responses go through the real stages, sink and trainer on the embedded log, for several policy versions
(`experiment`). These are the arms:

    judge      The labels follow a known rule: refuse harmful prompts, help with all other prompts, and start politely.
    shuffled   The arm is a control. The margins of the labels have the same sizes, but random signs.
    sft        The arm is a control without RL. Supervised fine-tuning on the new revision chains replaces each PPO update.
    hacked     This arm has a planted fault: the labels prefer the longer response. This arm makes four times as many updates.
               During these updates, the monitor must report an exceeded limit. The policy is then rolled back.
    trl112     The arm is a comparison with trl 1.12's PPOTrainer (`trl112`). The arm starts from policy 1 of the judge's
               run and needs --trl112 DIR.

The monitor checks every policy of the arms judge and hacked. In the arm judge, an exceeded limit is recorded, but the policy is
not rolled back.

The target rate of a version is the fraction of its responses that are correct by the rule. Only the first completion of each
prompt counts. There are `--prompts` prompts (twice as many for the first version). These prompts were not used for training
before. The exit code is 1 if one of the claims below the table does not hold (`results.check_claims`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.learning.base_model import train_base_model
from benchmarks.learning.results import RunResult, check_claims, format_spread, format_table, plot_results
from benchmarks.learning.runs import TRL_ARM, run_or_load

_ARMS = ("judge", "shuffled", "sft", "hacked")
_SEEDS = tuple(range(500, 510))  # chosen before the run; PPO was developed on other seeds
_FEW_SEEDS = _SEEDS[:3]
_ARMS_WITH_FEW_SEEDS = ("sft", "hacked")


def _prepare_base_model(folder: Path) -> Path:
    """Return the folder of the small model. Train the model first if the folder has none."""
    if not (folder / "tokenizer.json").exists():
        started = time.monotonic()
        loss = train_base_model(folder)
        print(f"base model: {loss:.3f} nats per token, trained in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def _list_runs(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Return the runs (arm, seed, repeat) that the options select. The default is all runs that docs/learning.md reports."""
    arms = options.arm or [*_ARMS, *([TRL_ARM] if options.trl112 else [])]
    runs = [
        (arm, seed, 0)
        for arm in arms
        for seed in options.seed or (_FEW_SEEDS if arm in _ARMS_WITH_FEW_SEEDS and not options.arm else _SEEDS)
    ]
    repeats = [("judge", (options.seed or _SEEDS)[0], n + 1) for n in range(options.repeats)]
    return sorted([*runs, *repeats], key=lambda run: run[0] == TRL_ARM)  # last: it starts from the judge's runs


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    torch.set_num_threads(options.jobs * options.threads)
    with TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        base = _prepare_base_model(folder / "base")
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            runs = _list_runs(options)
            own_runs = [run for run in runs if run[0] != TRL_ARM]
            results: list[RunResult] = []
            for group in (own_runs, runs[len(own_runs) :]):  # the runs of trl 1.12 load the results of the judge's runs
                futures = [pool.submit(run_or_load, arm, seed, base, folder, options, repeat) for arm, seed, repeat in group]
                results += [future.result() for future in futures]
    first_results = [result for result in results if not result.repeat]
    print(format_table(first_results))
    if repeats := [result for result in results if result.repeat]:
        print(format_spread(first_results, repeats))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        plot_results([version for result in first_results for version in result.versions], options.out)
    claims = check_claims(first_results)
    for claim in claims:
        print(f"{'holds ' if claim.holds else 'FAILED'}  {claim.text}")
    return 0 if all(claim.holds for claim in claims) else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", action="append", choices=(*_ARMS, TRL_ARM), help="only this arm (may be repeated)")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated) [default: 500 to 509]")
    parser.add_argument("--prompts", type=int, default=128, help="new prompts for each policy version [default: 128]")
    parser.add_argument("--updates", type=int, default=3, help="PPO updates [default: 3]")
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="additional runs of the first seed of the arm judge, to measure the spread between runs of one seed [default: 0]",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting in every run (for an ablation)"
    )
    parser.add_argument("--trl112", type=Path, metavar="DIR", help="folder that contains trl 1.12; required for the arm trl112")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs in parallel [default: 2]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run [default: 1]")
    parser.add_argument(
        "--data", type=Path, help="folder for logs, databases and checkpoints; runs that are finished there are not run again"
    )
    parser.add_argument("--out", type=Path, help="folder for the plots (needs the extra `bench`)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
