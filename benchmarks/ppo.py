"""Compare Charter's PPO with trl's last PPOTrainer in separate processes. Task, model, batch and machine are the same.

trl removed its PPOTrainer in version 1.13. Version 1.12 is imported from a separate folder:

    pip install --no-deps --target DIR trl==1.12.0
    python -m benchmarks.ppo --trl112 DIR                    speed with SmolLM2 (20 minutes on two cores)
    python -m benchmarks.ppo --trl112 DIR --curve FILE.svg   the reward curve of a small model, three seeds (minutes)

A round begins with a batch of prompts and ends with the next policy. Charter loads the policy as the respond stage does,
samples responses, scores them, makes one PPO update and writes a checkpoint. The next round loads this checkpoint. trl samples,
scores and updates in one process and keeps all models in memory. Charter and trl sample completions of the full length from the
same prompts. They score the completions with the same reward model. The number of epochs and the minibatch size are also the
same. Both trainers use Adam and a constant learning rate. Dropout is off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.interface import GenerationRequest
from schemas.records import ChatMessage

if TYPE_CHECKING:
    from trainer.learners.rollouts import Rollout

_MIN_SPEEDUP = 1.5
REWARDED_LETTER = "a"
_LEARNING_RATES = (3e-4, 1e-3)
_NUM_FINAL_ROUNDS = 5  # the final reward of a curve is the mean of these rounds
_COLORS = {"charter": "tab:blue", "trl 1.12": "tab:orange"}
REWARD_SCALE = 10.0  # scales the fraction of a letter, so that rewards vary by about 1 between responses


@dataclass(frozen=True)
class PPOTask:
    """Charter and trl run this task.

    `reward_model` is a folder. If `reward_model` is empty, the reward is the fraction of letters `a`.
    """

    policy: str
    prompts: tuple[str, ...]
    num_rounds: int
    reward_model: str = ""
    minibatch_size: int = 8
    num_epochs: int = 4
    max_tokens: int = 48
    learning_rate: float = 1e-6
    beta: float = 0.02
    precision: str = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class RoundTiming:
    """This object has a round's wall time and CPU time in seconds, the number of sampled tokens, and the mean reward."""

    generate_s: float
    update_s: float
    generate_cpu_s: float
    update_cpu_s: float
    num_tokens: int
    mean_reward: float


ClockReading = tuple[float, float]


def read_clocks() -> ClockReading:
    """Return wall time and CPU time in seconds. CPU time does not depend on other load on the machine."""
    return time.monotonic(), time.process_time()


def compute_elapsed(start: ClockReading, end: ClockReading) -> ClockReading:
    """Return the wall time and the CPU time between two readings, in seconds."""
    return end[0] - start[0], end[1] - start[1]


def _run_charter(task: PPOTask) -> list[RoundTiming]:
    """Run Charter's rounds."""
    import torch

    from engine import checkpoints
    from engine.errors import TrainingFailed
    from trainer import weights
    from trainer.learners import ppo

    torch.set_num_threads(2)
    hardware = weights.Hardware(task.minibatch_size, False, "bf16" if task.precision == "bf16" else "fp32")
    rounds: list[RoundTiming] = []
    with tempfile.TemporaryDirectory() as folder:
        policy, beta, base = Path(task.policy), task.beta, Path(task.policy)
        for number in range(task.num_rounds):
            started = read_clocks()
            rollouts, responses = _sample_responses(task, policy, number)
            sampled = read_clocks()
            scores = _score_responses(task, rollouts, responses, hardware)
            config = ppo.PPOConfig(
                learning_rate=task.learning_rate, epochs=task.num_epochs, batch_size=task.minibatch_size, beta=beta, max_kl=1e9
            )
            with suppress(TrainingFailed):  # if all rewards are equal, training fails and the policy stays unchanged
                trained, metrics = ppo.train(policy, base, rollouts, scores, config, hardware=hardware, seed=task.seed + number)
                policy = checkpoints.write_checkpoint(Path(folder) / f"policy-{number}", trained.save, {}).folder
                beta = metrics["beta"]
            num_tokens = sum(len(r.token_ids) for r in rollouts)
            generate_s, generate_cpu_s = compute_elapsed(started, sampled)
            update_s, update_cpu_s = compute_elapsed(sampled, read_clocks())
            rounds.append(RoundTiming(generate_s, update_s, generate_cpu_s, update_cpu_s, num_tokens, statistics.mean(scores)))
    return rounds


