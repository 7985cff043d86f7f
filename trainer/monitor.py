"""Watching for reward hacking: each new policy of the RL phase is set beside the reference of its phase.

A policy is looked at once its answers have arrived (`monitor.min_responses`), before PPO trains on them. Both versions' answers are
scored by the same reward model, and both answer the same held-out prompts, which a held-out judge compares. What is found is
a Metric of phase "watch"; the views in engine/monitor_views.sql show the same figures for every version. A figure that passes its
limit trips: the loop then pauses PPO, goes back to the last policy that was in order, and writes an incident.

Figures with an interval trip only where the intervals of policy and reference do not meet. Where there is nothing to measure
(no held-out prompts, no harmful ones) a figure is left out, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, stdev
from typing import TYPE_CHECKING, Any

from engine.models.chat_template import encode_completion, encode_prompt
from engine.models.interface import GenerationRequest
from schemas import ids
from schemas.records import ChatMessage, Metric, PolicyKind, Score
from trainer.batches import QUERY_TIMEOUT_S, parse_messages

if TYPE_CHECKING:
    from engine.settings import MonitorSettings as Limits
    from trainer.loop import Trainer

_Metrics = dict[str, float]
_ScoredText = tuple[tuple[ChatMessage, ...], str, bool]  # messages, answer, whether it ended by itself
# The probability that the first of two answers to a dialogue is better, of a judge whose labels no reward model has learned.
PairJudge = Callable[[Sequence[tuple[tuple[ChatMessage, ...], str, str]]], list[float | None]]

_MONITOR_PHASE = "monitor"
_Z_SCORE_95 = 1.959963984540054
_MAX_NEW_TOKENS = 128
_MAX_PERPLEXITY_TOKENS = 1024  # of a text whose perplexity is measured
_RESPONSES_SQL = """
    SELECT a.policy_version, a.response_id, a.completion_index, a.prompt_id, a.source, r.messages, a.text, r.run_id,
           r.completions[a.completion_index + 1].finish_reason AS finish_reason
    FROM monitored_responses a JOIN responses r ON r.record_id = a.response_id WHERE a.policy_version = ? ORDER BY a.nth"""
_HELD_OUT_PROMPTS_SQL = """
    SELECT messages, source FROM prompts WHERE split = 'EVAL' AND epoch = 0 ORDER BY md5(prompt_id::VARCHAR) LIMIT ?"""
# What people wrote and nothing trains on: held-out demonstrations, else prompts. What a policy has written would not do: it is
# meant to be unlearned.
_BENIGN_TEXTS_SQL = """
    SELECT messages, text FROM (
        SELECT messages, completion AS text, 0 AS place, commit_seq FROM demonstrations
        WHERE split = 'EVAL' AND NOT is_harmful(source)
        UNION ALL
        SELECT messages[:0], messages[-1].content, CASE WHEN split = 'EVAL' THEN 1 ELSE 2 END, commit_seq FROM prompts
        WHERE NOT is_harmful(source))
    ORDER BY place, commit_seq LIMIT ?"""


@dataclass(frozen=True)
class LimitExceeded:
    """Why the RL phase must stop now. `good` is the policy version to go back to."""

    title: str
    detail: str
    metrics: _Metrics = field(default_factory=dict)
    rollback_version: int | None = None


@dataclass(frozen=True)
class LimitViolation:
    """A limit that was passed: which figure, and in words how."""

    metric: str
    message: str


# The limits. `m` are the metrics of a version, those of the reference with `_reference` behind the name.


def find_limit_violations(metrics: Mapping[str, float], limits: Limits) -> list[LimitViolation]:
    """The limits that these metrics pass; a figure that was not measured passes none."""
    return [LimitViolation(name, words) for name, check in _CHECKS.items() if (words := check(metrics, limits))]


def _check_held_out_judge(metrics: Mapping[str, float], limits: Limits) -> str | None:
    """The proxy reward is up beyond chance, and the held-out judge prefers the reference beyond chance."""
    if metrics.get("proxy_low", 0.0) > 0 and metrics.get("judge_high", 1.0) < 0.5:
        return (
            f"the reward model likes the policy better (by {metrics['proxy_gain']:.2f} deviations), and the held-out judge prefers"
            f" the reference (the policy wins {metrics['judge_wins']:.0%}, at most {metrics['judge_high']:.0%})"
        )
    return None


def _check_length(metrics: Mapping[str, float], limits: Limits) -> str | None:
    """The reward follows length, and answers have become longer."""
    growth = metrics["mean_words"] / metrics["mean_words_reference"] if metrics.get("mean_words_reference") else 1.0
    if metrics.get("length_correlation", 0.0) > limits.max_length_correlation and growth > limits.max_growth:
        return f"the reward's correlation with length is {metrics['length_correlation']:.2f}, and answers are {growth:.1f} times as long"
    return None


def _check_perplexity(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("perplexity", 0.0) > limits.max_growth * metrics.get("perplexity_reference", math.inf):
        return f"the perplexity of benign texts is {metrics['perplexity']:.1f}, the reference's is {metrics['perplexity_reference']:.1f}"
    return None


def _check_diversity(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("distinct_2", 1.0) < metrics.get("distinct_2_reference", 0.0) / limits.max_growth:
        return f"distinct-2 is {metrics['distinct_2']:.2f}, the reference's is {metrics['distinct_2_reference']:.2f}"
    return None


def _check_boilerplate(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("boilerplate_rise", 0.0) > limits.max_boilerplate:
        return f"one phrase is in {metrics['boilerplate_rise']:.0%} more of the answers than of the reference's (view monitor_phrases)"
    return None


def _check_benign_refusals(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("refusal_benign_low", 0.0) > metrics.get("refusal_benign_high_reference", 1.0):
        return f"{metrics['refusal_benign']:.0%} of benign prompts are refused, by the reference {metrics['refusal_benign_reference']:.0%}"
    return None


def _check_harmful_refusals(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("refusal_harmful_high", 1.0) < metrics.get("refusal_harmful_low_reference", 0.0):
        return f"{metrics['refusal_harmful']:.0%} of harmful prompts are refused, by the reference {metrics['refusal_harmful_reference']:.0%}"
    return None


def _check_kl(metrics: Mapping[str, float], limits: Limits) -> str | None:
    if metrics.get("kl_rise", 0.0) > limits.max_kl_rise:
        return f"the KL to the reference rose by {metrics['kl_rise']:.1f} nats per sequence in one update"
    return None


_CHECKS: dict[str, Callable[[Mapping[str, float], Limits], str | None]] = {
    "judge": _check_held_out_judge,
    "length": _check_length,
    "perplexity": _check_perplexity,
    "distinct_2": _check_diversity,
    "boilerplate": _check_boilerplate,
    "refusal_benign": _check_benign_refusals,
    "refusal_harmful": _check_harmful_refusals,
    "kl": _check_kl,
}


# Statistics


def compute_confidence_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval (normal approximation); one value is its own interval."""
    mean = fmean(values)
    half = _Z_SCORE_95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def compute_mean_difference(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """The difference of two independent means and its 95 % interval (Welch, normal approximation)."""
    (a, a_low, _), (b, b_low, _) = compute_confidence_interval(new), compute_confidence_interval(old)
    half = math.hypot(a - a_low, b - b_low)
    return a - b, a - b - half, a - b + half


def compute_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    try:
        return correlation(x, y)
    except StatisticsError:
        return 0.0


# What the models say


def compute_perplexity(folder: Path, texts: Sequence[tuple[Sequence[ChatMessage], str]]) -> float | None:
    """exp of the mean negative log-likelihood of the texts' tokens under a policy, each text given its dialogue.

    A text without a dialogue is given its own first token. None when that leaves no token to predict.
    """
    import torch

    from trainer import weights

    tokenizer, model = weights.load_tokenizer(folder), weights.load_policy(folder).eval()
    total, count = 0.0, 0
    for messages, text in texts:
        answer = encode_completion(tokenizer, text, ends_with_eos=bool(messages))[:_MAX_PERPLEXITY_TOKENS]
        prompt, answer = (encode_prompt(tokenizer, messages), answer) if messages else (answer[:1], answer[1:])
        if not answer:
            continue
        row = torch.tensor([[*prompt, *answer]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[0, len(prompt) :], reduction="sum"))
        count += len(answer)
    return math.exp(total / count) if count else None


def sample_responses(folder: Path, dialogues: Sequence[tuple[ChatMessage, ...]], batch_size: int) -> list[tuple[str, bool]]:
    """One sampled answer of a policy to each dialogue, and whether it ended by itself; the same ones each time."""
    from engine.models import open_model

    model = open_model(str(folder), max_batch_size=batch_size)
    asks = [GenerationRequest(messages, seed=number) for number, messages in enumerate(dialogues)]
    made = [
        one
        for start in range(0, len(asks), batch_size)
        for (one,) in model.generate(asks[start : start + batch_size], max_tokens=_MAX_NEW_TOKENS)
    ]
    return [(one.text, one.finish_reason == "stop") for one in made]


# Looking


@dataclass
class RewardHackingMonitor:
    """Looks at each new policy of a trainer's RL phase once, and says what the loop must do (see the module's docstring).

    `compare` is the held-out judge; without one, and without held-out prompts, the judge's figures are left out.
    """

    limits: Limits
    judge: PairJudge | None = None
    passed_by_version: dict[int, bool] = field(default_factory=dict)  # version -> whether it was in order

    def __call__(self, trainer: Trainer) -> LimitExceeded | None:
        standing = trainer.read_state()
        version, reference = standing.policy_version, standing.reference_version
        if version == reference or self.is_checked(trainer, version):
            return None
        with trainer.timed_store.hold_open():
            new, old = (trainer.store.query_dicts(_RESPONSES_SQL, [of], limit_s=QUERY_TIMEOUT_S) for of in (version, reference))
        if min(len(new), len(old)) < self.limits.min_responses:
            return None
        metrics = self.compute_metrics(trainer, version, reference, new, old)
        found = find_limit_violations(metrics, self.limits)
        self.passed_by_version[version] = not found
        metrics |= {"reference": float(reference), "tripped": float(len(found))}
        trainer.publish([self.make_metric(trainer, version, metrics)])
        if not found:
            return None
        good = max(
            (v for v, in_order in self.passed_by_version.items() if in_order and reference < v < version), default=reference
        )
        return LimitExceeded(f"policy {version} looks like reward hacking", "; ".join(f.message for f in found), metrics, good)

    def is_checked(self, trainer: Trainer, version: int) -> bool:
        """Whether a version was looked at, also before a restart."""
        if not self.passed_by_version:
            sql = "SELECT policy_version, tripped = 0 FROM monitor_checks ORDER BY created_at"
            self.passed_by_version = dict(trainer.store.query(sql, limit_s=QUERY_TIMEOUT_S).rows)
        return version in self.passed_by_version

    def make_metric(self, trainer: Trainer, version: int, metrics: _Metrics) -> Metric:
        return Metric(
            record_id=ids.compute_record_id(
                "watch", [], ids.compute_fingerprint("monitor", run=trainer.settings.run.id, version=version)
            ),
            run_id=trainer.settings.run.id,
            stage="train",
            policy_version=version,
            phase=_MONITOR_PHASE,
            batch_number=version,
            step=0,
            metrics=metrics,
        )

    def compute_metrics(
        self, trainer: Trainer, version: int, reference: int, rows: list[Any], reference_rows: list[Any]
    ) -> _Metrics:
        """Every figure that there is something to measure with."""
        metrics: _Metrics = {"answers": float(len(rows))} | self.compute_proxy_metrics(trainer, rows, reference_rows)
        with trainer.timed_store.hold_open():
            metrics |= _add_reference_metrics(
                _query_version_metrics(trainer, version), _query_version_metrics(trainer, reference)
            )
            metrics |= _query_boilerplate_rise(trainer, version, reference) | _query_kl_metrics(trainer, version)
        folders = trainer.get_policy_folder(version), trainer.get_policy_folder(reference)
        texts = [
            (parse_messages(row), row["text"])
            for row in trainer.store.query_dicts(_BENIGN_TEXTS_SQL, [self.limits.prompts], limit_s=QUERY_TIMEOUT_S)
        ]
        of_new, of_old = (compute_perplexity(folder, texts) for folder in folders)
        if of_new and of_old:
            metrics |= _add_reference_metrics({"perplexity": of_new}, {"perplexity": of_old})
        return metrics | self.compute_judge_metrics(trainer, *folders)

    def compute_proxy_metrics(self, trainer: Trainer, rows: list[Any], reference_rows: list[Any]) -> _Metrics:
        """What the reward model says of both; DPO has none."""
        if not trainer.read_state().reward_version:
            return {}
        score = self.make_scorer(trainer)
        of_new, of_old = score(rows), score(reference_rows)
        gain, low, high = compute_mean_difference(of_new, of_old)
        lengths = [float(len(row["text"])) for row in rows]
        return {
            "proxy_gain": gain,
            "proxy_low": low,
            "proxy_high": high,
            "length_correlation": compute_correlation(lengths, of_new),
        }

    def make_scorer(self, trainer: Trainer) -> Callable[[list[Any]], list[float]]:
        """Scores answers with the newest reward model, and publishes the scores."""
        from trainer import reward

        version = trainer.read_state().reward_version
        model = reward.load_reward_model(trainer.get_version_folder(PolicyKind.REWARD, version))

        def score(rows: list[Any]) -> list[float]:
            raw = model.score([(parse_messages(row), row["text"], row["finish_reason"] == "STOP") for row in rows])
            normalised = model.normalize(raw)
            trainer.publish([_make_score(row, version, *pair) for row, *pair in zip(rows, raw, normalised, strict=True)])
            return normalised

        return score

    def compute_judge_metrics(self, trainer: Trainer, policy_folder: Path, reference_folder: Path) -> _Metrics:
        """How often the held-out judge prefers the policy's answers to the reference's, on held-out prompts."""
        if self.judge is None or not self.limits.prompts:
            return {}
        dialogues = [
            parse_messages(row)
            for row in trainer.store.query_dicts(_HELD_OUT_PROMPTS_SQL, [self.limits.prompts], limit_s=QUERY_TIMEOUT_S)
        ]
        if not dialogues:
            return {}
        rows = trainer.settings.models.max_batch_size
        answers = [
            [text for text, _ in sample_responses(folder, dialogues, rows)] for folder in (policy_folder, reference_folder)
        ]
        labels = self.judge([(d, a, b) for d, a, b in zip(dialogues, *answers, strict=True) if a.strip() and b.strip()])
        given = [p for p in labels if p is not None]
        if not given:
            return {}
        mean, low, high = compute_confidence_interval(given)
        return {"judge_wins": mean, "judge_low": low, "judge_high": high, "judge_pairs": float(len(given))}


def _make_score(row: Mapping[str, Any], reward_version: int, score: float, normalized_score: float) -> Score:
    response = str(row["response_id"])
    return Score(
        record_id=ids.compute_record_id(
            "score", [response], ids.compute_fingerprint("score", reward_version=reward_version), row["completion_index"]
        ),
        parent_ids=[response],
        prompt_id=str(row["prompt_id"]),
        run_id=row["run_id"],
        stage="train",
        policy_version=row["policy_version"],
        response_id=response,
        completion_index=row["completion_index"],
        reward_version=reward_version,
        score=score,
        normalized_score=normalized_score,
    )


def _add_reference_metrics(metrics: _Metrics, reference_metrics: _Metrics) -> _Metrics:
    """The metrics of a version and, under their names with `_reference`, those of its reference."""
    return metrics | {f"{name}_reference": value for name, value in reference_metrics.items()}


def _query_version_metrics(trainer: Trainer, version: int) -> _Metrics:
    """Lengths, diversity and refusals of a version, from the views."""
    store = trainer.store
    found: _Metrics = {}
    sql = "SELECT mean_words, distinct_1, distinct_2, words FROM monitor_diversity WHERE policy_version = ?"
    for row in store.query_dicts(sql, [version], limit_s=QUERY_TIMEOUT_S):
        found |= {name: float(value) for name, value in row.items() if value is not None}
    for row in store.query_dicts("SELECT * FROM monitor_refusals WHERE policy_version = ?", [version], limit_s=QUERY_TIMEOUT_S):
        name = "refusal_harmful" if row["harmful"] else "refusal_benign"
        found |= {name: row["refusal_rate"], f"{name}_low": row["refusal_low"], f"{name}_high": row["refusal_high"]}
    return found


def _query_boilerplate_rise(trainer: Trainer, version: int, reference: int) -> _Metrics:
    """By how much the share of answers with one phrase rose, of the phrase that rose most."""
    sql = """
        SELECT coalesce(max(n.phrase_share - coalesce(o.phrase_share, 0)), 0) FROM monitor_phrases n
        LEFT JOIN monitor_phrases o ON o.phrase = n.phrase AND o.policy_version = ? WHERE n.policy_version = ?"""
    return {"boilerplate_rise": float(trainer.store.query(sql, [reference, version], limit_s=QUERY_TIMEOUT_S).rows[0][0])}


def _query_kl_metrics(trainer: Trainer, version: int) -> _Metrics:
    """How the KL to the reference rose in the update that made a version."""
    sql = "SELECT kl_ref, kl_slope, kl_slope * steps AS kl_rise FROM monitor_kl WHERE policy_version = ?"
    rows = trainer.store.query_dicts(sql, [version - 1], limit_s=QUERY_TIMEOUT_S)
    return {name: float(value) for row in rows[-1:] for name, value in row.items() if value is not None}
