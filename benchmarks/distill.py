"""Measure self-distillation with SmolLM2: what it teaches, and its speed in comparison with trl's SDFTTrainer.

    python -m benchmarks.distill --trial        a constitution of one sentence, before and after one update (minutes)
    python -m benchmarks.distill                tokens per second and peak memory, Charter and trl (minutes)

The trial: the constitution is "Answer in one short sentence." 24 held-out prompts are answered before and after one update on two
completions of each of 36 other prompts: 18 steps of 4 completions.

The comparison: both trainers make one update on the same completions of the same prompts, with the same batches, the forward KL
over the whole vocabulary, AdamW, and fp32. trl's sampling is replaced by the recorded completions. The CPU time is that of the
update, without the loading of models. Charter's time includes the measurement of the teacher's effect. Each contestant runs in a
separate process. There are two constitutions: the sentence, and the default constitution with sixteen principles. The exit code
is 1 if a ratio is below the goal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory import measure_peak_bytes
from constitutions.loader import load_constitution, parse_constitution
from engine.models.interface import Generation, GenerationRequest
from schemas.records import ChatMessage

if TYPE_CHECKING:
    from trainer.learners.rollouts import Rollout

_MIN_SPEEDUP = 1.3
_NUM_HELD_OUT, _NUM_TRAINED = 24, 36
_CONSTITUTION = """
name = "one-sentence"
version = "1.0.0"

