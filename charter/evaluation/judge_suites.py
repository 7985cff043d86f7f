"""`charter eval judge`: measure judge presets on suites of labeled pairs, and compare them with published accuracies.

A suite is `llmbar` (a file of LLMBar, Zeng et al. 2024: which of two outputs follows the instruction?) or `pairs` (human
preferences in a format of `charter produce`). Each preset labels the pairs of each file. The rows of a file are the presets, two
baselines that read only the lengths, and the accuracies that Zeng et al. published for this file. Each row is repeated for the
pairs of equal length, because a judge that prefers longer responses gains nothing there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from charter.console import format_table
from charter.evaluation.agreement import AgreementMetrics, HumanPair, compute_baselines, compute_judge_agreement
from charter.evaluation.agreement_study import AgreementStudy, LabeledPair, PairDataset, read_pairs, sample_pairs
from charter.models import RoleModels
from constitutions.loader import Constitution, JudgePrinciple, load_constitution
from engine.errors import UsageError
from engine.settings import Settings
from schemas.records import ChatMessage, Preference

LENGTH_TOLERANCE = 0.1  # of the number of words of the longer response
ALL_PAIRS, EQUAL_LENGTH = "all", "equal length"
_COLUMNS = ("input", "output_1", "output_2", "label")
_LLMBAR_PRINCIPLE = JudgePrinciple(
    id="instruction",
    name="Following the instruction",
    judge_prompt="Which response does exactly what the user's instruction asks? Do not prefer a response for its length or its style.",
)
# Accuracies on the subsets of LLMBar, from the tables of Zeng et al. 2024: (judge, accuracy).
PUBLISHED_ACCURACIES: dict[str, tuple[tuple[str, float], ...]] = {
    "natural": (("GPT-4", 0.955), ("ChatGPT", 0.815), ("longer wins", 0.56)),
    "gptinst": (("GPT-4", 0.864), ("ChatGPT", 0.266), ("longer wins", 0.13)),
    "gptout": (("GPT-4", 0.777), ("ChatGPT", 0.415), ("longer wins", 0.45)),
}

Kind = Literal["judge", "baseline", "published"]


@dataclass(frozen=True)
class JudgeRow:
    """The result of one judge on one file. A value that cannot be computed is None.

    `subset` is "all" or "equal length" (word counts within 10 %). `accuracy` is the fraction of the decided labels that agree
    with the person, with Wilson's 95 % interval. `ties` are labels of exactly one half. `flip_rate` is the fraction of the
    judgments in which the same position won in both orders. `ece` and `brier` are computed from the probabilities. `abstentions`
    has the number of pairs without a label, by outcome. `evidence` says whether the interval excludes chance.
    """

    suite: str
    file: str
    judge: str
    kind: Kind
    subset: str
    pairs: int | None = None
    labels: int | None = None
    ties: int | None = None
    agreed: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    kappa: float | None = None
    ece: float | None = None
    brier: float | None = None
    flip_rate: float | None = None
    prefers_longer: float | None = None
    abstentions: Mapping[str, int] = field(default_factory=dict)
    tokens_per_label: float | None = None
    seconds_per_label: float | None = None
    cost_per_label: float | None = None
    evidence: str = ""


def read_llmbar(file: str, limit: int | None, seed: int) -> PairDataset:
    """Read a JSON file of LLMBar, or a sample of `limit` of its pairs. Raises UsageError if a row is not a labeled pair."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file}", "--suite llmbar names it", "give a JSON file of LLMBar")
    content = path.read_bytes()
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise _make_llmbar_error(f"{file} is not JSON", str(error)) from error
    if not isinstance(rows, list) or not rows:
        raise _make_llmbar_error(f"{file} has no rows", "the file must be a JSON list with at least one row")
    pairs = [_parse_llmbar_row(file, number, row) for number, row in enumerate(rows, start=1)]
    human_pairs, judge_inputs = sample_pairs(pairs, limit, seed)
    return PairDataset(human_pairs, judge_inputs, path.name, hashlib.sha256(content).hexdigest()[:16], len(rows), 0)