def _sample_responses(task: PPOTask, policy: Path, version: int) -> tuple[list[Rollout], list[str]]:
    """Sample a response to each prompt as the respond stage does. Return the rollouts and the responses."""
    import torch

    from engine.models.local import LocalModel
    from trainer.learners.rollouts import Rollout

    model = LocalModel(policy, dtype=torch.bfloat16 if task.precision == "bf16" else torch.float32, max_batch_size=64)
    requests = [
        GenerationRequest((ChatMessage(role="user", content=text),), seed=task.seed * 10**6 + version * 10**4 + i)
        for i, text in enumerate(task.prompts)
    ]
    generations = [generation for (generation,) in model.generate(requests, max_tokens=task.max_tokens)]
    rollouts = [
        Rollout(tuple(g.prompt_token_ids), tuple(g.token_ids), tuple(g.logprobs), g.finish_reason == "stop", version, str(i))
        for i, g in enumerate(generations)
    ]
    return rollouts, [g.text for g in generations]


def _score_responses(task: PPOTask, rollouts: list[Rollout], responses: list[str], hardware: Any) -> list[float]:
    """Return the normalized scores of the reward model, or the scaled fractions of the rewarded letter."""
    from trainer import weights
    from trainer.learners import reward

    if task.reward_model:
        model = reward.load_reward_model(Path(task.reward_model), hardware)
        messages = [(ChatMessage(role="user", content=prompt),) for prompt in task.prompts]
        rows = [(m, response, r.ends_with_eos) for m, response, r in zip(messages, responses, rollouts, strict=True)]
        return model.normalize(model.score(rows))
    letter_id = weights.load_tokenizer(Path(task.policy)).convert_tokens_to_ids(REWARDED_LETTER)
    return [REWARD_SCALE * r.token_ids.count(letter_id) / len(r.token_ids) for r in rollouts]


def _run_contestant(name: str, task: PPOTask, trl112: Path) -> list[RoundTiming]:
    """Run the rounds of one contestant in a separate process."""
    module, path = ("benchmarks.ppo", []) if name == "charter" else ("benchmarks.ppo_trl112", [str(trl112)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(Path.cwd())]), "TQDM_DISABLE": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    arguments = [sys.executable, "-W", "ignore", "-m", module, "--task", json.dumps(asdict(task))]
    completed = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [RoundTiming(**fields) for fields in json.loads(completed.stdout.splitlines()[-1])]


# Speed


def _make_smollm2_task(folder: Path, num_prompts: int, num_rounds: int) -> PPOTask:
    """Return the task with SmolLM2, the shipped prompts, and a reward model of the same size with a random head."""
    import torch

    from engine.models import smollm2
    from producers.files import SHIPPED_PROMPTS_PATH
    from producers.parse import parse_prompt
    from producers.rows import read_rows
    from trainer import weights
    from trainer.learners import reward

    torch.manual_seed(0)
    base = smollm2.get_model_folder()
    scorer = weights.load_scorer(base)
    torch.nn.init.normal_(scorer.score.weight, std=0.05)
    reward.RewardModel([reward.EnsembleMember(scorer)], weights.load_tokenizer(base)).save(folder)
    prompts = [parse_prompt(row, source="", max_chars=10**6) for _, row in read_rows(str(SHIPPED_PROMPTS_PATH), 1, num_prompts)]
    return PPOTask(str(base), tuple(prompt.messages[-1].content for prompt in prompts), num_rounds, reward_model=str(folder))


_CONTESTANTS = (("charter", "fp32"), ("charter", "bf16"), ("trl 1.12", "fp32"), ("trl 1.12", "bf16"))


