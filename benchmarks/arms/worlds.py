"""What an arm is trained and measured on: a base model, prompts, a rule, a grader that applies the rule, and common settings."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.arms.graders.one_sentence import grade_one_sentence
from benchmarks.arms.prompts import read_held_out_prompts, sample_training_prompts
from benchmarks.learning.base_model import train_base_model
from benchmarks.learning.language import ToyQuestion, generate_questions, write_correct_response, write_response
from benchmarks.learning.programmatic import LANGUAGE_RULE, PreferenceRule
from engine.models import smollm2

Row = dict[str, Any]
_FOLDER = Path(__file__).parent
_HELD_OUT_SEED, _HUMAN_TEXT_SEED, _NUM_HUMAN_TEXTS = 999, 998, 64
_COMPARISONS_PER_PROMPT = 5  # as many as the judge makes of the six completions of a prompt
_PEOPLE_ERROR_RATE = 0.1  # share of demonstrations that follow no rule, and of comparisons that prefer the worse response


@dataclass(frozen=True)
class Metric:
    """A number in the details of the world's grades, averaged over the held-out prompts of a subset (or over all of them)."""

    title: str
    key: str
    subset: str = ""
    is_rate: bool = True


@dataclass(frozen=True)
class World:
    """The first of `metrics` is what the rule asks for. `num_prompts` is the number of prompts of an update. `grader` is the name
    of a module in `graders`.

    `sample_rows` returns the training prompts of a seed in order. `write_people_rows` returns rows that people write for prompts,
    for a kind of data (see `Act`). It is None if the world has no people. `human_texts` returns texts by people, whose perplexity is
    measured.
    """

    name: str
    model: str
    rule: PreferenceRule
    constitution: Path
    grader: str
    metrics: tuple[Metric, ...]
    settings: Mapping[str, str]
    num_prompts: int
    num_updates: int
    get_base_folder: Callable[[Path], Path]
    sample_rows: Callable[[int, int], list[Row]]
    read_held_out_rows: Callable[[int], list[Row]]
    read_human_texts: Callable[[], list[Row]]
    write_people_rows: Callable[[str, list[Row], int], list[Row]] | None = None

    @property
    def grader_file(self) -> Path:
        return _FOLDER / "graders" / f"{self.grader}.py"

    @property
    def grader_name(self) -> str:
        """The NAME in the grader file. The prefix separates it from the graders that come with Charter."""
        return f"arms-{self.grader.replace('_', '-')}"


# The small language


def _prepare_small_model(folder: Path) -> Path:
    if not (folder / "tokenizer.json").exists():
        train_base_model(folder)
    return folder


def _to_row(question: ToyQuestion) -> Row:
    return {"prompt": question.text, "source": question.source}


def _generate_held_out_questions(count: int) -> list[ToyQuestion]:
    return list(islice(generate_questions(_HELD_OUT_SEED), count))


def _sample_questions(seed: int, count: int) -> list[Row]:
    """Return questions of a seed that are not held out."""
    held_out = {question.text for question in _generate_held_out_questions(256)}
    fresh = (question for question in generate_questions(seed) if question.text not in held_out)
    return [_to_row(question) for question in islice(fresh, count)]


def _write_small_people_rows(kind: str, rows: list[Row], seed: int) -> list[Row]:
    """Return demonstrations, comparisons, or responses of the judge model (which makes no errors) for these questions."""
    questions = {question.text: question for question in islice(generate_questions(seed), 4_000)}
    rng, written = random.Random(f"people/{kind}/{seed}/{rows[0]['prompt']}"), list[Row]()
    for row in rows:
        question = questions[row["prompt"]]
        if kind in ("demonstrations", "judge_responses"):
            errs = kind == "demonstrations" and rng.random() < _PEOPLE_ERROR_RATE
            written.append(row | {"completion": (write_response if errs else write_correct_response)(question, rng)})
            continue
        for _ in range(_COMPARISONS_PER_PROMPT):
            a, b = (write_response(question, rng) for _ in range(2))
            score_a, score_b = (LANGUAGE_RULE.score_response(question.text, text) for text in (a, b))
            if score_a == score_b:
                continue  # people who see no difference give no label
            errs = rng.random() < _PEOPLE_ERROR_RATE
            chosen, rejected = (a, b) if (score_a > score_b) != errs else (b, a)
            written.append(row | {"chosen": chosen, "rejected": rejected})
    return written


def _write_human_texts() -> list[Row]:
    rng = random.Random("human texts")
    questions = islice(generate_questions(_HUMAN_TEXT_SEED), _NUM_HUMAN_TEXTS)
    return [_to_row(question) | {"completion": write_correct_response(question, rng)} for question in questions]


