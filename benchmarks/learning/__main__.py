"""Does the loop learn what its judge wants, and keep it? A small model, a known preference, ten seeds.

    python -m benchmarks.learning                                   # every arm and seed that the page reports
    python -m benchmarks.learning --data DIR --arm judge --seed 500 # in parts: what is finished in DIR is not run again
    python -m benchmarks.learning --data DIR --out docs             # the table and the plots of what is there, and the rest

A Llama of 1.4 million parameters is trained here on a small language (`language`), once. Then for each arm and seed its
answers go through the real stages, sink and trainer on the embedded log, for several policy versions (`experiment`):

    judge      labels by the known rule: refuse what is harmful, else help, and politely
    shuffled   the control: labels of the same sizes, each with a random sign
    sft        the control without RL: each PPO update is replaced by supervised fine-tuning on the chains that are new then
    hacked     a planted fault: the labels prefer the longer answer; the watch must trip within four times as
               many updates, and the policy goes back
    trl112     the yardstick: trl 1.12's PPOTrainer from policy 1 of the judge's run (`trl112`; needs --trl112 DIR)

The watch looks at every policy of the arms judge and hacked; in the former a trip is told and changes nothing.

With --smollm2 the policy is SmolLM2 with adapters, and the rule is to write one paragraph, without lists; the critic mends
answers that break off.

The target rate of a version is the share of its answers that the rule calls right, of the first answer to each of `--prompts`
prompts (of twice as many for the first version) that nothing had trained on when they were answered. The exit code is 1 when
one of the claims that are printed below the table does not hold (`figures.claims`).
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

from benchmarks.learning.arms import TRL_ARM, run_or_load
from benchmarks.learning.base_model import train_base_model
from benchmarks.learning.results import check_claims, format_spread, format_table, plot_results
from engine.models import smollm2

_ARMS = ("judge", "shuffled", "sft", "hacked")
_SEEDS = tuple(range(500, 510))  # named before they were run; others were looked at while PPO was repaired
_FEW_SEEDS = _SEEDS[:3]  # of the arms sft and hacked


def _prepare_base_model(folder: Path) -> Path:
    """The small model, trained now when it is not there yet."""
    if not (folder / "tokenizer.json").exists():
        started = time.monotonic()
        loss = train_base_model(folder)
        print(f"base model: {loss:.3f} nats a token, trained in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def _list_runs(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The runs (arm, seed, repeat): what was named, else what the page reports."""
    arms = options.arm or [*_ARMS, *([TRL_ARM] if options.trl112 else [])]
    few = ("sft", "hacked")
    runs = [
        (arm, seed, 0) for arm in arms for seed in options.seed or (_FEW_SEEDS if arm in few and not options.arm else _SEEDS)
    ]
    again = [("judge", (options.seed or _SEEDS)[0], n + 1) for n in range(options.repeats)]
    return sorted([*runs, *again], key=lambda one: one[0] == TRL_ARM)  # it starts from the judge's runs


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    torch.set_num_threads(options.jobs * options.threads)
    with TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        base = smollm2.get_model_folder() if options.smollm2 else _prepare_base_model(folder / "base")
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            runs = list(_list_runs(options))
            first = [one for one in runs if one[0] != TRL_ARM]
            made = [pool.submit(run_or_load, arm, seed, base, folder, options, repeat) for arm, seed, repeat in first]
            found = [one.result() for one in made]
            made = [
                pool.submit(run_or_load, arm, seed, base, folder, options, repeat) for arm, seed, repeat in runs[len(first) :]
            ]
            found += [one.result() for one in made]
    once_each = [one for one in found if not one.repeat]
    print(format_table(once_each))
    if again := [one for one in found if one.repeat]:
        print(format_spread(once_each, again))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        plot_results([version for one in once_each for version in one.versions], options.out)
    held = check_claims(once_each)
    for claim in held:
        print(f"{'holds ' if claim.holds else 'MISSED'}  {claim.text}")
    return 0 if all(claim.holds for claim in held) else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", action="append", choices=(*_ARMS, TRL_ARM), help="only this arm (may be repeated)")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated) [default: 500 to 509]")
    parser.add_argument("--prompts", type=int, default=128, help="new prompts for each policy version [default: 128]")
    parser.add_argument("--updates", type=int, default=3, help="PPO updates [default: 3]")
    parser.add_argument(
        "--repeats", type=int, default=0, help="run the judge's first seed so many times more: the spread of one"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run (an ablation)")
    parser.add_argument("--trl112", type=Path, metavar="DIR", help="the folder with trl 1.12, for the arm trl112")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2, and another rule (an hour or more on two cores)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once [default: 2]")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of each run [default: 1]")
    parser.add_argument("--data", type=Path, help="keep logs, databases and checkpoints here; finished runs are not run again")
    parser.add_argument("--out", type=Path, help="write the plots here (needs the extra `bench`)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
