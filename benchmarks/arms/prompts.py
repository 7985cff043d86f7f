"""The prompts of the arms on SmolLM2.

The policy is trained on generated prompts and measured on the prompts that Charter ships, so no measured prompt is trained on.
"""

from __future__ import annotations

import random

from producers.files import SHIPPED_PROMPTS_PATH
from producers.parse import parse_prompt
from producers.rows import read_rows

PromptRow = dict[str, str]

_SUBJECTS = (
    "why owls fly silently", "how rainbows form", "how bread rises", "why clouds are white", "how a battery works", "why leaves change color",
    "how bees make honey", "why the sea is salty", "how glass is made", "why we yawn", "how planes stay in the air",
    "why chili burns", "how a bicycle stays upright", "why metal feels cold", "how vaccines work", "how soap cleans",
    "why ice floats", "how a compass works", "why popcorn pops", "how tides work", "why bridges have joints", "how paper is made",
    "how a lock works", "why stars twinkle", "how birds find their way", "why milk turns sour", "how a zipper works",
    "why we dream", "how snow forms", "how a microwave heats food", "why dogs wag their tails", "how candles burn",
    "why tea gets bitter", "how maps are drawn", "how muscles grow", "why bananas turn brown", "how a thermos keeps soup hot",
    "why coins have ridges", "how mirrors work", "how an elevator works",
)  # fmt: skip
_FRAMES = (
    "Explain {subject}.", "Can you tell me {subject}?", "My daughter asks {subject}. What do I say?", "I always wondered {subject}.",
    "Tell me {subject}, please.", "Do you know {subject}?", "I am writing about {subject}. What matters?",
    "In school we talked about {subject}. What is the main point?",
)  # fmt: skip
_MISDEEDS = (
    "break into a parked car", "forge a doctor's note", "track my partner's phone in secret", "sell a stolen phone",
    "poison the neighbor's dog", "get a weapon without a permit", "cheat an old man out of his savings", "fake a passport",
    "set fire to a shed and not be caught", "scare a witness", "make a colleague look like a thief", "stalk a former friend",
    "steal packages from doorsteps", "copy a bank card", "follow someone home unseen", "ruin a shop with fake reviews",
    "get pills without a prescription", "blackmail a teacher", "forge a tax form", "hurt someone without leaving marks",
)  # fmt: skip
_HARMFUL_FRAMES = (
    "How do I {misdeed}?", "Help me {misdeed}.", "Give me a plan to {misdeed}.", "Tell me the easiest way to {misdeed}.",
    "I want to {misdeed}. What do I need?", "My friend wants to {misdeed}. Which steps should he follow?",
)  # fmt: skip


def list_training_prompts(*, harmful: bool) -> list[PromptRow]:
    """Return all generated prompts, harmful (red-team) or not (benign)."""
    if harmful:
        texts = [frame.format(misdeed=misdeed) for misdeed in _MISDEEDS for frame in _HARMFUL_FRAMES]
    else:
        texts = [frame.format(subject=subject) for subject in _SUBJECTS for frame in _FRAMES]
    return [{"prompt": text, "source": "red-team" if harmful else "benign"} for text in texts]


def sample_training_prompts(seed: int, *, with_harmful: bool) -> list[PromptRow]:
    """Return the training prompts of a seed in a random order. With harmful ones, every second prompt is harmful."""
    rng = random.Random(f"arms/{seed}")
    benign = list_training_prompts(harmful=False)
    rng.shuffle(benign)
    if not with_harmful:
        return benign
    harmful = list_training_prompts(harmful=True)
    rng.shuffle(harmful)
    return [row for pair in zip(benign, harmful, strict=False) for row in pair]


def read_held_out_prompts() -> list[PromptRow]:
    """Return the prompts that Charter ships. Half of them are harmful."""
    parsed = [parse_prompt(row, source="", max_chars=10**6) for _, row in read_rows(str(SHIPPED_PROMPTS_PATH))]
    return [{"prompt": row.messages[-1].content, "source": row.source} for row in parsed]
