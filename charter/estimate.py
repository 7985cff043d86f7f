"""Estimate the cost of a run before it starts, as an upper bound on the tokens of each stage.

The estimate assumes one token for every four characters, completions of the maximum length, and chains with all rounds.
The real token counts are lower. They are in the records of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from charter.stages import PRINCIPLES_GRADER
from constitutions.loader import load_constitution
from engine.constitution_prompts import render_principles
from engine.pairing import CONTRAST_PAIRING, REVISION_PAIRING, list_pairs
from engine.settings import CritiqueSettings, JudgeSettings, RespondSettings, ReviseSettings, Settings

_CHARS_PER_TOKEN = 4
_FEW_SHOT_TOKENS = 150
PRINCIPLE_PROMPT_TOKENS = 120  # tokens of a principle and of the prompt template around it


@dataclass(frozen=True)
class StageCost:
    """Holds the estimated number of prompt tokens of a stage, and the maximum number of its completion tokens."""

    stage: str
    num_records: int
    prompt_tokens: int
    max_completion_tokens: int


def estimate_costs(settings: Settings, stages: Sequence[str], num_prompts: int, num_chars: int) -> list[StageCost]:
    """Return the cost of each stage for `num_prompts` prompts with `num_chars` characters in total."""
    prompt_tokens, respond = num_chars // _CHARS_PER_TOKEN, settings.respond
    response_tokens, rounds = settings.respond.max_tokens, settings.critique.rounds
    num_completions = settings.respond.num_completions
    is_contrast = settings.judge.pairing == CONTRAST_PAIRING
    if is_contrast:
        num_pairs = int(settings.contrast.ask_judge)
    else:
        is_revision = settings.judge.pairing == REVISION_PAIRING
        num_pairs = 1 if is_revision else max(1, len(list_pairs(settings.judge.pairing, num_completions)))
    few_shot_tokens = num_prompts * (_FEW_SHOT_TOKENS if settings.critique.few_shot else 0)
    # A prompt about a response contains the dialogue, the response and the principle.
    dialogue_tokens = prompt_tokens + num_prompts * (response_tokens + PRINCIPLE_PROMPT_TOKENS)
    contrast_tokens = prompt_tokens + num_prompts * _count_contrast_tokens(settings) if is_contrast else 0
    costs = {
        "respond": StageCost(
            "respond",
            num_prompts,
            prompt_tokens + contrast_tokens,
            num_prompts * (num_completions + is_contrast) * _sum_limits(respond),
        ),
        # Each round has a verdict and a critique, and compares the revision in both orders. One more verdict ends the chain.
        "critique": StageCost(
            "critique",
            num_prompts,
            (rounds + 1) * (2 * dialogue_tokens + few_shot_tokens),
            num_prompts * rounds * _sum_limits(settings.critique),
        ),
        "revise": StageCost(
            "revise",
            num_prompts,
            rounds * (dialogue_tokens + few_shot_tokens),
            num_prompts * rounds * _sum_limits(settings.revise),
        ),
        "judge": _estimate_judge_cost(settings.judge, num_prompts, dialogue_tokens + num_prompts * response_tokens, num_pairs),
    }
    if PRINCIPLES_GRADER in settings.grade.graders:
        costs["grade"] = _estimate_grade_cost(settings, num_prompts, dialogue_tokens)
    # Without this grader, the stage grade asks no model and costs nothing.
    return [costs[stage] for stage in stages if stage in costs]


def _count_contrast_tokens(settings: Settings) -> int:
    """Return the number of tokens of the principles in the prompt of a contrast completion."""
    constitution = load_constitution(settings.run.constitution)
    text = render_principles(constitution, constitution.critique)
    share = min(1.0, (settings.contrast.num_principles or len(constitution.critique)) / len(constitution.critique))
    return round(share * len(text)) // _CHARS_PER_TOKEN


def _sum_limits(options: RespondSettings | CritiqueSettings | ReviseSettings | JudgeSettings) -> int:
    """Return the maximum number of tokens of one completion, including its reasoning."""
    return options.max_tokens + options.max_thinking_tokens


def _estimate_grade_cost(settings: Settings, num_prompts: int, dialogue_tokens: int) -> StageCost:
    """Return the cost of one question for each response and critique principle, in both orders of the options."""
    available = len(load_constitution(settings.run.constitution).critique)
    num_principles = min(settings.grade.num_principles or available, available)
    num_contrasts = int(settings.judge.pairing == CONTRAST_PAIRING)
    num_texts = {
        "completion": settings.respond.num_completions, "final_response": 1, "contrast_completion": num_contrasts
    }  # fmt: skip
    num_questions = 2 * num_principles * sum(num_texts[subject] for subject in settings.grade.subjects)
    return StageCost("grade", num_prompts, num_questions * dialogue_tokens, 0)


def _estimate_judge_cost(judge: JudgeSettings, num_prompts: int, prompt_tokens: int, num_pairs: int) -> StageCost:
    """Return the cost of the judge. `prompt_tokens` is the total number of tokens of `num_prompts` judge prompts."""
    num_principles = 1 if judge.principles == "all" else judge.num_principles
    num_questions = 2 * num_pairs * num_principles  # each pair in both orders
    completion_tokens = 0 if judge.answer_mode == "logprobs" else num_questions * num_prompts * _sum_limits(judge)
    # After the reasoning, a second request scores the option letters. Its prompt contains the reasoning.
    scoring_tokens = num_questions * prompt_tokens + completion_tokens if judge.answer_mode == "reasoning" else 0
    return StageCost("judge", num_prompts, num_questions * prompt_tokens + scoring_tokens, completion_tokens)


def format_costs(costs: Sequence[StageCost]) -> list[str]:
    """Return the costs as lines of text."""
    lines = [
        f"  {c.stage:<9} about {c.prompt_tokens:>12,} prompt tokens, at most {c.max_completion_tokens:>12,} completion tokens"
        for c in costs
    ]
    total = sum(c.prompt_tokens + c.max_completion_tokens for c in costs)
    assumptions = f"every completion at its maximum length, {_CHARS_PER_TOKEN} characters per token"
    return [*lines, f"  at most about {total:,} tokens in total ({assumptions})"]
