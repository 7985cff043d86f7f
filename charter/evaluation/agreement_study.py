"""The agreement of judges with human labels: read pairs, label them with each preset, and format the result."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from charter.console import format_table
from charter.evaluation.agreement import AgreementMetrics, HumanPair, compute_baselines, compute_judge_agreement
from charter.evaluation.rejudge import BatchJudge, make_pair_response
from charter.models import RoleModels
from constitutions.loader import Constitution, load_constitution
from engine.budget import parse_prices
from engine.errors import PermanentRecordError, UsageError
from engine.settings import PRESETS, JudgeSettings, Settings
from producers.parse import PreferenceRow, RowError, parse_preference
from producers.rows import read_rows
from schemas.records import Preference, Response

_MAX_PAIR_CHARS = 1_000_000  # characters; a longer row is no dialogue
JUDGE_PRESETS = ("bai2022", "bai2022-cot", "lee2023", "ensemble-k", "course")


@dataclass(frozen=True)
class PairDataset:
    """The pairs of a study: as people judged them, as the judge is asked them, and where they come from."""

    human_pairs: list[HumanPair]
    judge_inputs: list[Response]
    name: str
    content_hash: str
    num_rows: int
    num_invalid: int


def read_pairs(file: str, limit: int | None, seed: int) -> PairDataset:
    """The pairs of a file, or `limit` of them; which answer is A is drawn, so that no order tells the better one."""

    found: list[PreferenceRow] = []
    digest, count = hashlib.sha256(), 0
    for _, row in read_rows(file):
        count += 1
        digest.update(row if isinstance(row, bytes) else repr(row).encode())
        try:
            found.append(parse_preference(row, source="pairs", max_chars=_MAX_PAIR_CHARS))
        except RowError:
            continue
    found = [pair for pair in found if pair.p_a != 0.5]
    if not found:
        raise UsageError(
            f"{file} has no pair that a person decided",
            f"it has {count} rows, and none with chosen and rejected answers to one prompt",
            'write each as {"prompt": "...", "chosen": "...", "rejected": "..."}, or as two dialogues',
        )
    rng = random.Random(f"pairs/{seed}")
    places = sorted(rng.sample(range(len(found)), min(limit or len(found), len(found))))
    rng.shuffle(places)  # the first of them are a sample too
    human, asked = [], []
    for place in places:
        one, swap = found[place], rng.random() < 0.5
        chosen, rejected = (one.response_a, one.response_b) if one.p_a > 0.5 else (one.response_b, one.response_a)
        a, b = (rejected, chosen) if swap else (chosen, rejected)
        human.append(HumanPair(a, b, not swap))
        asked.append(make_pair_response(one.messages, a, b, (), "pairs"))
    return PairDataset(human, asked, Path(file).name, digest.hexdigest()[:16], count, count - len(found))


class AgreementStudy:
    """Asks the judge under each preset, and tells what came of it."""

    def __init__(self, settings: Settings, origins: dict[str, str], dataset: PairDataset, seed: int) -> None:

        self.settings, self.origins, self.dataset, self.seed = settings, origins, dataset, seed
        self.constitution: Constitution = load_constitution(settings.run.constitution)
        self.rows: list[AgreementMetrics] = []
        self.labels: dict[str, list[Preference | None]] = {}
        self.model_name = ""

    def run(self, models: RoleModels, presets: Sequence[str], limit_written: int | None) -> None:

        judge, prices, counts = models.get_model("judge"), parse_prices(self.settings.budget.prices), set()
        self.model_name = f"{judge.id} ({judge.revision})"
        for preset in presets:
            settings = apply_judge_preset(self.settings, self.origins, preset)
            count = len(self.dataset.judge_inputs) if settings.judge.answer_mode == "logprobs" else limit_written
            asked, human = self.dataset.judge_inputs[:count], self.dataset.human_pairs[:count]
            counts.add(len(asked))
            _print_status(f"{preset}: {len(asked)} pairs")
            started = time.monotonic()
            labels = label_pairs(BatchJudge(settings, models), self.constitution, asked)
            seconds, price = time.monotonic() - started, prices.get(judge.id)
            cost = sum(price.compute_cost(x.prompt_tokens, x.completion_tokens) for x in labels if x) if price else None
            self.labels[preset] = labels
            self.rows.append(compute_judge_agreement(preset, human, labels, seconds, cost))
        for number in sorted(counts, reverse=True):  # beside each judge those of the same pairs
            self.rows += compute_baselines(self.dataset.human_pairs[:number], self.seed)

    def format_table(self) -> str:

        columns, rows = _format_rows(self.rows)
        return f"{format_table(columns, rows)}\n\n{self.describe()}"

    def describe(self) -> str:
        drawn, c = self.dataset, self.constitution
        bad = f"; {drawn.num_invalid} rows are no decided pairs" if drawn.num_invalid else ""
        return (
            f"judge: {self.model_name}; constitution: {c.name} {c.version} ({c.hash[:12]}); pairs: {len(drawn.human_pairs)} of the"
            f" {drawn.num_rows} rows of {drawn.name} ({drawn.content_hash}), drawn with seed {self.seed}{bad}"
        )

    def format_markdown(self) -> str:
        """The table as Markdown, with the command that made it."""
        columns, rows = _format_rows(self.rows)
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cell or '' for cell in row)} |" for row in rows]
        command = shlex.join(["charter", *sys.argv[1:]])
        return "\n".join(["# Agreement with people", "", "```", command, "```", "", *lines, "", self.describe(), ""])

    def to_json(self) -> str:
        """Everything, with each pair's label."""
        kept = (
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
            preset: [{"outcome": x.outcome.value} | {name: getattr(x, name) for name in kept} if x else None for x in of_one]
            for preset, of_one in self.labels.items()
        }
        told = {
            "about": self.describe(),
            "rows": [asdict(row) for row in self.rows],
            "a_preferred": [pair.a_preferred for pair in self.dataset.human_pairs],
            "labels": labels,
        }
        return json.dumps(told, indent=1)


