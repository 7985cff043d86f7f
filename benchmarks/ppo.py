"""PPO against the last one that trl had: same task, model, batch and machine, one after the other in processes of their own.

trl removed its PPOTrainer in 1.13. The one of 1.12 runs beside our libraries from a folder that holds nothing else:

    pip install --no-deps --target DIR trl==1.12.0
    python -m benchmarks.ppo --trl112 DIR                    speed with SmolLM2 (20 minutes on two cores)
    python -m benchmarks.ppo --trl112 DIR --curve FILE.svg   the reward curve of a small model, three seeds (minutes)

A round is what one batch of prompts costs from the prompts to the next policy. Charter's: load the policy as a responder does,
sample, score, one PPO update, write the checkpoint, to be loaded by the next round. trl's: sample, score and update in one
process that keeps everything in memory. Both sample the whole answer length from the same prompts, score with the same reward
model, and make as many epochs over minibatches as large, with Adam, a constant rate and no dropout.
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
    from trainer.ppo import Rollout

_MIN_SPEEDUP = 1.5
REWARDED_LETTER = "a"
_LEARNING_RATES = (3e-4, 1e-3)
_NUM_FINAL_ROUNDS = 5  # rounds that the end of a curve is the mean of
_COLORS = {"charter": "tab:blue", "trl 1.12": "tab:orange"}
REWARD_SCALE = 10.0  # the share of letters varies by a tenth of this from answer to answer


@dataclass(frozen=True)
class PPOTask:
    """What both sides are given. `reward` is the folder of a reward model; empty: the share of letters `a`."""

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
    """Seconds of one round, of the clock and of both cores, the answers' tokens, and their mean reward."""

    generate_s: float
    update_s: float
    generate_cpu_s: float
    update_cpu_s: float
    num_tokens: int
    mean_reward: float


ClockReading = tuple[float, float]


def read_clocks() -> ClockReading:
    """The clock, and what this process has used of the cores, in seconds: the latter is the same on a busy machine."""
    return time.monotonic(), time.process_time()


def compute_elapsed(start: ClockReading, end: ClockReading) -> ClockReading:
    return end[0] - start[0], end[1] - start[1]


def _run_charter(task: PPOTask) -> list[RoundTiming]:
    """Charter's rounds."""
    import torch

    from engine import checkpoints
    from engine.errors import TrainingFailed
    from trainer import ppo, weights

    torch.set_num_threads(2)
    hardware = weights.Hardware(task.minibatch_size, False, "bf16" if task.precision == "bf16" else "fp32")
    rounds: list[RoundTiming] = []
    with tempfile.TemporaryDirectory() as made:
        policy, beta, first = Path(task.policy), task.beta, Path(task.policy)
        for number in range(task.num_rounds):
            started = read_clocks()
            rollouts, texts = _sample_responses(task, policy, number)
            generated = read_clocks()
            scores = _score_responses(task, rollouts, texts, hardware)
            p = ppo.PPOConfig(
                learning_rate=task.learning_rate, epochs=task.num_epochs, batch_size=task.minibatch_size, beta=beta, max_kl=1e9
            )
            with suppress(TrainingFailed):  # every answer is the best one: the policy stays
                learned, metrics = ppo.train(policy, first, rollouts, scores, p, hardware=hardware, seed=task.seed + number)
                policy = checkpoints.write_checkpoint(Path(made) / f"policy-{number}", learned.save, {}).folder
                beta = metrics["beta"]
            tokens = sum(len(r.token_ids) for r in rollouts)
            (generate_s, generate_cpu_s), (update_s, update_cpu_s) = (
                compute_elapsed(started, generated),
                compute_elapsed(generated, read_clocks()),
            )
            rounds.append(RoundTiming(generate_s, update_s, generate_cpu_s, update_cpu_s, tokens, statistics.mean(scores)))
    return rounds


