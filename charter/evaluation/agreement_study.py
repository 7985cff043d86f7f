"""`charter eval agreement`: read human-labeled pairs, label them with each judge preset, and format the metrics."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from charter.console import format_table
from charter.evaluation.agreement import AgreementMetrics, HumanPair, compute_baselines, compute_judge_agreement
from charter.evaluation.rejudge import BatchJudge, make_pair_response
from charter.models import RoleModels
from charter.progress import show_progress
from constitutions.loader import Constitution, load_constitution
from engine.budget import parse_prices
from engine.errors import PermanentRecordError, RequestFailed, UsageError
from engine.models.interface import require_results
from engine.progress import WorkProgress
from engine.settings import PRESETS, JudgeSettings, Settings
from engine.text import format_count
from producers.parse import PreferenceRow, RowError, parse_preference
from producers.rows import read_rows
from schemas.records import ChatMessage, Preference, Response

_MAX_PAIR_CHARS = 1_000_000  # rows longer than this are invalid, because they are not dialogues
JUDGE_PRESETS = ("bai2022", "bai2022-cot", "lee2023", "ensemble-k", "course")


@dataclass(frozen=True)
class LabeledPair:
    """Two responses to a dialogue, of which a person preferred `chosen`."""

    messages: Sequence[ChatMessage]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairDataset:
    """Holds the pairs of a study with their human labels. `judge_inputs` has the same pairs in the form that a judge reads.

    `content_hash` is the hash of the whole file. `num_invalid` is the number of rows that are ties or are not pairs.
    """

    human_pairs: list[HumanPair]
    judge_inputs: list[Response]
    name: str
    content_hash: str
    num_rows: int
    num_invalid: int


def read_pairs(file: str, limit: int | None, seed: int) -> PairDataset:
    """Read all pairs of a file, or a sample of `limit` pairs, in random order.

    The A/B order of the responses is also random, so that the order does not reveal the preferred response. Raises UsageError
    if the file has no pairs.
    """
    pairs: list[PreferenceRow] = []
    digest, num_rows = hashlib.sha256(), 0
    for _, row in read_rows(file):
        num_rows += 1
        digest.update(row if isinstance(row, bytes) else repr(row).encode())
        try:
            pairs.append(parse_preference(row, source="pairs", max_chars=_MAX_PAIR_CHARS))
        except RowError:
            continue
    pairs = [pair for pair in pairs if pair.p_a != 0.5]
    if not pairs:
        raise UsageError(
            f"{file} has no pair with a preferred response",
            f"the {num_rows} rows of the file do not have a chosen and a rejected response to one prompt",
            'write each row as {"prompt": "...", "chosen": "...", "rejected": "..."}, or as two dialogues',
        )
    labeled_pairs = [
        LabeledPair(pair.messages, pair.response_a, pair.response_b)
        if pair.p_a > 0.5
        else LabeledPair(pair.messages, pair.response_b, pair.response_a)
        for pair in pairs
    ]
    human_pairs, judge_inputs = sample_pairs(labeled_pairs, limit, seed)
    content_hash = digest.hexdigest()[:16]
    return PairDataset(human_pairs, judge_inputs, Path(file).name, content_hash, num_rows, num_rows - len(pairs))


def sample_pairs(pairs: Sequence[LabeledPair], limit: int | None, seed: int) -> tuple[list[HumanPair], list[Response]]:
    """Return all pairs, or a sample of `limit` pairs, in random order and with a random A/B order."""
    rng = random.Random(f"pairs/{seed}")
    indices = sorted(rng.sample(range(len(pairs)), min(limit or len(pairs), len(pairs))))
    rng.shuffle(indices)  # makes the first N pairs a random sample (--limit-generative)
    human_pairs, judge_inputs = [], []
    for index in indices:
        pair, swap = pairs[index], rng.random() < 0.5
        a, b = (pair.rejected, pair.chosen) if swap else (pair.chosen, pair.rejected)
        human_pairs.append(HumanPair(a, b, not swap))
        judge_inputs.append(make_pair_response(pair.messages, a, b, (), "pairs"))
    return human_pairs, judge_inputs


class AgreementStudy:
    """Labels the pairs with each judge preset, and formats the metrics.

    The judge principles are those of `constitution`, or those of `run.constitution` if it is None.
    """

    def __init__(
        self,
        settings: Settings,
        origins: dict[str, str],
        dataset: PairDataset,
        seed: int,
        constitution: Constitution | None = None,
    ) -> None:
        self.settings, self.origins, self.dataset, self.seed = settings, origins, dataset, seed
        self.constitution: Constitution = constitution or load_constitution(settings.run.constitution)
        self.rows: list[AgreementMetrics] = []
        self.labels: dict[str, list[Preference | None]] = {}
        self.model_name = ""

    def run(self, models: RoleModels, presets: Sequence[str], limit_written: int | None) -> None:
        """Label the pairs with each preset, and add the baselines for the same pairs.

        `limit_written` is the maximum number of pairs for presets that generate text, because they are much slower than presets
        that score options.
        """
        model, counts = models.get_model("judge"), set()
        price = parse_prices(self.settings.budget.prices).get(model.id)
        self.model_name = f"{model.id} ({model.revision})"
        for preset in presets:
            settings = apply_judge_preset(self.settings, self.origins, preset)
            count = len(self.dataset.judge_inputs) if settings.judge.answer_mode == "logprobs" else limit_written
            judge_inputs, human_pairs = self.dataset.judge_inputs[:count], self.dataset.human_pairs[:count]
            counts.add(len(judge_inputs))
            started = time.monotonic()
            with show_progress(f"judging {self.dataset.name} with {preset}", "pairs") as progress:
                progress.num_total = len(judge_inputs)
                judge = BatchJudge(settings, models, partial(_count_pairs, progress))
                labels = label_pairs(judge, self.constitution, judge_inputs)
            seconds = time.monotonic() - started
            cost = sum(price.compute_cost(x.prompt_tokens, x.completion_tokens) for x in labels if x) if price else None
            self.labels[preset] = labels
            self.rows.append(compute_judge_agreement(preset, human_pairs, labels, seconds, cost))
        # Presets can have different numbers of pairs. Add baselines for each number, so that they use the same pairs as the preset.
        for num_pairs in sorted(counts, reverse=True):
            self.rows += compute_baselines(self.dataset.human_pairs[:num_pairs], self.seed)

    def format_table(self) -> str:
        columns, rows = _format_rows(self.rows)
        return f"{format_table(columns, rows)}\n\n{self.describe()}"

    def describe(self) -> str:
        """Return one line that names the judge, the constitution and the origin of the pairs."""
        data, c = self.dataset, self.constitution
        invalid = f"; {format_count(data.num_invalid, 'rows')} without a preferred response" if data.num_invalid else ""
        return (
            f"judge: {self.model_name}; constitution: {c.name} {c.version} ({c.hash[:12]}); pairs: {len(data.human_pairs)} of the"
            f" {data.num_rows} rows of {data.name} ({data.content_hash}), sampled with seed {self.seed}{invalid}"
        )

    def format_markdown(self) -> str:
        """Return the table as Markdown, with the command that produced it."""
        columns, rows = _format_rows(self.rows)
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cell or '' for cell in row)} |" for row in rows]
        command = shlex.join(["charter", *sys.argv[1:]])
        return "\n".join(["# Agreement with human labels", "", "```", command, "```", "", *lines, "", self.describe(), ""])

    def to_json(self) -> str:
        """Return JSON with the metrics, and with the human label and the judge's label of each pair."""
        label_fields = (
            "p_a",
            "p_forward",
            "p_backward",
            "option_mass",
            "position_flip",
            "principle_id",
            "prompt_tokens",
            "completion_tokens",
        )
        labels = {
            preset: [
                {"outcome": x.outcome.value} | {name: getattr(x, name) for name in label_fields} if x else None for x in row
            ]
            for preset, row in self.labels.items()
        }
        report = {
            "about": self.describe(),
            "rows": [asdict(row) for row in self.rows],
            "a_preferred": [pair.a_preferred for pair in self.dataset.human_pairs],
            "labels": labels,
        }
        return json.dumps(report, indent=1)


