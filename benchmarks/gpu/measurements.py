"""The measurements of benchmarks.gpu. Part 1 is inference, part 2 is training.

bandwidth     the rate of a copy on the device, in bytes read and written per second.
generation    completion tokens per second, next to the limit that the memory allows: in each step, the device reads all weights once
              and the keys and values of all rows. The limit is batch size * bandwidth / these bytes.
labels        labels from log-probabilities in both orders (preset lee2023), next to the lesson's judge, which writes a reply to one
              question in one order: one by one with transformers, and in batches with Charter's generation.
stream        records per hour of respond, critique, revise and judge on an embedded log, with the sink.
ppo, grpo     the mean time of the optimizer steps after the first one, and the peak memory. Loading is not part of the time.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from math import log
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.generation import make_requests
from benchmarks.gpu.runner import Figure, Measurement
from benchmarks.gpu.shapes import (
    RandomModel,
    Shape,
    build_random_weights,
    count_kv_bytes,
    count_weight_bytes,
    get_device,
    synchronize,
    write_model_folder,
)
from benchmarks.labels import generate_in_batches, generate_one_by_one, make_judge_questions, measure_per_second
from benchmarks.memory import measure_peak_bytes
from constitutions.loader import load_constitution
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from engine.models.interface import GenerationRequest, require_results
from engine.models.local import TokenLimits
from producers.files import make_prompt_record, make_row_metadata
from producers.parse import parse_prompt
from schemas.records import Prompt, Response, Sampling

_LORA_RANK = 16
_GROUP_SIZE = 4
_COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 64 * 2**20}
_NUM_SHIPPED_PROMPTS = 72
_STREAM_STAGES = ("respond", "critique", "revise", "judge")
_STREAM_TABLES = ("responses", "critiques", "revisions", "preferences")
_STREAM_PACKAGES = ("duckdb", "fastavro", "pydantic_settings", "prometheus_client")
# The log of llm-swarm's run (huggingface/alignment-handbook, recipes/cai/README.md): 44,849 prompts in 97.1 minutes on 6 instances of
# 8 GPUs, and 2,471.9 tokens/s. So a prompt had 321 tokens in three completions: response, critique and revision.
_SWARM_PROMPTS_PER_HOUR = 577
_SWARM_TOKENS_PER_PROMPT = 321


def _measure_bandwidth() -> float:
    """Return the bytes per second that a copy on the device reads and writes."""
    source = torch.zeros(_COPY_BYTES[get_device()], dtype=torch.uint8, device=get_device())
    target = torch.empty_like(source)
    rounds = 10
    for number in range(rounds + 1):
        if number == 1:  # the first copy is the warm-up
            synchronize()
            started = time.perf_counter()
        target.copy_(source)
    synchronize()
    return 2 * source.numel() * rounds / (time.perf_counter() - started)


def measure_bandwidth() -> list[Figure]:
    return [("bandwidth, bytes read and written", _measure_bandwidth() / 1e9, "GB/s")]


@contextmanager
def _open_model(shape: Shape, max_batch_size: int) -> Iterator[RandomModel]:
    with tempfile.TemporaryDirectory() as folder:
        yield RandomModel(shape, Path(folder), max_batch_size=max_batch_size)


def measure_generation(shape: Shape, batch_size: int) -> list[Figure]:
    sizes, rng = shape.sizes, random.Random(0)
    prompts = [[rng.randrange(1, shape.vocabulary) for _ in range(sizes.prompt)] for _ in range(batch_size)]
    requests = [GenerationRequest((), seed=n) for n in range(batch_size)]
    with _open_model(shape, batch_size) as model, torch.inference_mode():
        model.generate_fitting(requests, prompts, 1, 1.0, 1.0, TokenLimits(2))  # warm up
        synchronize()
        started = time.perf_counter()
        results = model.generate_fitting(requests, prompts, 1, 1.0, 1.0, TokenLimits(sizes.completion))
        synchronize()
        elapsed = time.perf_counter() - started
        num_tokens = sum(len(generation.token_ids) for (generation,) in results)
        assert num_tokens == batch_size * sizes.completion, f"{num_tokens} tokens instead of {batch_size * sizes.completion}"
        mean_length = sizes.prompt + sizes.completion / 2
        bytes_per_step = count_weight_bytes(model.model) + batch_size * mean_length * count_kv_bytes(shape, model.dtype)
        peak_bytes = measure_peak_bytes()
    limit = batch_size * _measure_bandwidth() / bytes_per_step
    return [
        ("completion tokens", num_tokens / elapsed, "tokens/s"),
        ("memory-bandwidth limit", limit, "tokens/s"),
        ("share of the limit", 100 * num_tokens / elapsed / limit, "%"),
        _make_peak_figure(peak_bytes),
    ]


def _make_peak_figure(peak_bytes: int) -> Figure:
    name = "peak memory" if get_device() == "cuda" else "peak memory of the process so far"
    return name, peak_bytes / 2**30, "GiB"


def _make_prompts(count: int) -> list[Prompt]:
    """Return records of different prompts: the shipped ones, and copies of them with a number."""
    shipped = [request.messages[-1].content for request in make_requests(min(count, _NUM_SHIPPED_PROMPTS))]
    texts = (f"{text} ({n})" if n else text for n in range(count) for text in shipped)
    parsed = [parse_prompt({"prompt": text}, source="benchmark", max_chars=10**6) for text in islice(texts, count)]
    return [make_prompt_record(make_row_metadata(row, "gpu", eval_fraction=0.0)) for row in parsed]


def _sample_responses(model: RandomModel, count: int, num_tokens: int) -> list[Response]:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=num_tokens)
    results = require_results(RespondStage(lambda: (model, 0), 2, sampling)(_make_prompts(count)))
    return [response for (response,) in results]


def measure_labels(shape: Shape) -> list[Figure]:
    sizes = shape.sizes
    with _open_model(shape, 64) as model:
        responses = _sample_responses(model, sizes.pairs, sizes.completion)
        constitution = load_constitution("default")
        judge = JudgeStage(
            model, constitution, pairing="completions", min_option_mass=0.0, reject_position_flips=False, preset="lee2023"
        )
        questions = make_judge_questions(judge, responses)
        judge(responses[:2])  # warm up
        generate_one_by_one(model, questions[:1], 2)
        labels = [label for (label,) in require_results(judge(responses))]
        judged = measure_per_second(model, lambda: judge(responses), len(responses))
        assert all(label.prompt_tokens for label in labels), "a pair was not judged"
        peers = questions[: sizes.peer_pairs]
        lengths: list[int] = []
        one_by_one = measure_per_second(
            model, lambda: lengths.extend(generate_one_by_one(model, peers, sizes.reply)), len(peers)
        )
        assert set(lengths) == {sizes.reply}, f"replies of {lengths} tokens instead of {sizes.reply}"
        batched = measure_per_second(model, lambda: generate_in_batches(model, questions, sizes.reply), len(questions))
        question_tokens = statistics.mean(len(model.encode_request(GenerationRequest(messages), 0)) for messages in questions)
    rate = "labels/s" if get_device() == "cuda" else "labels per CPU second"
    return [
        ("log-probabilities, both orders", judged, rate),
        ("prompt tokens of a label", statistics.mean(label.prompt_tokens for label in labels), "tokens"),
        ("of them shared", statistics.mean(label.cached_tokens for label in labels), "tokens"),
        ("written one by one, one order", one_by_one, rate),
        ("prompt tokens of a written label", question_tokens, "tokens"),
        ("ratio to one by one (goal 50)", judged / one_by_one, "times"),
        ("written in batches, one order", batched, rate),
        ("ratio to batches", judged / batched, "times"),
    ]


def measure_stream(shape: Shape) -> list[Figure]:
    """Run all stages on new prompts: a response, one critique, one revision, and a label of the two responses."""
    from benchmarks.stream import run_stages
    from charter.connect import connect_bus, open_store
    from engine.settings import load_settings
    from producers.files import FileProducer

    sizes = shape.sizes
    with tempfile.TemporaryDirectory() as name, _open_model(shape, sizes.stream_prompts) as model:
        file, spec = Path(name) / "prompts.jsonl", str(model.folder)
        texts = [prompt.messages[-1].content for prompt in _make_prompts(sizes.stream_prompts)]
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        tokens = str(sizes.stream_tokens)
        values = {
            "data.folder": f"{name}/data", "models.policy": spec, "models.max_batch_size": str(sizes.stream_prompts),
            "respond.num_completions": "1", "respond.max_tokens": tokens, "critique.max_tokens": tokens,
            "revise.max_tokens": tokens, "critique.rounds": "1", "critique.early_stop": "none", "critique.accept_threshold": "1",
            "critique.reject_threshold": "0", "judge.pairing": "revision", "judge.min_option_mass": "0",
            "critique.min_option_mass": "0",
        }  # fmt: skip
        settings = load_settings(values, environment={})[0]
        bus = connect_bus(settings)
        FileProducer(bus, settings.run.id, eval_fraction=0.0).publish(str(file))
        store = open_store(settings)
        started = time.perf_counter()
        run_stages(settings, bus, store, _STREAM_STAGES, {spec: model})
        elapsed = time.perf_counter() - started
        sql = " UNION ALL ".join(
            f"SELECT count(*), sum(prompt_tokens), sum(completion_tokens) FROM {table}" for table in _STREAM_TABLES
        )
        counts = store.query(sql, limit_s=60.0).rows
        bus.close()
    written = sizes.stream_prompts * sizes.stream_tokens
    # A chain ends with a second critique record, which has no text.
    expected = [(1, written), (2, written), (1, written), (1, 0)]
    assert [(count / sizes.stream_prompts, tokens) for count, _, tokens in counts] == expected, f"records and tokens: {counts}"
    num_records = sum(count for count, _, _ in counts)
    prompts_per_hour = 3600 * sizes.stream_prompts / elapsed
    figures: list[Figure] = [
        ("records of all stages", 3600 * num_records / elapsed, "records/hour"),
        ("prompts", prompts_per_hour, "prompts/hour"),
        ("written tokens of a prompt", 3 * sizes.stream_tokens, "tokens"),
        ("read tokens of a prompt", sum(read for _, read, _ in counts) / sizes.stream_prompts, "tokens"),
    ]
    if 3 * sizes.stream_tokens == _SWARM_TOKENS_PER_PROMPT:
        figures += [
            ("llm-swarm at as many written tokens", _SWARM_PROMPTS_PER_HOUR, "prompts/hour per GPU"),
            ("ratio to llm-swarm (goal 10)", prompts_per_hour / _SWARM_PROMPTS_PER_HOUR, "times"),
        ]
    return figures


@contextmanager
def _use_random_weights() -> Iterator[None]:
    """Let the learners build random weights on the device. Reading 32 GB of weights would take most of the time on a GPU."""
    from trainer import weights

    def build(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return build_random_weights(folder, dtype)

    with mock.patch.object(weights, "load_policy", build):
        yield


def _make_rollouts(shape: Shape) -> list[Any]:
    """Return groups of rollouts of random tokens. The rollouts of a group have the same prompt."""
    from trainer.learners.rollouts import Rollout

    sizes, rng = shape.sizes, random.Random(0)

    def sample(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, shape.vocabulary) for _ in range(count))

    prompts = [sample(sizes.rollout_prompt) for _ in range(sizes.rows // _GROUP_SIZE)]
    logprobs = (-log(shape.vocabulary),) * sizes.rollout_completion
    return [
        Rollout(prompts[n // _GROUP_SIZE], sample(sizes.rollout_completion), logprobs, True, 0, str(n // _GROUP_SIZE))
        for n in range(sizes.rows)
    ]


def measure_update(shape: Shape, method: str, tuning: str) -> list[Figure]:
    from trainer import weights
    from trainer.learners import grpo, ppo

    sizes, times = shape.sizes, list[float]()
    rollouts = _make_rollouts(shape)
    rewards = [float(n % _GROUP_SIZE) for n in range(len(rollouts))]

    def note_time(step: int, metrics: dict[str, float]) -> None:
        synchronize()
        times.append(time.perf_counter())

    # No limit ends the update early: every step costs the same.
    limits: dict[str, Any] = {"max_kl": 1e9, "max_kl_base": 1e9, "max_kl_update": 1e9}
    common: dict[str, Any] = {"epochs": sizes.steps, "batch_size": sizes.rows, **limits}
    learner: Any = ppo if method == "ppo" else grpo
    config = ppo.PPOConfig(**common) if method == "ppo" else grpo.GRPOConfig(**common)
    hardware = weights.Hardware(sizes.micro_batch, shape.checkpointing, "bf16" if get_device() == "cuda" else "fp32")
    with tempfile.TemporaryDirectory() as name, _use_random_weights():
        folder = write_model_folder(shape, Path(name))
        lora_rank = _LORA_RANK if tuning == "lora" else 0
        learner.train(folder, folder, rollouts, rewards, config, lora_rank=lora_rank, hardware=hardware, on_step=note_time)
    assert len(times) == sizes.steps, f"{len(times)} steps instead of {sizes.steps}"
    seconds = (times[-1] - times[0]) / (sizes.steps - 1)
    return [
        ("step", seconds, "s"),
        ("completion tokens", sizes.rows * sizes.rollout_completion / seconds, "tokens/s"),
        ("tokens of prompts and completions", sum(r.num_tokens for r in rollouts) / seconds, "tokens/s"),
        _make_peak_figure(measure_peak_bytes()),
    ]


def _describe_generation(shape: Shape, batch_size: int) -> Measurement:
    sizes = shape.sizes
    conditions = f"{shape.describe()}, {_get_precision()}, prompts of {sizes.prompt} tokens, completions of {sizes.completion}"
    return Measurement(
        1,
        f"generation {shape.name}, batch {batch_size}",
        conditions,
        15 * shape.time_factor,
        lambda: measure_generation(shape, batch_size),
    )


def _describe_labels(shape: Shape) -> Measurement:
    sizes = shape.sizes
    conditions = (
        f"{shape.describe()}, {_get_precision()}, {sizes.pairs} pairs of responses of {sizes.completion} tokens,"
        f" written replies of {sizes.reply} tokens, one by one: {sizes.peer_pairs} pairs"
    )
    return Measurement(1, f"labels {shape.name}", conditions, 30 * shape.time_factor, lambda: measure_labels(shape))


def _describe_stream(shape: Shape) -> Measurement:
    sizes = shape.sizes
    conditions = (
        f"{shape.describe()}, {_get_precision()}, {sizes.stream_prompts} prompts; response, critique and revision of"
        f" {sizes.stream_tokens} tokens each, and a label; embedded log and sink"
    )
    limit_s = 35 * shape.time_factor
    return Measurement(1, f"stream {shape.name}", conditions, limit_s, lambda: measure_stream(shape), _STREAM_PACKAGES)


def _describe_update(shape: Shape, method: str, tuning: str) -> Measurement:
    sizes = shape.sizes
    conditions = (
        f"{shape.describe()}, fp32 weights, {_get_precision()} products, {sizes.rows} rollouts in a step, {sizes.micro_batch} in a"
        f" pass, prompts of {sizes.rollout_prompt} tokens, completions of {sizes.rollout_completion}"
        f"{', gradient checkpointing' if shape.checkpointing else ''}{f', rank {_LORA_RANK}' if tuning == 'lora' else ''}"
    )
    name = f"{method} {shape.name}, {'LoRA' if tuning == 'lora' else 'all weights'}"
    return Measurement(2, name, conditions, 25 * shape.time_factor, lambda: measure_update(shape, method, tuning), ("peft",))


def _get_precision() -> str:
    return "bf16" if get_device() == "cuda" else "fp32"


def list_measurements(shapes: Sequence[Shape]) -> list[Measurement]:
    """Return all measurements of these shapes in the order in which they run. Small models and short measurements come first."""
    measurements = [Measurement(1, "bandwidth", "a copy on the device", 15, measure_bandwidth)]
    measurements += [_describe_generation(shape, batch_size) for shape in shapes for batch_size in shape.sizes.batch_sizes]
    measurements += [_describe_labels(shape) for shape in shapes]
    measurements += [_describe_stream(shape) for shape in shapes]
    # Full updates are last, because they may need more memory than the device has.
    for tuning in ("lora", "full"):
        measurements += [_describe_update(shape, method, tuning) for shape in shapes for method in ("ppo", "grpo")]
    return measurements