def apply_judge_preset(settings: Settings, origins: dict[str, str], preset: str) -> Settings:
    """The settings with another judging recipe below what somebody set."""

    recipe = PRESETS["judge"][preset].get("judge", {})
    said = {
        key: getattr(settings.judge, key)
        for key in JudgeSettings.model_fields
        if origins[f"judge.{key}"] != "default" and not origins[f"judge.{key}"].startswith("judge.preset=")
    }
    return settings.model_copy(update={"judge": JudgeSettings(**recipe | said | {"preset": preset})})


def label_pairs(judge: BatchJudge, constitution: Constitution, pairs: Sequence[Response]) -> list[Preference | None]:
    """Each pair's label, None for one that the model cannot be asked (too long for it)."""

    labels: list[Preference | None] = []
    rows = judge.settings.models.max_batch_size
    for start in range(0, len(pairs), rows):
        batch = pairs[start : start + rows]
        try:
            labels += judge.label_pairs(constitution, batch)
        except PermanentRecordError:
            labels += [_label_pair(judge, constitution, pair) for pair in batch]
    return labels


def _label_pair(judge: BatchJudge, constitution: Constitution, pair: Response) -> Preference | None:

    try:
        return judge.label_pairs(constitution, [pair])[0]
    except PermanentRecordError:
        return None


def _print_status(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _format_rows(rows: Sequence[AgreementMetrics]) -> tuple[list[str], list[list[str | None]]]:
    """The figures for reading: shares in per cent with their intervals."""
    columns = [
        "judge", "pairs", "labelled", "accuracy % (95 %)", "Brier", "ECE", "flips %", "mass", "longer %", "abstentions",
        "tokens/pair read (cached) + written", "s/pair", "tokens/label", "s/label",
    ]  # fmt: skip
    costs = any(row.cost_per_label is not None for row in rows)
    return [*columns, *(["cost/label"] if costs else [])], [_format_row(row, costs) for row in rows]


def _format_row(row: AgreementMetrics, with_cost: bool) -> list[str | None]:
    interval = (
        "" if row.accuracy_low is None else f" ({_format_percent(row.accuracy_low)}-{_format_percent(row.accuracy_high)})"
    )
    abstained = ", ".join(f"{count} {name.lower().replace('_', ' ')}" for name, count in row.abstentions.items())
    tokens = None
    if row.tokens_read is not None:
        tokens = f"{row.tokens_read:.0f} ({row.tokens_cached:.0f}) + {row.tokens_written:.0f}"
    cells = [
        row.judge, str(row.pairs), str(row.labelled), f"{_format_percent(row.accuracy) or '-'}{interval}", _format_number(row.brier, 3),
        _format_number(row.ece, 3), _format_percent(row.swap_inconsistency), _format_number(row.mass, 2), _format_percent(row.prefers_longer),
        abstained or None, tokens, _format_number(row.seconds, 2), _format_number(row.tokens_per_label, 0), _format_number(row.seconds_per_label, 2),
    ]  # fmt: skip
    return [*cells, _format_number(row.cost_per_label, 6)] if with_cost else cells


def _format_number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _format_percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.1f}"