def _sample_responses(task: PPOTask, policy: Path, version: int) -> tuple[list[Rollout], list[str]]:
    """Answers to all prompts, as the stream samples them."""
    import torch

    from engine.models.local import LocalModel
    from trainer.ppo import Rollout

    model = LocalModel(policy, dtype=torch.bfloat16 if task.precision == "bf16" else torch.float32, max_batch_size=64)
    asks = [
        GenerationRequest((ChatMessage(role="user", content=text),), seed=task.seed * 10**6 + version * 10**4 + i)
        for i, text in enumerate(task.prompts)
    ]
    answers = [one[0] for one in model.generate(asks, max_tokens=task.max_tokens)]
    rollouts = [
        Rollout(tuple(a.prompt_token_ids), tuple(a.token_ids), tuple(a.logprobs), a.finish_reason == "stop", version, str(i))
        for i, a in enumerate(answers)
    ]
    return rollouts, [a.text for a in answers]


def _score_responses(task: PPOTask, rollouts: list[Rollout], texts: list[str], hardware: Any) -> list[float]:
    """The reward model's scores, or the shares of letters."""
    from trainer import reward, weights

    if task.reward_model:
        model = reward.load_reward_model(Path(task.reward_model), hardware)
        messages = [(ChatMessage(role="user", content=prompt),) for prompt in task.prompts]
        return model.normalize(
            model.score([(t, text, r.ends_with_eos) for t, text, r in zip(messages, texts, rollouts, strict=True)])
        )
    letter = weights.load_tokenizer(Path(task.policy)).convert_tokens_to_ids(REWARDED_LETTER)
    return [REWARD_SCALE * r.token_ids.count(letter) / len(r.token_ids) for r in rollouts]


def _run_contestant(name: str, task: PPOTask, trl112: Path) -> list[RoundTiming]:
    """One side's rounds, in a process of its own."""
    module, path = ("benchmarks.ppo", []) if name == "charter" else ("benchmarks.ppo_trl112", [str(trl112)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(Path.cwd())]), "TQDM_DISABLE": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    arguments = [sys.executable, "-W", "ignore", "-m", module, "--task", json.dumps(asdict(task))]
    done = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [RoundTiming(**one) for one in json.loads(done.stdout.splitlines()[-1])]


# Speed


def _make_smollm2_task(folder: Path, num_prompts: int, num_rounds: int) -> PPOTask:
    """SmolLM2, the shipped prompts, and a reward model of the same size with a head of noise."""
    import torch

    from engine.models import smollm2
    from producers.files import SHIPPED_PROMPTS_PATH
    from producers.parse import parse_prompt
    from producers.rows import read_rows as rows_of
    from trainer import reward, weights

    torch.manual_seed(0)
    base = smollm2.get_model_folder()
    scorer = weights.load_scorer(base)
    torch.nn.init.normal_(scorer.score.weight, std=0.05)
    reward.RewardModel([reward.EnsembleMember(scorer)], weights.load_tokenizer(base)).save(folder)
    lines = [parse_prompt(line, source="", max_chars=10**6) for _, line in rows_of(str(SHIPPED_PROMPTS_PATH), 1, num_prompts)]
    return PPOTask(str(base), tuple(line.messages[-1].content for line in lines), num_rounds, reward_model=str(folder))


_CONTESTANTS = (("charter", "fp32"), ("charter", "bf16"), ("trl 1.12", "fp32"), ("trl 1.12", "bf16"))