def _compare_speed(trl112: Path, num_prompts: int, num_rounds: int, contestant_index: int | None) -> int:
    """Print the tokens per second of each contestant. Return 1 if Charter's best rate is below 1.5 times trl's best rate."""
    best: dict[str, float] = {}
    print("| sampled tokens per second | total | update only | total, per CPU second | update only, per CPU second |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        task = _make_smollm2_task(Path(folder), num_prompts, num_rounds + 1)
        for name, precision in _CONTESTANTS if contestant_index is None else [_CONTESTANTS[contestant_index]]:
            measured = _run_contestant(name, replace(task, precision=precision), trl112)[
                1:
            ]  # the first round is only a warm-up
            num_tokens = sum(r.num_tokens for r in measured)
            durations_s = (
                sum(r.generate_s + r.update_s for r in measured),
                sum(r.update_s for r in measured),
                sum(r.generate_cpu_s + r.update_cpu_s for r in measured),
                sum(r.update_cpu_s for r in measured),
            )
            print(f"| {name}, {precision} | {' | '.join(f'{num_tokens / s:.1f}' for s in durations_s)} |", flush=True)
            best[name] = max(best.get(name, 0.0), num_tokens / durations_s[2])
    if contestant_index is not None:
        return 0
    ratio = best["charter"] / best["trl 1.12"]
    print(f"\nthe better precision of each, per CPU second: {ratio:.2f} to 1 (goal {_MIN_SPEEDUP})")
    return 0 if ratio >= _MIN_SPEEDUP else 1


# The reward curve


def _create_small_model(folder: Path, seed: int) -> None:
    """Create a four-layer Llama with one token per letter and random weights.

    The model samples all letters about equally often.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,:()\nABHmnst"]
    vocabulary = {letter: i for i, letter in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=2, bos_token_id=1, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _compare_curves(trl112: Path, plot_file: Path, num_seeds: int, num_rounds: int) -> int:
    """Plot the mean reward by round at two learning rates. Return 1 if Charter's best final reward is below trl's.

    A JSON file next to the plot contains the measurements. If the file already contains a run, the run is not repeated.
    """
    cache_file = plot_file.with_suffix(".json")
    cache: dict[str, list[float]] = json.loads(cache_file.read_text()) if cache_file.exists() else {}
    curves = {(name, rate): list[list[float]]() for rate in _LEARNING_RATES for name in ("charter", "trl 1.12")}
    best: dict[str, float] = {}
    for (name, rate), rewards_by_seed in curves.items():
        for seed in range(num_seeds):
            key = f"{name}, rate {rate}, seed {seed}, {num_rounds} rounds"
            if key not in cache:
                with tempfile.TemporaryDirectory() as folder:
                    _create_small_model(Path(folder), seed)
                    task = PPOTask(
                        folder, ("say a",) * 64, num_rounds, minibatch_size=16, max_tokens=16, learning_rate=rate, seed=seed
                    )
                    cache[key] = [r.mean_reward / REWARD_SCALE for r in _run_contestant(name, task, trl112)]
                cache_file.write_text(json.dumps(cache, indent=1))
            rewards_by_seed.append(cache[key])
        final = [statistics.mean(rewards[-_NUM_FINAL_ROUNDS:]) for rewards in rewards_by_seed]
        print(f"{name} at {rate}: {[round(r[0], 3) for r in rewards_by_seed]} -> {[round(x, 3) for x in final]}", flush=True)
        best[name] = max(best.get(name, 0.0), statistics.mean(final))
    _plot_curves(curves, plot_file)
    return 0 if best["charter"] >= best["trl 1.12"] else 1


def _plot_curves(rewards_by_contestant: dict[tuple[str, float], list[list[float]]], plot_file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "charter", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_LEARNING_RATES), figsize=(8, 3.2), sharey=True)
    for axes, panel_rate in zip(panels, _LEARNING_RATES, strict=True):
        for (name, rate), rewards_by_seed in rewards_by_contestant.items():
            for seed, rewards in enumerate(rewards_by_seed if rate == panel_rate else []):
                label = None if seed else name
                axes.plot(range(1, len(rewards) + 1), rewards, color=_COLORS[name], lw=1.2, label=label)
        axes.set(title=f"learning rate {panel_rate}", xlabel="round of 64 responses", ylim=(0, 1.02))
    panels[0].set_ylabel("fraction of the rewarded letter")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(plot_file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl112", type=Path, help="the folder with trl 1.12")
    parser.add_argument("--curve", type=Path, metavar="FILE.svg", help="plot the reward curve instead of measuring speed")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="measure only this row of the speed table (the first row is 0)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = json.loads(options.task)
        print(json.dumps([asdict(r) for r in _run_charter(PPOTask(**task | {"prompts": tuple(task["prompts"])}))]))
        return 0
    if options.trl112 is None or not (options.trl112 / "trl").is_dir():
        parser.error("--trl112 DIR is missing or does not contain trl: pip install --no-deps --target DIR trl==1.12.0")
    if options.curve:
        return _compare_curves(options.trl112.resolve(), options.curve, options.seeds, options.rounds or 25)
    return _compare_speed(options.trl112.resolve(), options.rows, options.rounds or 1, options.only)


if __name__ == "__main__":
    sys.exit(main())
