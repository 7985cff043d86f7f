"""Does the loop learn what its judge wants? A small model, a known preference, three seeds.

    python -m benchmarks.learning                       # everything: arms judge, shuffled and sft, three seeds
    python -m benchmarks.learning --arm hacked --seeds 1

A Llama of 1.4 million parameters is trained here on a small language (`language`), once. Then for each arm and seed its
answers go through the real stages, sink and trainer on the embedded log, for several policy versions (`experiment`):

    judge      labels by the known rule: refuse what is harmful, else help, and politely
    shuffled   the control: labels of the same sizes, each with a random sign
    sft        the control without RL: each PPO update is replaced by supervised fine-tuning on the chains that are new then
    hacked     a planted fault: the labels prefer the longer answer; the watch must trip

The target rate of a version is the share of its answers that the rule calls right, of the first answer to each of `--prompts`
prompts that nothing had trained on when they were answered. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.learning.base import train_base
from benchmarks.learning.experiment import Experiment, settings_for
from benchmarks.learning.figures import Version, plot, table, versions_of
from benchmarks.learning.language import questions
from benchmarks.learning.programmatic import likes_length, rule, shuffled

ARMS = ("judge", "shuffled", "sft")


def run(arm: str, seed: int, base: Path, folder: Path, prompts: int, phases: int) -> tuple[list[Version], dict[str, Any]]:
    """One arm with one seed: the rates of each version, and how long what took."""
    judge = {"shuffled": shuffled(seed), "hacked": likes_length()}.get(arm, rule())
    experiment = Experiment(settings_for(folder, base, seed), judge, questions(seed), watched=arm in ("judge", "hacked"))
    experiment.run(prompts, ["sft"] * phases if arm == "sft" else ["ppo"] * phases)
    return versions_of(arm, seed, experiment.answers()), {"spent": experiment.spent, "trips": experiment.trips}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    started, versions = time.monotonic(), []
    with TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        base = folder / "base"
        if not base.exists():
            loss = train_base(base)
            print(f"[{time.monotonic() - started:4.0f} s] base model: {loss:.3f} nats a token", flush=True)
        for seed in range(options.seeds):
            for arm in options.arm or ARMS:
                place = folder / f"{arm}-{seed}"
                shutil.rmtree(place, ignore_errors=True)
                found, about = run(arm, seed, base, place, options.prompts, options.phases)
                versions += found
                rates = " ".join(f"{v.target / v.answers:.2f}" for v in found)
                spent = " ".join(f"{name} {seconds:.0f} s" for name, seconds in about["spent"].items())
                print(f"[{time.monotonic() - started:4.0f} s] {arm} seed {seed}: {rates} ({spent})", flush=True)
                for trip in about["trips"]:
                    print(f"    watch: {trip}", flush=True)
    print(table(versions))
    print(f"{time.monotonic() - started:.0f} s in all")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "learning.json").write_text(json.dumps([asdict(v) for v in versions], indent=1) + "\n")
        plot(versions, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", action="append", choices=(*ARMS, "hacked"), help="only this arm (may be repeated)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=128, help="new prompts for each policy version")
    parser.add_argument("--phases", type=int, default=4, help="PPO updates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="keep logs, databases and checkpoints here")
    parser.add_argument("--out", type=Path, help="write learning.json and the plots here (needs the extra `bench`)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
