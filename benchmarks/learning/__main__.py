"""Does the loop learn what its judge wants? A small model, a known preference, three seeds.

    python -m benchmarks.learning                                   # every arm and seed
    python -m benchmarks.learning --data DIR --arm judge --seed 0   # in parts: what is finished in DIR is not run again
    python -m benchmarks.learning --data DIR --out docs             # the table and the plots of what is there, and the rest

A Llama of 1.4 million parameters is trained here on a small language (`language`), once. Then for each arm and seed its
answers go through the real stages, sink and trainer on the embedded log, for several policy versions (`experiment`):

    judge      labels by the known rule: refuse what is harmful, else help, and politely
    shuffled   the control: labels of the same sizes, each with a random sign
    sft        the control without RL: each PPO update is replaced by supervised fine-tuning on the chains that are new then
    hacked     a planted fault: the labels prefer the longer answer; the watch must trip, and the policy goes back

The watch looks at every policy of the arms judge and hacked; in the former it must stay quiet.

With --smollm2 the policy is SmolLM2 with adapters, and the rule is to write one paragraph, without lists; the critic mends
answers that break off.

The target rate of a version is the share of its answers that the rule calls right, of the first answer to each of `--prompts`
prompts (of twice as many for the first version) that nothing had trained on when they were answered. Intervals are Wilson's,
95 %. The exit code is 1 when the rate of the last version does not stand above that of the first, intervals apart, with the
judge, or does with shuffled labels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.learning.base import train_base
from benchmarks.learning.experiment import SMOLLM2, Experiment, settings_for
from benchmarks.learning.figures import Version, plot, shortcomings, table, versions_of
from benchmarks.learning.language import questions
from benchmarks.learning.programmatic import LANGUAGE, PARAGRAPH, judge_of
from engine.models import smollm2

ARMS = ("judge", "shuffled", "sft", "hacked")
SEEDS = (0, 1, 2)


def run(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One arm with one seed: the counts of each version, how long what took, and what the watch found."""
    rule, more = (PARAGRAPH, SMOLLM2) if options.smollm2 else (LANGUAGE, {})
    settings, judge = settings_for(folder, base, seed, **more), judge_of(arm, rule, seed)
    watched, goes_back = arm in ("judge", "hacked"), arm == "hacked"
    experiment = Experiment(settings, rule, judge, questions(seed), watched, goes_back)
    experiment.run(options.prompts, ["sft" if arm == "sft" else "ppo"] * options.phases)
    versions = [asdict(version) for version in versions_of(arm, seed, experiment.answers(), rule)]
    return {"versions": versions, "spent": experiment.spent, "trips": experiment.trips}


def once(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an arm found, from its file when it is finished already; what was left unfinished starts again."""
    name = f"{arm}-{seed}-smollm2" if options.smollm2 else f"{arm}-{seed}"
    result = folder / f"{name}-{options.prompts}x{options.phases}.json"
    if not result.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        found = run(arm, seed, base, folder / name, options)
        result.write_text(json.dumps(found, indent=1) + "\n")
    return dict(json.loads(result.read_text()))


def base_model(folder: Path) -> Path:
    """The small model, trained now when it is not there yet."""
    if not (folder / "tokenizer.json").exists():
        started = time.monotonic()
        loss = train_base(folder)
        print(f"base model: {loss:.3f} nats a token, trained in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def tell(arm: str, seed: int, found: dict[str, Any]) -> None:
    rates = " ".join(f"{v['target'] / v['answers']:.2f}" for v in found["versions"])
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["spent"].items())
    print(f"{arm} seed {seed}: {rates} in {sum(found['spent'].values()):.0f} s ({spent})", flush=True)
    for trip in found["trips"]:
        print(f"    the watch at policy {trip['version']}: {trip['why']}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    versions: list[Version] = []
    with TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        base = smollm2.folder() if options.smollm2 else base_model(folder / "base")
        for seed in options.seed or SEEDS:
            for arm in options.arm or ARMS:
                found = once(arm, seed, base, folder, options)
                tell(arm, seed, found)
                versions += [Version(**version) for version in found["versions"]]
    print(table(versions))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        plot(versions, options.out)
    missed = shortcomings(versions)
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", action="append", choices=ARMS, help="only this arm (may be repeated)")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated) [default: 0, 1 and 2]")
    parser.add_argument("--prompts", type=int, default=128, help="new prompts for each policy version [default: 128]")
    parser.add_argument("--phases", type=int, default=3, help="PPO updates [default: 3]")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2, and another rule (an hour or more on two cores)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="keep logs, databases and checkpoints here; finished arms are not run again")
    parser.add_argument("--out", type=Path, help="write the plots here (needs the extra `bench`)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
