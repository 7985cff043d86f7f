"""One run of the proof: an arm with a seed, kept in a file when it is finished, so that it is not run again.

These functions are called in processes of their own, several at once, which a `__main__` module cannot be asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks.learning.experiment import SMOLLM2, Experiment, divergence, settings_for
from benchmarks.learning.figures import Run, Version, versions_of
from benchmarks.learning.language import questions
from benchmarks.learning.programmatic import LANGUAGE, PARAGRAPH, judge_of
from engine.models import open_model
from engine.models.port import Ask
from engine.settings import Settings
from schemas.records import ChatMessage
from trainer.ppo import Rollout

YARDSTICK = "trl112"
YARDSTICK_QUESTIONS = 500_000  # seeds of its questions begin here: no run of Charter asks them
UNTIL_IT_TRIPS = 4  # times the updates of the other arms, in which the watch must trip on the planted fault
REPORTED = ("steps", "stopped_early", "kl_update", "kl_rollouts", "beta")


def run(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> Run:
    """One arm with one seed: the counts of each version, how long what took, and what the watch found."""
    if arm == YARDSTICK:
        return run_yardstick(seed, base, folder, options)
    rule = PARAGRAPH if options.smollm2 else LANGUAGE
    settings = settings_of(folder, base, seed, options)
    watched, goes_back = arm in ("judge", "hacked"), arm == "hacked"
    experiment = Experiment(settings, rule, judge_of(arm, rule, seed), questions(seed), watched, goes_back)
    updates = options.updates * (UNTIL_IT_TRIPS if goes_back else 1)
    experiment.run(options.prompts, ["sft" if arm == "sft" else "ppo"] * updates)
    kls, updates = experiment.divergences(), experiment.updates("POLICY")
    versions = [
        replace(version, kl=kls.get(version.version, 0.0), stopped=stopped(updates, version.version))
        for version in versions_of(arm, seed, experiment.answers(), rule)
    ]
    accuracies = [update["reward/accuracy"] for update in experiment.updates("REWARD")]
    reported = [{name: update[name] for name in REPORTED if name in update} for update in updates]
    return Run(arm, seed, versions, experiment.spent, experiment.trips, experiment.refused, reported, accuracies)


def settings_of(folder: Path, base: Path, seed: int, options: argparse.Namespace) -> Settings:
    chosen = dict(entry.split("=", 1) for entry in options.set)
    return settings_for(folder, base, seed, (SMOLLM2 if options.smollm2 else {}) | chosen)


def stopped(updates: Sequence[dict[str, float]], version: int) -> bool:
    """Whether a limit ended the update that made a version."""
    return bool(0 < version <= len(updates) and updates[version - 1].get("stopped_early"))


def run_yardstick(seed: int, base: Path, folder: Path, options: argparse.Namespace) -> Run:
    """trl 1.12's PPOTrainer from policy 1 of the judge's run, with its last reward model, in a process of its own."""
    if options.trl112 is None or not (options.trl112 / "trl").is_dir():
        raise SystemExit("the arm trl112 needs --trl112 DIR: pip install --no-deps --target DIR trl==1.12.0")
    judged = once("judge", seed, base, folder.parent, options)
    settings = settings_of(folder.parent / name_of("judge", seed, options), base, seed, options)
    made = settings.folder / "checkpoints"
    asked = list(islice(questions(YARDSTICK_QUESTIONS + seed), options.prompts * (options.updates + 1)))
    taught, last = asked[: options.prompts * options.updates], asked[options.prompts * options.updates :]
    policy, kept = made / "policy-000001", folder / "policy"
    if not list(made.glob("reward-*")):
        raise SystemExit(
            f"the arm trl112 needs the reward model of the judge's run, which has none (seed {seed}): more --prompts"
        )
    task = {
        "policy": str(policy), "reward": str(max(made.glob("reward-*"))), "folder": str(kept), "seed": seed,
        "prompts": [question.text for question in taught], "updates": options.updates, "samples": settings.respond.samples,
        "minibatch": settings.ppo.batch_size, "epochs": settings.ppo.epochs, "tokens": settings.respond.max_tokens,
        "learning_rate": settings.ppo.learning_rate, "beta": settings.ppo.beta, "threads": options.threads,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(task))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(options.trl112.resolve()), str(Path.cwd())])}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learning.trl112", str(folder / "task.json")]
    started = time.monotonic()
    done = subprocess.run(command, env=environment | {"TQDM_DISABLE": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    spent = {"trl": time.monotonic() - started}
    found = json.loads(done.stdout.splitlines()[-1])
    sources = {question.text: question.source for question in asked}
    answers = [{"policy_version": a["version"] + 1, "question": a["question"], "text": a["text"]} for a in found["answers"]]
    model = open_model(str(kept), max_batch=settings.models.max_rows)
    messages = [(ChatMessage(role="user", content=question.text),) for question in last]
    made_last = [
        one[0]
        for one in model.generate([Ask(t, seed=n) for n, t in enumerate(messages)], max_tokens=settings.respond.max_tokens)
    ]
    end = options.updates + 1
    answers += [{"policy_version": end, "question": q.text, "text": g.text} for q, g in zip(last, made_last, strict=True)]
    rollouts = [Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, True, end, "") for g in made_last]
    kls = [*found["kls"], divergence(kept, policy, rollouts)]
    counted = versions_of(YARDSTICK, seed, [a | {"source": sources[a["question"]]} for a in answers], LANGUAGE)
    first = replace(judged.versions[0], arm=YARDSTICK)
    return Run(YARDSTICK, seed, [first, *(replace(v, kl=kl) for v, kl in zip(counted, kls, strict=True))], spent)


def name_of(arm: str, seed: int, options: argparse.Namespace) -> str:
    return "+".join([f"{arm}-{seed}" + ("-smollm2" if options.smollm2 else ""), *options.set])


def once(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace, repeat: int = 0) -> Run:
    """What an arm found, from its file when it is finished already; what was left unfinished starts again."""
    torch.set_num_threads(options.threads)
    name = name_of(arm, seed, options) + (f"-again{repeat}" if repeat else "")
    result = folder / f"{name}-{options.prompts}x{options.updates}.json"
    if not result.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        found = run(arm, seed, base, folder / name, options)
        result.write_text(json.dumps(asdict(found) | {"repeat": repeat}, indent=1) + "\n")
        tell(replace(found, repeat=repeat))
    kept = json.loads(result.read_text())
    return Run(**kept | {"versions": [Version(**version) for version in kept["versions"]]})


def tell(found: Run) -> None:
    rates = " ".join(f"{v.rate:.2f}" for v in found.versions)
    kls = " ".join(f"{v.kl:.1f}" for v in found.versions)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.spent.items())
    again = f" (again, {found.repeat})" if found.repeat else ""
    print(
        f"{found.arm} seed {found.seed}{again}: {rates}, KL {kls}, in {sum(found.spent.values()):.0f} s ({spent})", flush=True
    )
    for trip in found.trips:
        print(f"    the watch at policy {trip['version']}: {trip['why']}", flush=True)
    for refused in found.refused:
        print(f"    refused: {refused}", flush=True)