SMALL = World(
    name="small",
    model="small",
    rule=LANGUAGE_RULE,
    constitution=_FOLDER.parent / "learning" / "constitution.toml",
    grader="language_rule",
    metrics=(
        Metric("correct", "correct"),
        Metric("harmful refused", "correct", "red-team"),
        Metric("others helped politely", "correct", "benign"),
        Metric("rude", "rude"),
        Metric("words", "words", is_rate=False),
    ),
    # These are the settings of `benchmarks.learning`.
    settings={
        "models.max_batch_size": "192", "respond.max_tokens": "48", "respond.num_completions": "6",
        "train.micro_batch_size": "64", "train.precision": "fp32",
        "sft.learning_rate": "3e-4", "sft.batch_size": "16", "sft.epochs": "2",
        "reward.learning_rate": "1e-3", "reward.batch_size": "16",
        "ppo.learning_rate": "3e-4", "ppo.batch_size": "64", "ppo.epochs": "3",
    },
    num_prompts=128,
    num_updates=3,
    get_base_folder=lambda folder: _prepare_small_model(folder / "small-base-model"),
    sample_rows=_sample_questions,
    read_held_out_rows=lambda count: [_to_row(question) for question in _generate_held_out_questions(count)],
    read_human_texts=_write_human_texts,
    write_people_rows=_write_small_people_rows,
)  # fmt: skip


# SmolLM2


def _score_one_sentence(question: str, text: str) -> float:
    """Return the score of a text from -1 to 1. A judge sees only the text, so a last mark shows that the response has ended."""
    return 2 * (grade_one_sentence(text, ended=text.strip().endswith((".", "!", "?"))).score or 0.0) - 1


def _is_longer(text: str) -> bool:
    return _keep_first_sentence(text, random.Random()) != text.strip()


def _keep_first_sentence(text: str, rng: random.Random) -> str:
    """Return the first sentence of at least three words. If it has no such sentence, return the text."""
    match = re.match(r"\s*(\S+(?:\s+\S+){2,}?[.!?])(?=\s|$)", text)
    return match[1] if match else text.strip()


_ONE_SENTENCE_RULE = PreferenceRule(_score_one_sentence, "is longer than one sentence", _is_longer, _keep_first_sentence)
_SMOLLM2_SETTINGS = {
    "models.max_batch_size": "64", "respond.max_tokens": "64", "respond.num_completions": "4",
    "train.micro_batch_size": "8",
    "sft.learning_rate": "5e-5", "reward.learning_rate": "5e-5",
    "ppo.learning_rate": "1e-5", "ppo.batch_size": "16", "ppo.epochs": "2",
    "distill.learning_rate": "5e-5",
    "grpo.learning_rate": "3e-5", "grpo.batch_size": "16", "dpo.learning_rate": "1e-5",
}  # fmt: skip


def _read_prompt_texts() -> list[Row]:
    """Return the benign held-out prompts as texts. People wrote them, and nothing is trained on them."""
    return [{"completion": row["prompt"]} for row in read_held_out_prompts() if row["source"] == "benign"]


def _make_smollm2_world(name: str, metrics: tuple[Metric, ...], *, with_harmful: bool) -> World:
    def sample_rows(seed: int, count: int) -> list[Row]:
        return list(islice(sample_training_prompts(seed, with_harmful=with_harmful), count))

    return World(
        name=name,
        model="smollm2",
        rule=_ONE_SENTENCE_RULE,
        constitution=_FOLDER / f"{name}.toml",
        grader=name,
        metrics=metrics,
        settings=_SMOLLM2_SETTINGS,
        num_prompts=64,
        num_updates=2,
        get_base_folder=lambda folder: smollm2.get_model_folder(),
        sample_rows=sample_rows,
        read_held_out_rows=lambda count: read_held_out_prompts()[:count],
        read_human_texts=_read_prompt_texts,
    )


ONE_SENTENCE = _make_smollm2_world(
    "one_sentence",
    (
        Metric("all four", "all"),
        Metric("ended by itself", "ended"),
        Metric("one paragraph", "paragraph"),
        Metric("no list", "no_list"),
        Metric("words", "words", is_rate=False),
    ),
    with_harmful=False,
)
DECLINE_HARM = _make_smollm2_world(
    "decline_harm",
    (
        Metric("correct", "correct"),
        Metric("harmful refused", "refused", "red-team"),
        Metric("others complied with", "complied", "benign"),
        Metric("unusable", "unusable"),
        Metric("words", "words", is_rate=False),
    ),
    with_harmful=True,
)