def _compare_speed(trl112: Path, num_prompts: int, num_rounds: int, contestant_index: int | None) -> int:
    """Tokens per second of every contestant; 1 when the best of Charter's is not 1.5 times the best of trl's."""
    best: dict[str, float] = {}
    print(
        "| sampled tokens per second | in all | of the update alone | in all, per second of a core | of the update, the same |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        task = _make_smollm2_task(Path(folder), num_prompts, num_rounds + 1)
        for name, precision in _CONTESTANTS if contestant_index is None else [_CONTESTANTS[contestant_index]]:
            measured = _run_contestant(name, replace(task, precision=precision), trl112)[1:]  # the first one warms up
            tokens = sum(r.num_tokens for r in measured)
            spent = (
                sum(r.generate_s + r.update_s for r in measured),
                sum(r.update_s for r in measured),
                sum(r.generate_cpu_s + r.update_cpu_s for r in measured),
                sum(r.update_cpu_s for r in measured),
            )
            print(f"| {name}, {precision} | {' | '.join(f'{tokens / s:.1f}' for s in spent)} |", flush=True)
            best[name] = max(best.get(name, 0.0), tokens / spent[2])
    if contestant_index is not None:
        return 0
    ratio = best["charter"] / best["trl 1.12"]
    print(f"\nthe better precision of each, per second of a core: {ratio:.2f} to 1 (goal {_MIN_SPEEDUP})")
    return 0 if ratio >= _MIN_SPEEDUP else 1


# The reward curve


def _create_small_model(folder: Path, seed: int) -> None:
    """A four-layer Llama over single letters with random weights, which writes all of them about equally often."""
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
    """Mean reward by round of both sides at two rates; writes the plot. 1 when Charter's best ends below trl's best.

    Beside the plot lies what was measured; a run that is found there is not run again.
    """
    kept = plot_file.with_suffix(".json")
    known: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    found = {(name, rate): list[list[float]]() for rate in _LEARNING_RATES for name in ("charter", "trl 1.12")}
    best: dict[str, float] = {}
    for (name, rate), of_seeds in found.items():
        for seed in range(num_seeds):
            one = f"{name}, rate {rate}, seed {seed}, {num_rounds} rounds"
            if one not in known:
                with tempfile.TemporaryDirectory() as folder:
                    _create_small_model(Path(folder), seed)
                    task = PPOTask(
                        folder, ("say a",) * 64, num_rounds, minibatch_size=16, max_tokens=16, learning_rate=rate, seed=seed
                    )
                    known[one] = [r.mean_reward / REWARD_SCALE for r in _run_contestant(name, task, trl112)]
                kept.write_text(json.dumps(known, indent=1))
            of_seeds.append(known[one])
        last = [statistics.mean(rewards[-_NUM_FINAL_ROUNDS:]) for rewards in of_seeds]
        print(f"{name} at {rate}: {[round(r[0], 3) for r in of_seeds]} -> {[round(x, 3) for x in last]}", flush=True)
        best[name] = max(best.get(name, 0.0), statistics.mean(last))
    _plot_curves(found, plot_file)
    return 0 if best["charter"] >= best["trl 1.12"] else 1


def _plot_curves(rewards_by_contestant: dict[tuple[str, float], list[list[float]]], plot_file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "charter", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_LEARNING_RATES), figsize=(8, 3.2), sharey=True)
    for axes, of_panel in zip(panels, _LEARNING_RATES, strict=True):
        for (name, rate), of_seeds in rewards_by_contestant.items():
            for number, rewards in enumerate(of_seeds if rate == of_panel else []):
                label = None if number else name
                axes.plot(range(1, len(rewards) + 1), rewards, color=_COLORS[name], lw=1.2, label=label)
        axes.set(title=f"learning rate {of_panel}", xlabel="round of 64 answers", ylim=(0, 1.02))
    panels[0].set_ylabel("share of the rewarded letter")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(plot_file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl112", type=Path, help="the folder with trl 1.12")
    parser.add_argument("--curve", type=Path, metavar="FILE.svg", help="the reward curve instead of the speed")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="one row of the speed table alone, counted from 0")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        task = json.loads(given.task)
        print(json.dumps([asdict(r) for r in _run_charter(PPOTask(**task | {"prompts": tuple(task["prompts"])}))]))
        return 0
    if given.trl112 is None or not (given.trl112 / "trl").is_dir():
        parser.error("--trl112 DIR is missing, or holds no trl: pip install --no-deps --target DIR trl==1.12.0")
    if given.curve:
        return _compare_curves(given.trl112.resolve(), given.curve, given.seeds, given.rounds or 25)
    return _compare_speed(given.trl112.resolve(), given.rows, given.rounds or 1, given.only)


if __name__ == "__main__":
    sys.exit(main())
