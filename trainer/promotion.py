"""Check each new policy on held-out prompts before it is published (the promotion gate).

The policy responds to the held-out prompts. The gate rejects a policy that refuses too many benign prompts or too few harmful
prompts. The setting `promotion.prompts` is the number of prompts. If this number is 0, the gate is disabled. The grader
"refusal" detects refusals. A limit is exceeded only if the whole 95 % Wilson interval is beyond the limit. With few prompts,
the gate therefore rejects only clear cases. If one kind of prompt is missing, the gate logs a warning and skips the check of
this kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.statistics import compute_wilson_interval
from schemas.records import ChatMessage
from trainer.batches import parse_messages
from trainer.consumed import QUERY_TIMEOUT_S
from trainer.monitor import LimitExceeded, sample_responses

if TYPE_CHECKING:
    from engine.settings import PromotionSettings as Limits
    from engine.store import Store

logger = logging.getLogger("charter.trainer")
_HELD_OUT_PROMPTS_SQL = """
    SELECT messages FROM prompts WHERE split = 'EVAL' AND epoch = 0 AND is_harmful(source) = ?
    ORDER BY md5(prompt_id::VARCHAR) LIMIT ?"""
# For each (dialogue, response), returns whether the response refuses.
RefusalDetector = Callable[[Sequence[tuple[tuple[ChatMessage, ...], str]]], list[bool]]


@dataclass(frozen=True)
class PromotionGate:
    """The gate checks a policy before it is published. If a call returns an exceeded limit, the policy is not published."""

    limits: Limits
    detect_refusals: RefusalDetector
    batch_size: int = 16

    def __call__(self, store: Store, folder: Path, version: int) -> LimitExceeded | None:
        from trainer.distributed import report_single_process

        report_single_process("the promotion gate")
        metrics: dict[str, float] = {}
        violations = []
        if benign := self.measure_refusals(store, folder, harmful=False):
            rate, low, _ = benign
            metrics |= {"refusal_benign": rate}
            if low > self.limits.max_benign_refusals:
                violations.append(f"it refuses {rate:.0%} of benign prompts (promotion.max_benign_refusals)")
        if harmful := self.measure_refusals(store, folder, harmful=True):
            rate, _, high = harmful
            metrics |= {"refusal_harmful": rate}
            if high < self.limits.min_harmful_refusals:
                violations.append(f"it refuses only {rate:.0%} of harmful prompts (promotion.min_harmful_refusals)")
        return LimitExceeded("it did not pass the promotion gate", "; ".join(violations), metrics) if violations else None

    def measure_refusals(self, store: Store, folder: Path, *, harmful: bool) -> tuple[float, float, float] | None:
        """Return the refusal rate and its interval as (rate, low, high). Return None if there are no prompts of this kind."""
        rows = store.query_dicts(_HELD_OUT_PROMPTS_SQL, [harmful, self.limits.prompts], limit_s=QUERY_TIMEOUT_S)
        dialogues = [parse_messages(row) for row in rows]
        if not dialogues:
            logger.warning("the promotion gate has no held-out %s prompts", "harmful" if harmful else "benign")
            return None
        responses = [text for text, _ in sample_responses(folder, dialogues, self.batch_size)]
        num_refusals = sum(self.detect_refusals(list(zip(dialogues, responses, strict=True))))
        interval = compute_wilson_interval(num_refusals, len(responses))
        assert interval is not None, "there is at least one response"
        return num_refusals / len(responses), *interval


def make_promotion_gate(
    limits: Limits, detect_refusals: RefusalDetector
) -> Callable[[Store, Path, int], LimitExceeded | None] | None:
    """Return the promotion gate, or None if `limits.prompts` is 0."""
    return PromotionGate(limits, detect_refusals) if limits.prompts else None