def apply_judge_preset(settings: Settings, origins: dict[str, str], preset: str) -> Settings:
    """Return the settings with another judge preset. The judge.* settings that the user set override the preset."""
    preset_values = PRESETS["judge"][preset].get("judge", {})
    user_values = {
        key: getattr(settings.judge, key)
        for key in JudgeSettings.model_fields
        if origins[f"judge.{key}"] != "default" and not origins[f"judge.{key}"].startswith("judge.preset=")
    }
    return settings.model_copy(update={"judge": JudgeSettings(**preset_values | user_values | {"preset": preset})})


def label_pairs(judge: BatchJudge, constitution: Constitution, pairs: Sequence[Response]) -> list[Preference | None]:
    """Return the label of each pair.

    A label is None if the pair does not fit into the context of the model, or if a server fails for this pair but answers others.
    """
    results = judge.judge_pairs(constitution, pairs)
    return require_results([None if isinstance(result, PermanentRecordError | RequestFailed) else result for result in results])


def _count_pairs(progress: WorkProgress, batch_size: int) -> None:
    progress.num_done += batch_size


def _format_rows(rows: Sequence[AgreementMetrics]) -> tuple[list[str], list[list[str | None]]]:
    """Return column names and formatted cells. Fractions are in percent and have their intervals."""
    columns = [
        "judge", "pairs", "labeled", "accuracy % (95 %)", "Brier", "ECE", "flips %", "mass", "longer %", "abstentions",
        "tokens/pair: prompt (cached) + completion", "s/pair", "tokens/label", "s/label",
    ]  # fmt: skip
    with_cost = any(row.cost_per_label is not None for row in rows)
    return [*columns, *(["cost/label"] if with_cost else [])], [_format_row(row, with_cost) for row in rows]


def _format_row(row: AgreementMetrics, with_cost: bool) -> list[str | None]:
    interval = (
        "" if row.accuracy_low is None else f" ({_format_percent(row.accuracy_low)}-{_format_percent(row.accuracy_high)})"
    )
    abstentions = ", ".join(f"{count} {name.lower().replace('_', ' ')}" for name, count in row.abstentions.items())
    tokens = None
    if row.tokens_read is not None:
        tokens = f"{row.tokens_read:.0f} ({row.tokens_cached:.0f}) + {row.tokens_written:.0f}"
    cells = [
        row.judge, str(row.pairs), str(row.labelled), f"{_format_percent(row.accuracy) or '-'}{interval}", _format_number(row.brier, 3),
        _format_number(row.ece, 3), _format_percent(row.swap_inconsistency), _format_number(row.mass, 2), _format_percent(row.prefers_longer),
        abstentions or None, tokens, _format_number(row.seconds, 2), _format_number(row.tokens_per_label, 0), _format_number(row.seconds_per_label, 2),
    ]  # fmt: skip
    return [*cells, _format_number(row.cost_per_label, 6)] if with_cost else cells


def _format_number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _format_percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.1f}"
