"""Run one arm of the benchmark with one seed. The result of a finished run is stored in a file and loaded from there.

`__main__` calls `run_or_load` in several spawned processes. These processes import the function by name, so the function is in
a separate module.
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

from benchmarks.learning.experiment import Experiment, estimate_kl, make_settings
from benchmarks.learning.language import generate_questions
from benchmarks.learning.programmatic import LANGUAGE_RULE, make_judge
from benchmarks.learning.results import RunResult, VersionCounts, count_versions
from engine.models import open_model
from engine.models.interface import GenerationRequest
from engine.settings import Settings
from schemas.records import ChatMessage
from trainer.learners.rollouts import Rollout

TRL_ARM = "trl112"
_TRL_QUESTION_SEED = 500_000  # added to the seeds of the questions, so that every other run has different questions
# The arm `hacked` makes 4 times as many updates, and the monitor must detect its fault in these updates.
_HACKED_UPDATES_FACTOR = 4
_REPORTED_METRICS = ("steps", "stopped_early", "kl_update", "kl_rollouts", "beta")


def _run_arm(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunResult:
    """Run one arm with one seed. Return the counts of each version, the seconds per phase and the exceeded monitor limits."""
    if arm == TRL_ARM:
        return _run_trl_arm(seed, base, folder, options)
    settings = _make_arm_settings(folder, base, seed, options)
    monitored, rolls_back = arm in ("judge", "hacked"), arm == "hacked"
    judge = make_judge(arm, LANGUAGE_RULE, seed)
    experiment = Experiment(settings, LANGUAGE_RULE, judge, generate_questions(seed), monitored, rolls_back)
    num_updates = options.updates * (_HACKED_UPDATES_FACTOR if rolls_back else 1)
    experiment.run(options.prompts, ["sft" if arm == "sft" else "ppo"] * num_updates)
    kls, updates = experiment.compute_kls(), experiment.load_update_metrics("POLICY")
    versions = [
        replace(version, kl=kls.get(version.version, 0.0), stopped=_was_stopped_early(updates, version.version))
        for version in count_versions(arm, seed, experiment.load_responses(), LANGUAGE_RULE)
    ]
    accuracies = [update["reward/accuracy"] for update in experiment.load_update_metrics("REWARD")]
    update_metrics = [{name: update[name] for name in _REPORTED_METRICS if name in update} for update in updates]
    return RunResult(
        arm,
        seed,
        versions,
        experiment.seconds_by_phase,
        experiment.exceeded_limits,
        experiment.refused_updates,
        update_metrics,
        accuracies,
    )


def _make_arm_settings(folder: Path, base: Path, seed: int, options: argparse.Namespace) -> Settings:
    return make_settings(folder, base, seed, dict(entry.split("=", 1) for entry in options.set))


def _was_stopped_early(updates: Sequence[dict[str, float]], version: int) -> bool:
    """Return whether a KL limit stopped the update that produced this version."""
    return bool(0 < version <= len(updates) and updates[version - 1].get("stopped_early"))


def _run_trl_arm(seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunResult:
    """Run trl 1.12's PPOTrainer in a separate process, from policy 1 and the last reward model of the judge's run."""
    if options.trl112 is None or not (options.trl112 / "trl").is_dir():
        raise SystemExit(
            "The arm trl112 needs trl 1.12.\nInstall it: pip install --no-deps --target DIR trl==1.12.0\nThen add: --trl112 DIR"
        )
    judge_result = run_or_load("judge", seed, base, folder.parent, options)
    settings = _make_arm_settings(folder.parent / _format_run_name("judge", seed, options), base, seed, options)
    checkpoints = settings.folder / "checkpoints"
    questions = list(islice(generate_questions(_TRL_QUESTION_SEED + seed), options.prompts * (options.updates + 1)))
    num_training = options.prompts * options.updates
    training_questions, last_questions = questions[:num_training], questions[num_training:]
    policy, last_policy = checkpoints / "policy-000001", folder / "policy"
    if not list(checkpoints.glob("reward-*")):
        raise SystemExit(
            f"The arm trl112 needs a reward model, and the judge's run with seed {seed} has none.\n"
            "They were rejected, or the run has too few labels.\nUse a larger --prompts."
        )
    task = {
        "policy": str(policy), "reward": str(max(checkpoints.glob("reward-*"))), "folder": str(last_policy), "seed": seed,
        "prompts": [question.text for question in training_questions], "updates": options.updates,
        "num_completions": settings.respond.num_completions, "mini_batch_size": settings.ppo.batch_size,
        "epochs": settings.ppo.epochs, "max_tokens": settings.respond.max_tokens,
        "learning_rate": settings.ppo.learning_rate, "beta": settings.ppo.beta, "threads": options.threads,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(task))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(options.trl112.resolve()), str(Path.cwd())])}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learning.trl112", str(folder / "task.json")]
    started = time.monotonic()
    process = subprocess.run(command, env=environment | {"TQDM_DISABLE": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    spent = {"trl": time.monotonic() - started}
    output = json.loads(process.stdout.splitlines()[-1])
    sources = {question.text: question.source for question in questions}
    responses = [
        {"policy_version": row["version"] + 1, "question": row["question"], "text": row["text"]} for row in output["responses"]
    ]
    model = open_model(str(last_policy), max_batch_size=settings.models.max_batch_size)
    messages = [(ChatMessage(role="user", content=question.text),) for question in last_questions]
    requests = [GenerationRequest(m, seed=n) for n, m in enumerate(messages)]
    generations = [completions[0] for completions in model.generate(requests, max_tokens=settings.respond.max_tokens)]
    last_version = options.updates + 1
    responses += [
        {"policy_version": last_version, "question": question.text, "text": generation.text}
        for question, generation in zip(last_questions, generations, strict=True)
    ]
    rollouts = [Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, True, last_version, "") for g in generations]
    kls = [*output["kls"], estimate_kl(last_policy, policy, rollouts)]
    rows = [row | {"source": sources[row["question"]]} for row in responses]
    versions = count_versions(TRL_ARM, seed, rows, LANGUAGE_RULE)
    base_version = replace(judge_result.versions[0], arm=TRL_ARM)
    return RunResult(TRL_ARM, seed, [base_version, *(replace(v, kl=kl) for v, kl in zip(versions, kls, strict=True))], spent)


def _format_run_name(arm: str, seed: int, options: argparse.Namespace) -> str:
    return "+".join([f"{arm}-{seed}", *options.set])


def run_or_load(arm: str, seed: int, base: Path, folder: Path, options: argparse.Namespace, repeat: int = 0) -> RunResult:
    """Load the result of a run from its file. If there is no file, run from the beginning and write the file."""
    torch.set_num_threads(options.threads)
    name = _format_run_name(arm, seed, options) + (f"-again{repeat}" if repeat else "")
    result_file = folder / f"{name}-{options.prompts}x{options.updates}.json"
    if not result_file.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        result = _run_arm(arm, seed, base, folder / name, options)
        result_file.write_text(json.dumps(asdict(result) | {"repeat": repeat}, indent=1) + "\n")
        _print_result(replace(result, repeat=repeat))
    saved = json.loads(result_file.read_text())
    return RunResult(**saved | {"versions": [VersionCounts(**version) for version in saved["versions"]]})


def _print_result(result: RunResult) -> None:
    rates = " ".join(f"{v.target_rate:.2f}" for v in result.versions)
    kls = " ".join(f"{v.kl:.1f}" for v in result.versions)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.spent.items())
    repeat = f" (repeat {result.repeat})" if result.repeat else ""
    print(
        f"{result.arm} seed {result.seed}{repeat}: target rates {rates}, KL {kls}, "
        f"{sum(result.spent.values()):.0f} s ({spent})",
        flush=True,
    )
    for exceeded in result.trips:
        print(f"    monitor limit exceeded at policy {exceeded['version']}: {exceeded['detail']}", flush=True)
    for rejected in result.refused:
        print(f"    update skipped or rejected: {rejected}", flush=True)