def _parse_llmbar_row(file: str, number: int, row: Any) -> LabeledPair:
    if not isinstance(row, dict):
        raise _make_llmbar_error(f"{file} row {number} is not an object", f"it is {json.dumps(row)[:60]}")
    if missing := [name for name in _COLUMNS if name not in row]:
        raise _make_llmbar_error(f"{file} row {number} has no {missing[0]}", f"it has {', '.join(map(str, row)) or 'nothing'}")
    instruction, outputs, label = row["input"], (row["output_1"], row["output_2"]), row["label"]
    if not all(isinstance(text, str) for text in (instruction, *outputs)):
        raise _make_llmbar_error(f"{file} row {number} is not a pair", "input, output_1 and output_2 must be texts")
    if isinstance(label, bool) or label not in (1, 2):
        raise _make_llmbar_error(f"{file} row {number} has the label {label!r}", "the label is the number of the better output")
    if outputs[0] == outputs[1]:
        raise _make_llmbar_error(f"{file} row {number} has two equal outputs", "a judge cannot choose between equal outputs")
    chosen, rejected = outputs if label == 1 else outputs[::-1]
    return LabeledPair([ChatMessage(role="user", content=instruction)], chosen, rejected)


def _make_llmbar_error(what: str, why: str) -> UsageError:
    return UsageError(what, why, f"give a JSON list of objects with {', '.join(_COLUMNS[:3])}, and the label 1 or 2")


SUITES: dict[str, Callable[[str, int | None, int], PairDataset]] = {"llmbar": read_llmbar, "pairs": read_pairs}


def parse_suite(text: str) -> tuple[str, str]:
    """Return the name and the file of NAME=FILE. Raises UsageError if the suite does not exist or has no file."""
    name, _, file = text.partition("=")
    if name not in SUITES:
        raise UsageError(
            f"there is no judge suite {name}", f"the suites are {', '.join(SUITES)}", "type, for example: --suite llmbar=FILE"
        )
    if not file:
        raise UsageError(f"--suite {text} names no file", "Charter contains no labeled pairs", f"type: --suite {name}=FILE")
    return name, file


def make_llmbar_constitution(constitution: Constitution) -> Constitution:
    """Return the constitution with one judge principle, which asks which response follows the instruction."""
    changes = {"name": "instruction-following", "judge": [_LLMBAR_PRINCIPLE], "judge_with": "one", "prose": ()}
    return Constitution(**constitution.model_dump() | changes)


class JudgeStudy:
    """Measures judge presets on files of labeled pairs.

    A file of LLMBar is judged under one principle, which asks which response follows the instruction, because its labels mean
    this. If the user sets `run.constitution`, this constitution is used for all files.
    """

    def __init__(
        self, settings: Settings, origins: dict[str, str], suites: Sequence[tuple[str, PairDataset]], seed: int
    ) -> None:
        self.rows: list[JudgeRow] = []
        self.descriptions: list[str] = []
        self._seed = seed
        constitution = load_constitution(settings.run.constitution)
        is_user_choice = origins["run.constitution"] != "default"
        by_suite = {"llmbar": constitution if is_user_choice else make_llmbar_constitution(constitution)}
        self._studies = [
            (suite, AgreementStudy(settings, origins, dataset, seed, by_suite.get(suite, constitution)))
            for suite, dataset in suites
        ]

    def run(self, models: RoleModels, presets: Sequence[str], limit_written: int | None) -> None:
        """Label the pairs of each file with each preset. `limit_written` is the maximum number for presets that generate text."""
        for suite, study in self._studies:
            study.run(models, presets, limit_written)
            file, metrics = study.dataset.name, {row.judge: row for row in study.rows}
            for preset, labels in study.labels.items():
                pairs = study.dataset.human_pairs[: len(labels)]
                self.rows.append(_make_row(suite, file, "judge", ALL_PAIRS, metrics[preset]))
                equal = [(pair, label) for pair, label in zip(pairs, labels, strict=True) if has_equal_length(pair)]
                self.rows.append(_make_row(suite, file, "judge", EQUAL_LENGTH, _compute_without_time(preset, equal)))
            self.rows += self._make_baseline_rows(suite, study)
            self.rows += _make_published_rows(suite, file)
            self.descriptions.append(study.describe())

    def _make_baseline_rows(self, suite: str, study: AgreementStudy) -> list[JudgeRow]:
        pairs = study.dataset.human_pairs[: max(map(len, study.labels.values()))]
        subsets = {ALL_PAIRS: pairs, EQUAL_LENGTH: [pair for pair in pairs if has_equal_length(pair)]}
        return [
            _make_row(suite, study.dataset.name, "baseline", subset, metrics)
            for subset, subset_pairs in subsets.items()
            for metrics in compute_baselines(subset_pairs, self._seed)
            if metrics.judge != "random"
        ]

    def format_table(self) -> str:
        """Return the rows as a table, with one line for each file about the judge, the principles and the pairs."""
        return f"{format_table(TABLE_COLUMNS, [format_row(row) for row in self.rows])}\n\n" + "\n".join(self.descriptions)