[[prose]]
id = "one-sentence"
name = "One sentence"
priority = 1
text = "Answer in one short sentence."
"""


@dataclass(frozen=True)
class DistillTask:
    """One update. `completions` has token ids and log-probabilities, and whether the completion ended by itself."""

    policy: str
    prompts: tuple[str, ...]
    completions: tuple[tuple[list[int], list[float], bool], ...]
    principles: str
    num_completions: int
    micro_batch_size: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-5
    num_threads: int = 1


def _to_messages(prompt: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage(role="user", content=prompt),)


def _read_prompts(first: int, last: int) -> list[str]:
    from producers.files import SHIPPED_PROMPTS_PATH
    from producers.parse import parse_prompt
    from producers.rows import read_rows

    rows = read_rows(str(SHIPPED_PROMPTS_PATH), first, last)
    return [parse_prompt(row, source="", max_chars=10**6).messages[-1].content for _, row in rows]


def _sample(folder: Path, prompts: Sequence[str], num_completions: int, max_tokens: int) -> list[Generation]:
    """Return the completions of all prompts. The completions of a prompt are next to each other."""
    import torch

    from engine.models.local import LocalModel

    model = LocalModel(folder, dtype=torch.float32, max_batch_size=32)
    requests = [GenerationRequest(_to_messages(prompt), seed=number) for number, prompt in enumerate(prompts)]
    generated = model.generate(requests, num_completions=num_completions, max_tokens=max_tokens)
    return [generation for generations in generated for generation in generations]


def _render_principles(constitution_text: str) -> str:
    from engine import constitution_prompts

    is_name = "\n" not in constitution_text
    constitution = load_constitution(constitution_text) if is_name else parse_constitution(constitution_text, "one-sentence")
    return constitution_prompts.render_principles(constitution, constitution.critique)


def _make_rollouts(task: DistillTask) -> list[Rollout]:
    from engine.models.chat_template import encode_prompt
    from trainer import weights
    from trainer.learners.rollouts import Rollout

    tokenizer = weights.load_tokenizer(Path(task.policy))
    prompts = [prompt for prompt in task.prompts for _ in range(task.num_completions)]
    return [
        Rollout(tuple(encode_prompt(tokenizer, _to_messages(prompt))), tuple(ids), tuple(logprobs), ended, 0, str(number))
        for number, (prompt, (ids, logprobs, ended)) in enumerate(zip(prompts, task.completions, strict=True))
    ]


def _train_charter(task: DistillTask, **more: Any) -> Any:
    """Make one update. Return the trained policy and the metrics."""
    from engine import constitution_prompts
    from trainer import weights
    from trainer.learners import distill

    tokenizer = weights.load_tokenizer(Path(task.policy))
    prompts = [prompt for prompt in task.prompts for _ in range(task.num_completions)]
    examples = [
        distill.DistillExample(
            rollout, tuple(constitution_prompts.encode_teacher_prompt(tokenizer, _to_messages(prompt), task.principles, "user"))
        )
        for rollout, prompt in zip(_make_rollouts(task), prompts, strict=True)
    ]
    config = distill.DistillConfig(learning_rate=task.learning_rate, batch_size=task.batch_size)
    hardware = weights.Hardware(task.micro_batch_size, False, "fp32")
    policy = Path(task.policy)
    return distill.train(policy, policy, examples, config, hardware=hardware, **more)


def time_charter(task: DistillTask) -> float:
    """Make one update. Return its CPU seconds without the loading of models, tokenizers and libraries."""
    from trainer import weights
    from trainer.learners import distill

    loading_s = [0.0]

    def measure(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_measure(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            loaded = load(*arguments, **named)
            loading_s.append(time.process_time() - started)
            return loaded

        return load_and_measure

    for name in ("load_policy", "load_tokenizer"):
        setattr(weights, name, measure(getattr(weights, name)))
    assert distill.weights is weights
    started = time.process_time()
    _train_charter(task)
    return time.process_time() - started - sum(loading_s)


def _train_trl(task: DistillTask) -> float:
    """Make one update with trl's SDFTTrainer. Return the CPU seconds of the training."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    recorded: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for rollout in _make_rollouts(task):
        recorded[rollout.prompt_token_ids].append(list(rollout.token_ids))

    class RecordedTrainer(SDFTTrainer):  # type: ignore[misc]
        def _generate(self, prompt_ids: list[list[int]]) -> Any:
            return prompt_ids, [recorded[tuple(ids)].pop(0) for ids in prompt_ids]

    tokenizer = AutoTokenizer.from_pretrained(task.policy)
    model = AutoModelForCausalLM.from_pretrained(task.policy, dtype="float32")
    rows = [{"prompt": [{"role": "user", "content": p}], "privileged_context": task.principles} for p in task.prompts]
    with tempfile.TemporaryDirectory() as output:
        config = SDFTConfig(
            output_dir=output, learning_rate=task.learning_rate, lr_scheduler_type="constant", num_train_epochs=1,
            per_device_train_batch_size=task.micro_batch_size, shuffle_dataset=False, num_generations=task.num_completions,
            gradient_accumulation_steps=task.batch_size // task.micro_batch_size, distillation_mode="full_logits",
            distillation_alpha=0.0, distillation_is_clip=None, max_prompt_length=None, weight_decay=0.0, bf16=False, use_cpu=True,
            teacher_prompt_template="{privileged_context}\n\n{prompt}", save_strategy="no", report_to="none", disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = RecordedTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        elapsed = time.process_time() - started
    assert not any(recorded.values()), "trl did not train on every completion"
    return elapsed


def _run_contestant(name: str, task: DistillTask) -> dict[str, float]:
    """Run one contestant in this process. Return its CPU seconds and its peak memory in MiB."""
    import torch

    torch.set_num_threads(task.num_threads)
    if name == "charter":
        elapsed = time_charter(task)
    else:
        elapsed = _train_trl(task)
    return {"cpu_s": elapsed, "peak_mib": measure_peak_bytes() / 2**20}


def _compare(num_prompts: int, num_completions: int, max_tokens: int) -> int:
    """Print the table. Return 1 if Charter is not fast enough with one of the constitutions."""
    from engine.models import smollm2

    base = smollm2.get_model_folder()
    prompts = _read_prompts(1, num_prompts)
    completions = tuple(
        (list(g.token_ids), list(g.logprobs), g.finish_reason == "stop")
        for g in _sample(base, prompts, num_completions, max_tokens)
    )
    num_tokens = sum(len(ids) for ids, _, _ in completions)
    print(f"{len(completions)} completions of {num_prompts} prompts, {num_tokens} tokens, fp32\n")
    print("| constitution | trainer | completion tokens per CPU second | peak MiB |\n|---|---|---|---|")
    ratios = []
    for constitution, text in (("one sentence", _CONSTITUTION), ("default, 16 principles", "default")):
        task = DistillTask(str(base), tuple(prompts), completions, _render_principles(text), num_completions)
        rates = []
        for name in ("charter", "trl"):
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps(asdict(task)))
                file.flush()
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "benchmarks.distill",
                    "--contestant",
                    name,
                    "--task",
                    file.name,
                ]
                completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(completed.stdout.splitlines()[-1])
            rates.append(num_tokens / measured["cpu_s"])
            print(f"| {constitution} | {name} | {rates[-1]:.1f} | {measured['peak_mib']:.0f} |", flush=True)
        ratios.append(rates[0] / rates[1])
    print(f"\nratios: {', '.join(f'{ratio:.2f}' for ratio in ratios)} to 1 (goal {_MIN_SPEEDUP})")
    return 0 if min(ratios) >= _MIN_SPEEDUP else 1


