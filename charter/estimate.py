"""What work will cost, before it is begun: tokens by stage, at most.

A text is taken to have a token for every four characters. What is generated is counted at its limit, a chain at all its
rounds; the real figures are below that, and stand in the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.settings import JudgeSettings, Settings

_CHARS_PER_TOKEN = 4
_FEW_SHOT_TOKENS = 150
PRINCIPLE_PROMPT_TOKENS = 120  # a principle and the frame around it


@dataclass(frozen=True)
class StageCost:
    """Tokens that a stage reads and, at most, writes."""

    stage: str
    num_records: int
    prompt_tokens: int
    max_completion_tokens: int


def estimate_costs(settings: Settings, stages: Sequence[str], num_prompts: int, num_chars: int) -> list[StageCost]:
    """The cost of `prompts` prompts that have `chars` characters in all, for each of `stages`."""
    asked = num_chars // _CHARS_PER_TOKEN
    answer, samples, rounds = settings.respond.max_tokens, settings.respond.num_completions, settings.critique.rounds
    shots = _FEW_SHOT_TOKENS if settings.critique.few_shot else 0
    shown = asked + num_prompts * (answer + PRINCIPLE_PROMPT_TOKENS)
    costs = {
        "respond": StageCost("respond", num_prompts, asked, num_prompts * samples * answer),
        # A verdict and a text in each round, both orders of a comparison after it, and the last verdict.
        "critique": StageCost(
            "critique",
            num_prompts,
            (rounds + 1) * (2 * shown + num_prompts * shots),
            num_prompts * rounds * settings.critique.max_tokens,
        ),
        "revise": StageCost(
            "revise", num_prompts, rounds * (shown + num_prompts * shots), num_prompts * rounds * settings.revise.max_tokens
        ),
        "judge": _estimate_judge_cost(settings.judge, num_prompts, shown + num_prompts * answer, max(1, samples - 1)),
    }
    return [costs[stage] for stage in stages]


def _estimate_judge_cost(judge: JudgeSettings, num_prompts: int, prompt_tokens: int, num_pairs: int) -> StageCost:
    """What judging costs where all prompts' questions, one of each, have `shown` tokens: both orders, for each principle."""
    questions = (
        2 * (num_pairs if judge.pairing == "completions" else 1) * (1 if judge.principles == "all" else judge.num_principles)
    )
    written = 0 if judge.answer_mode == "logprobs" else questions * num_prompts * judge.max_tokens
    again = (
        questions * prompt_tokens + written if judge.answer_mode == "reasoning" else 0
    )  # the letters are scored after the reasoning
    return StageCost("judge", num_prompts, questions * prompt_tokens + again, written)


def format_costs(costs: Sequence[StageCost]) -> list[str]:
    """The costs as text."""
    told = [
        f"  {c.stage:<9} reads about {c.prompt_tokens:>12,} tokens, writes at most {c.max_completion_tokens:>12,}"
        for c in costs
    ]
    total = sum(c.prompt_tokens + c.max_completion_tokens for c in costs)
    return [*told, f"  at most about {total:,} tokens in all (every text at its limit, {_CHARS_PER_TOKEN} characters a token)"]