def has_equal_length(pair: HumanPair) -> bool:
    """Return whether the numbers of words of both responses differ by at most 10 % of the larger number."""
    shorter, longer = sorted((len(pair.response_a.split()), len(pair.response_b.split())))
    return longer - shorter <= LENGTH_TOLERANCE * longer


def _compute_without_time(preset: str, labeled_pairs: Sequence[tuple[HumanPair, Preference | None]]) -> AgreementMetrics:
    pairs, labels = [pair for pair, _ in labeled_pairs], [label for _, label in labeled_pairs]
    return compute_judge_agreement(preset, pairs, labels, None, None)


def _make_row(suite: str, file: str, kind: Kind, subset: str, metrics: AgreementMetrics) -> JudgeRow:
    return JudgeRow(
        suite=suite,
        file=file,
        judge=metrics.judge,
        kind=kind,
        subset=subset,
        pairs=metrics.pairs,
        labels=metrics.labelled,
        ties=metrics.labelled - metrics.decided if kind == "judge" else metrics.pairs - metrics.decided,
        agreed=metrics.agreed,
        accuracy=metrics.accuracy,
        accuracy_low=metrics.accuracy_low,
        accuracy_high=metrics.accuracy_high,
        kappa=metrics.kappa,
        ece=metrics.ece,
        brier=metrics.brier,
        flip_rate=metrics.swap_inconsistency,
        prefers_longer=metrics.prefers_longer,
        abstentions=metrics.abstentions,
        tokens_per_label=metrics.tokens_per_label,
        seconds_per_label=metrics.seconds_per_label,
        cost_per_label=metrics.cost_per_label,
        evidence=_describe_evidence(metrics.accuracy_low, metrics.accuracy_high),
    )


def _describe_evidence(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "no decided label"
    return "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "no evidence"


def _make_published_rows(suite: str, file: str) -> list[JudgeRow]:
    """Return the published accuracies of the subset of LLMBar that the name of the file contains, if it is known."""
    subset = next((name for name in PUBLISHED_ACCURACIES if name in file.lower()), "") if suite == "llmbar" else ""
    return [
        JudgeRow(suite, file, judge, "published", ALL_PAIRS, accuracy=accuracy, evidence="Zeng et al. 2024")
        for judge, accuracy in PUBLISHED_ACCURACIES.get(subset, ())
    ]


TABLE_COLUMNS = (
    "file", "judge", "pairs of", "pairs", "labels", "ties", "accuracy % (95 %)", "kappa", "ECE", "Brier", "flips %", "longer %",
    "no label", "tokens/label", "s/label", "evidence",
)  # fmt: skip


def format_row(row: JudgeRow) -> list[str | None]:
    """Return the cells of TABLE_COLUMNS. Fractions are in percent."""
    accuracy = _format(row.accuracy, 1, 100)
    if row.accuracy_low is not None:
        accuracy = f"{accuracy} ({_format(row.accuracy_low, 1, 100)}-{_format(row.accuracy_high, 1, 100)})"
    abstentions = ", ".join(f"{count} {name.lower().replace('_', ' ')}" for name, count in row.abstentions.items())
    judge = f"{row.judge} ({row.kind})" if row.kind == "published" else row.judge
    return [
        row.file, judge, row.subset, *(_format(count, 0) for count in (row.pairs, row.labels, row.ties)), accuracy,
        _format(row.kappa, 2), _format(row.ece, 3), _format(row.brier, 3), _format(row.flip_rate, 1, 100),
        _format(row.prefers_longer, 1, 100), abstentions or None, _format(row.tokens_per_label, 0), _format(row.seconds_per_label, 2),
        row.evidence,
    ]  # fmt: skip


def _format(value: float | None, digits: int, factor: int = 1) -> str | None:
    return None if value is None else f"{factor * value:z.{digits}f}"  # z: no -0.00
