"""What work will cost, before it is begun: tokens by stage, at most.

A text is taken to have a token for every four characters. What is generated is counted at its limit, a chain at all its
rounds; the real figures are below that, and stand in the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.settings import Judge, Settings

CHARS_PER_TOKEN = 4
FEW_SHOT = 150
QUESTION = 120  # a principle and the frame around it


@dataclass(frozen=True)
class Cost:
    """Tokens that a stage reads and, at most, writes."""

    stage: str
    records: int
    read: int
    written: int


def estimate(settings: Settings, stages: Sequence[str], prompts: int, chars: int) -> list[Cost]:
    """The cost of `prompts` prompts that have `chars` characters in all, for each of `stages`."""
    asked = chars // CHARS_PER_TOKEN
    answer, samples, rounds = settings.respond.max_tokens, settings.respond.samples, settings.critique.rounds
    shots = FEW_SHOT if settings.critique.few_shot else 0
    shown = asked + prompts * (answer + QUESTION)
    costs = {
        "respond": Cost("respond", prompts, asked, prompts * samples * answer),
        # A verdict and a text in each round, both orders of a comparison after it, and the last verdict.
        "critique": Cost(
            "critique", prompts, (rounds + 1) * (2 * shown + prompts * shots), prompts * rounds * settings.critique.max_tokens
        ),
        "revise": Cost("revise", prompts, rounds * (shown + prompts * shots), prompts * rounds * settings.revise.max_tokens),
        "judge": judging(settings.judge, prompts, shown + prompts * answer, max(1, samples - 1)),
    }
    return [costs[stage] for stage in stages]


def judging(judge: Judge, prompts: int, shown: int, pairs: int) -> Cost:
    """What judging costs where all prompts' questions, one of each, have `shown` tokens: both orders, for each principle."""
    questions = 2 * (pairs if judge.pairing == "completions" else 1) * (1 if judge.principles == "all" else judge.k)
    written = 0 if judge.form == "options" else questions * prompts * judge.max_tokens
    again = questions * shown + written if judge.form == "reasoning" else 0  # the letters are scored after the reasoning
    return Cost("judge", prompts, questions * shown + again, written)


def lines(costs: Sequence[Cost]) -> list[str]:
    """The costs as text."""
    told = [f"  {c.stage:<9} reads about {c.read:>12,} tokens, writes at most {c.written:>12,}" for c in costs]
    total = sum(c.read + c.written for c in costs)
    return [*told, f"  at most about {total:,} tokens in all (every text at its limit, {CHARS_PER_TOKEN} characters a token)"]