# The trial


def _describe(name: str, generations: Sequence[Generation]) -> str:
    texts = [generation.text.strip() for generation in generations]
    ended = sum(generation.finish_reason == "stop" for generation in generations) / len(texts)
    paragraphs = sum("\n" not in text for text in texts) / len(texts)
    words = sum(len(text.split()) for text in texts) / len(texts)
    return f"| {name} | {ended:.2f} | {paragraphs:.2f} | {words:.1f} |"


def _run_trial(max_tokens: int, learning_rate: float) -> None:
    """Print what one update changes on held-out prompts."""
    import torch

    from engine import checkpoints
    from engine.models import smollm2

    torch.set_num_threads(2)
    base = smollm2.get_model_folder()
    held_out, prompts = _read_prompts(1, _NUM_HELD_OUT), _read_prompts(_NUM_HELD_OUT + 1, _NUM_HELD_OUT + _NUM_TRAINED)
    principles = _render_principles(_CONSTITUTION)
    rows = [
        _describe("base model", _sample(base, held_out, 1, max_tokens)),
        _describe(
            "base model, constitution in the prompt", _sample(base, [f"{principles}\n\n{p}" for p in held_out], 1, max_tokens)
        ),
    ]
    completions = tuple(
        (list(g.token_ids), list(g.logprobs), g.finish_reason == "stop") for g in _sample(base, prompts, 2, max_tokens)
    )
    task = DistillTask(str(base), tuple(prompts), completions, principles, 2, batch_size=4, learning_rate=learning_rate)
    trained, metrics = _train_charter(task, on_step=lambda step, values: print(step, _format(values), flush=True))
    with tempfile.TemporaryDirectory() as folder:
        policy = checkpoints.write_checkpoint(Path(folder) / "policy", trained.save, {}).folder
        rows.append(_describe(f"after {metrics['steps']:.0f} steps", _sample(policy, held_out, 1, max_tokens)))
    print("\n| held-out prompts | ended by itself | one paragraph | words |\n|---|---|---|---|")
    print("\n".join(rows))


def _format(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.3g}" for name, value in metrics.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="measure what one update teaches, instead of the speed")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="learning rate of the trial [default: 5e-5]")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the comparison [default: 8]")
    parser.add_argument("--completions", type=int, default=2, help="completions of each prompt [default: 2]")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        values = json.loads(options.task.read_text())
        task = DistillTask(**values | {name: tuple(values[name]) for name in ("prompts", "completions")})
        print(json.dumps(_run_contestant(options.contestant, task)))
        return 0
    if options.trial:
        _run_trial(options.max_tokens, options.learning_rate)
        return 0
    if options.prompts * options.completions % DistillTask.batch_size:
        parser.error(
            f"--prompts times --completions must be a multiple of {DistillTask.batch_size}, the number of completions of a step"
        )
    return _compare(options.prompts, options.completions, options.max_tokens)


if __name__ == "__main__":
    sys.exit(main())
