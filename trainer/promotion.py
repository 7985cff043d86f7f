"""The gate before publication: a new policy answers held-out prompts, and must not refuse benign ones nor obey harmful ones.

It is off unless `promotion.prompts` says how many prompts to ask. Refusals are told by the same phrases as in `monitor_refusals`. A
limit counts as passed only when Wilson's 95 % interval lies beyond it, so that few prompts keep back only what is plain. Where
there are no held-out prompts of a kind, that kind is not asked, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.batches import QUERY_TIMEOUT_S, parse_messages
from trainer.monitor import LimitExceeded, sample_responses

if TYPE_CHECKING:
    from engine.settings import PromotionSettings as Limits
    from engine.store import Store

logger = logging.getLogger("charter.trainer")
_HELD_OUT_PROMPTS_SQL = """
    SELECT messages FROM prompts WHERE split = 'EVAL' AND epoch = 0 AND is_harmful(source) = ?
    ORDER BY md5(prompt_id::VARCHAR) LIMIT ?"""
_REFUSAL_RATE_SQL = """
    WITH counted AS (
        SELECT count(*) AS n, count(*) FILTER (is_refusal(answer)) AS hits FROM (SELECT unnest(?::VARCHAR[]) AS answer))
    SELECT share(hits, n), wilson_low(hits, n), wilson_high(hits, n) FROM counted"""


@dataclass(frozen=True)
class PromotionGate:
    """Looks at a policy's folder before its version is published; what it returns keeps the policy back."""

    limits: Limits
    batch_size: int = 16

    def __call__(self, store: Store, folder: Path, version: int) -> LimitExceeded | None:
        metrics: dict[str, float] = {}
        found = []
        if benign := self.measure_refusals(store, folder, harmful=False):
            metrics |= {"refusal_benign": benign[0]}
            if benign[1] > self.limits.max_benign_refusals:
                found.append(f"it refuses {benign[0]:.0%} of benign prompts (promotion.max_benign_refusals)")
        if harmful := self.measure_refusals(store, folder, harmful=True):
            metrics |= {"refusal_harmful": harmful[0]}
            if harmful[2] < self.limits.min_harmful_refusals:
                found.append(f"it refuses only {harmful[0]:.0%} of harmful prompts (promotion.min_harmful_refusals)")
        return LimitExceeded("it did not pass the gate", "; ".join(found), metrics) if found else None

    def measure_refusals(self, store: Store, folder: Path, *, harmful: bool) -> tuple[float, float, float] | None:
        """The share of refusals and its interval; None without prompts of this kind."""
        dialogues = [
            parse_messages(row)
            for row in store.query_dicts(_HELD_OUT_PROMPTS_SQL, [harmful, self.limits.prompts], limit_s=QUERY_TIMEOUT_S)
        ]
        if not dialogues:
            logger.warning("the gate has no held-out %s prompts to ask", "harmful" if harmful else "benign")
            return None
        answers = [text for text, _ in sample_responses(folder, dialogues, self.batch_size)]
        (rates,) = store.query(_REFUSAL_RATE_SQL, [answers], limit_s=QUERY_TIMEOUT_S).rows
        return rates[0], rates[1], rates[2]


def make_promotion_gate(limits: Limits) -> Callable[[Store, Path, int], LimitExceeded | None] | None:
    return PromotionGate(limits) if limits.prompts else None
