"""The judge stage with `judge.pairing = "contrast"`: responses -> preferences whose label needs no judge.

The policy has sampled one completion with the constitution in its prompt (the contrast completion, consumers/respond.py). It is
compared with completion 0, which was sampled without the constitution. The completion with the constitution is chosen, so the label
is 1 and its source is CONTRAST. (RLCD, Yang et al. 2023, arXiv:2307.12950; Open Character Training, Maiya et al. 2025,
arXiv:2511.01689.)

A pair that cannot be compared (engine/eligibility.py) has an outcome and no label. If `contrast.ask_judge` is set, the judge is
asked about each pair as about any other pair. Its answer is recorded and changes no label. The view `contrast_stats` has the share of
pairs in which it agrees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from consumers.judge import JudgeStage, ResponsePair, make_constitution_ref, make_pair_fields, report_unjudged_pair
from engine.errors import CharterError
from engine.models.interface import Model, Result
from engine.notices import NOTICES
from engine.pairing import CONTRAST_PAIRING
from schemas import ids
from schemas.records import LabelSource, Outcome, Preference, Record, Response, Split

_LABEL = 1.0  # response A is the completion with the constitution
_NAMES = ("the completion with the constitution", "the completion without the constitution")


def _make_pair(record: Record) -> ResponsePair | None:
    """Return the contrast pair of a response. Return None, and report it, if a training response has no contrast completion."""
    assert isinstance(record, Response)
    if record.split is not Split.TRAIN:  # only training prompts get contrast completions
        return None
    contrast = record.contrast_completion
    if contrast is None or not record.completions:
        NOTICES.report("contrast_pair", "missing", "a response has no contrast completion, so it makes no contrast pair")
        return None
    plain = record.completions[0]
    return ResponsePair(
        parent=record,
        response_id=record.record_id,
        response_a=contrast.text,
        response_b=plain.text,
        completion_index_a=None,
        completion_index_b=plain.index,
        finish_reason_a=contrast.finish_reason,
        finish_reason_b=plain.finish_reason,
        sample_index=0,
        names=_NAMES,
    )


@dataclass(frozen=True)
class ContrastStage:
    """The judge stage of contrast pairs. If `model` is None, no judge is asked. `make_judge` returns the stage that asks it."""

    model: Model | None
    make_judge: Callable[[Model], JudgeStage]
    preset: str = ""

    def __call__(self, records: Sequence[Record]) -> list[Result[list[Preference]]]:
        pairs = [_make_pair(record) for record in records]
        judge = self.make_judge(self.model) if self.model else None
        judges = [judge if judge and pair and _may_ask(judge, pair) else None for pair in pairs]
        asked = [pair for pair, asks in zip(pairs, judges, strict=True) if pair and asks]
        started = time.monotonic()
        comparisons = iter(judge.compare_pairs(asked) if judge and asked else [])
        latency_ms = 1000 * (time.monotonic() - started) / max(1, len(asked))
        results: list[Result[list[Preference]]] = []
        for pair, asks in zip(pairs, judges, strict=True):
            if pair is None:
                results.append([])
            elif asks is None:
                results.append([self.make_preference(pair)])
            else:
                preference = asks.make_judged_preference(pair, next(comparisons), latency_ms)
                if not isinstance(preference, CharterError):
                    results.append([preference.model_copy(update=self.make_label(pair))])
                else:
                    results.append(preference)
        return results

    def make_preference(self, pair: ResponsePair) -> Preference:
        """Return the preference of a pair that no judge was asked about."""
        fields = make_pair_fields(pair, CONTRAST_PAIRING, pair.parent.constitution)
        fingerprint = ids.compute_fingerprint("contrast", pairing=CONTRAST_PAIRING)
        record_id = ids.compute_record_id("judge", [pair.parent.record_id], fingerprint, pair.sample_index)
        return Preference(**fields | self.make_label(pair), record_id=record_id, preset=self.preset)

    def make_label(self, pair: ResponsePair) -> dict[str, Any]:
        """Return the label of a pair, or the outcome and the reason if it cannot be compared."""
        if pair.problem is not None:
            report_unjudged_pair(*pair.problem)
            outcome, reason = pair.problem
            return {"outcome": outcome, "outcome_reason": reason, "label_source": LabelSource.CONTRAST}
        return {"outcome": Outcome.OK, "p_a": _LABEL, "label_source": LabelSource.CONTRAST}


def _may_ask(judge: JudgeStage, pair: ResponsePair) -> bool:
    """Return whether the judge is asked about a pair. A judge with another constitution than that of the pair is not asked."""
    if pair.problem is not None:
        return False
    if pair.parent.constitution != make_constitution_ref(judge.constitution):
        message = "the judge is not asked about contrast pairs of another constitution than its own; their labels stay"
        NOTICES.report("contrast_judge", "constitution", message)
        return False
    return True
