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

from benchmarks.learning.experiment import SMOLLM2_SETTINGS, Experiment, estimate_kl, make_settings
from benchmarks.learning.language import generate_questions
from benchmarks.learning.programmatic import LANGUAGE_RULE, PARAGRAPH_RULE, make_judge
from benchmarks.learning.results import RunResult, VersionCounts, count_versions
from engine.models import open_model
from engine.models.interface import GenerationRequest
from engine.settings import Settings
from schemas.records import ChatMessage
from trainer.learners.ppo import Rollout

TRL_ARM = "trl112"
_TRL_QUESTION_SEED = 500_000  # seeds of its questions begin here: no run of Charter asks them
UNTIL_IT_TRIPS = 4  # times the updates of the other arms, in which the watch must trip on the planted fault
_REPORTED_METRICS = ("steps", "stopped_early", "kl_update", "kl_rollouts", "beta")


def _run_arm(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunResult:
    """One arm with one seed: the counts of each version, how long what took, and what the watch found."""
    if arm == TRL_ARM:
        return _run_trl_arm(seed, base, folder, options)
    rule = PARAGRAPH_RULE if options.smollm2 else LANGUAGE_RULE
    settings = _make_arm_settings(folder, base, seed, options)
    watched, goes_back = arm in ("judge", "hacked"), arm == "hacked"
    experiment = Experiment(settings, rule, make_judge(arm, rule, seed), generate_questions(seed), watched, goes_back)
    updates = options.updates * (UNTIL_IT_TRIPS if goes_back else 1)
    experiment.run(options.prompts, ["sft" if arm == "sft" else "ppo"] * updates)
    kls, updates = experiment.compute_kls(), experiment.load_update_metrics("POLICY")
    versions = [
        replace(version, kl=kls.get(version.version, 0.0), stopped=_was_stopped_early(updates, version.version))
        for version in count_versions(arm, seed, experiment.load_responses(), rule)
    ]
    accuracies = [update["reward/accuracy"] for update in experiment.load_update_metrics("REWARD")]
    reported = [{name: update[name] for name in _REPORTED_METRICS if name in update} for update in updates]
    return RunResult(
        arm,
        seed,
        versions,
        experiment.seconds_by_phase,
        experiment.exceeded_limits,
        experiment.refused_updates,
        reported,
        accuracies,
    )


def _make_arm_settings(folder: Path, base: Path, seed: int, options: argparse.Namespace) -> Settings:
    chosen = dict(entry.split("=", 1) for entry in options.set)
    return make_settings(folder, base, seed, (SMOLLM2_SETTINGS if options.smollm2 else {}) | chosen)


def _was_stopped_early(updates: Sequence[dict[str, float]], version: int) -> bool:
    """Whether a limit ended the update that made a version."""
    return bool(0 < version <= len(updates) and updates[version - 1].get("stopped_early"))


def _run_trl_arm(seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunResult:
    """trl 1.12's PPOTrainer from policy 1 of the judge's run, with its last reward model, in a process of its own."""
    if options.trl112 is None or not (options.trl112 / "trl").is_dir():
        raise SystemExit("the arm trl112 needs --trl112 DIR: pip install --no-deps --target DIR trl==1.12.0")
    judged = run_or_load("judge", seed, base, folder.parent, options)
    settings = _make_arm_settings(folder.parent / _format_run_name("judge", seed, options), base, seed, options)
    made = settings.folder / "checkpoints"
    asked = list(islice(generate_questions(_TRL_QUESTION_SEED + seed), options.prompts * (options.updates + 1)))
    taught, last = asked[: options.prompts * options.updates], asked[options.prompts * options.updates :]
    policy, kept = made / "policy-000001", folder / "policy"
    if not list(made.glob("reward-*")):
        raise SystemExit(
            f"the arm trl112 needs the reward model of the judge's run, which has none (seed {seed}): more --prompts"
        )
    task = {
        "policy": str(policy), "reward": str(max(made.glob("reward-*"))), "folder": str(kept), "seed": seed,
        "prompts": [question.text for question in taught], "updates": options.updates, "samples": settings.respond.num_completions,
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
    model = open_model(str(kept), max_batch_size=settings.models.max_batch_size)
    messages = [(ChatMessage(role="user", content=question.text),) for question in last]
    made_last = [
        one[0]
        for one in model.generate(
            [GenerationRequest(t, seed=n) for n, t in enumerate(messages)], max_tokens=settings.respond.max_tokens
        )
    ]
    end = options.updates + 1
    answers += [{"policy_version": end, "question": q.text, "text": g.text} for q, g in zip(last, made_last, strict=True)]
    rollouts = [Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, True, end, "") for g in made_last]
    kls = [*found["kls"], estimate_kl(kept, policy, rollouts)]
    counted = count_versions(TRL_ARM, seed, [a | {"source": sources[a["question"]]} for a in answers], LANGUAGE_RULE)
    first = replace(judged.versions[0], arm=TRL_ARM)
    return RunResult(TRL_ARM, seed, [first, *(replace(v, kl=kl) for v, kl in zip(counted, kls, strict=True))], spent)


def _format_run_name(arm: str, seed: int, options: argparse.Namespace) -> str:
    return "+".join([f"{arm}-{seed}" + ("-smollm2" if options.smollm2 else ""), *options.set])


def run_or_load(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace, repeat: int = 0) -> RunResult:
    """What an arm found, from its file when it is finished already; what was left unfinished starts again."""
    torch.set_num_threads(options.threads)
    name = _format_run_name(arm, seed, options) + (f"-again{repeat}" if repeat else "")
    result = folder / f"{name}-{options.prompts}x{options.updates}.json"
    if not result.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        found = _run_arm(arm, seed, base, folder / name, options)
        result.write_text(json.dumps(asdict(found) | {"repeat": repeat}, indent=1) + "\n")
        _print_result(replace(found, repeat=repeat))
    kept = json.loads(result.read_text())
    return RunResult(**kept | {"versions": [VersionCounts(**version) for version in kept["versions"]]})


def _print_result(result: RunResult) -> None:
    rates = " ".join(f"{v.target_rate:.2f}" for v in result.versions)
    kls = " ".join(f"{v.kl:.1f}" for v in result.versions)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.spent.items())
    again = f" (again, {result.repeat})" if result.repeat else ""
    print(
        f"{result.arm} seed {result.seed}{again}: {rates}, KL {kls}, in {sum(result.spent.values()):.0f} s ({spent})",
        flush=True,
    )
    for trip in result.trips:
        print(f"    the watch at policy {trip['version']}: {trip['why']}", flush=True)
    for refused in result.refused:
        print(f"    refused: {refused}", flush=True)
