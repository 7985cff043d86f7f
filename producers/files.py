"""Publish prompts, human comparisons and human demonstrations from files and standard input to the log.

`producers.rows` reads the file formats, and `producers.parse` parses the rows. An invalid row is reported with its number and
the reason, and all other rows are published. With `strict`, the producer stops at the first invalid row. A column that has no
effect is reported at the first row that has it.

The producer publishes the records and its offset in the file in one transaction. If it is killed and started again, it
continues after the last published row and publishes no record twice. It cannot resume standard input, so it publishes the rows
of standard input at least once.

Human data goes to the topics `preferences` and `demonstrations`, which no stage consumes. The policy responds to the prompts of
human data only with `publish_prompts` (`--publish-prompts`). Ids are computed from the content. If rows were added to a file,
only the new rows are published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.bus.port import Bus, ProducerRecord
from engine.bus.read import read_between, read_topic, read_values
from engine.eligibility import find_pair_problem, find_response_problem
from engine.erasures import ErasedPrompts
from engine.errors import UsageError, WriterFenced
from engine.progress import WorkProgress
from engine.run_starts import StartPositions, ensure_run_start
from engine.text import format_count
from engine.worker import to_producer_record
from producers.near_duplicates import Conflict, KnownPrompt, PromptHistory
from producers.parse import NO_COLUMNS, ROW_PARSERS, DemonstrationRow, PreferenceRow, PromptRow, RowError
from producers.rows import RawRow, compute_content_hash, read_rows
from schemas import ids
from schemas.codec import decode_record
from schemas.records import (
    ChatMessage,
    Demonstration,
    FinishReason,
    LabelSource,
    Outcome,
    Preference,
    ProducerOffset,
    Prompt,
    Purpose,
    Record,
    Split,
)

SHIPPED_PROMPTS_PATH = Path(__file__).with_name("prompts") / "shipped.jsonl"
DEMONSTRATIONS_PATH = Path(__file__).with_name("prompts") / "demonstrations.jsonl"
_BATCH_SIZE = 500
InputKind = Literal["prompts", "preferences", "demonstrations"]
DEFAULT_SOURCES: dict[str, str] = {"prompts": "prompts", "preferences": "human", "demonstrations": "human"}
_ROW_NOUNS: dict[str, str] = {"prompts": "prompt", "preferences": "comparison", "demonstrations": "demonstration"}


@dataclass
class ProduceReport:
    """The result for one input.

    `num_duplicates` is the number of rows that the run already has. `conflicts` counts the rows that were dropped because they are
    near an earlier prompt, by reason. `num_erased` is the number of rows whose prompt was erased.
    `num_already_read` is the number of rows that earlier calls read, and they published `num_earlier_published` of them.
    `bad_rows` contains the number of each invalid row and the reason. `unread_columns` counts, for each column without effect,
    the rows that have it.
    """

    num_published: int = 0
    num_duplicates: int = 0
    conflicts: Counter[Conflict] = field(default_factory=Counter)
    num_erased: int = 0
    num_already_read: int = 0
    num_earlier_published: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    unread_columns: Counter[str] = field(default_factory=Counter)


def assign_split(messages: Sequence[ChatMessage], eval_fraction: float) -> Split:
    """Return TRAIN or EVAL, depending on a hash of the dialogue. The split is the same in every file, run and epoch."""
    position = int(ids.compute_prompt_id(messages)[:8], 16) / 2**32  # uniform in [0, 1)
    return Split.EVAL if position < eval_fraction else Split.TRAIN


def assign_purpose(messages: Sequence[ChatMessage], rl_fraction: float) -> Purpose:
    """Return RL or REWARD, depending on a hash of the dialogue. It is the same in every file, run and epoch.

    The hash is another one than that of `assign_split`. If `rl_fraction` is 0, return ANY: prompts are not divided.
    """
    if not rl_fraction:
        return Purpose.ANY
    position = int(ids.compute_id("purpose", ids.compute_prompt_id(messages))[:8], 16) / 2**32  # uniform in [0, 1)
    return Purpose.RL if position < rl_fraction else Purpose.REWARD


def _with_label_header(record: Record) -> ProducerRecord:
    """Return a human record with its id in a header, so that a later producer can read the id without decoding the record."""
    plain = to_producer_record(record)
    return ProducerRecord(plain.topic, plain.key, plain.value, (*plain.headers, ("label", record.record_id.encode())))


@dataclass(frozen=True)
class FileProducer:
    """A producer that publishes the rows of files as records of one kind for one run.

    `columns` maps names of Charter's columns to names in the file (see `producers.parse.parse_prompt`). `history` are the prompts on
    the log; if it is given, rows that are near one of them or near an earlier row are not published.
    """

    bus: Bus
    run_id: str
    source: str = ""
    epoch: int = 0
    max_chars: int = 32_000
    eval_fraction: float = 0.05
    rl_fraction: float = 0.0
    strict: bool = False
    on_bad_row: Callable[[int, str], None] = lambda row_number, reason: None
    on_unread_columns: Callable[[int, Sequence[str]], None] = lambda row_number, names: None
    kind: InputKind = "prompts"
    publish_prompts: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    progress: WorkProgress = field(default_factory=WorkProgress)
    history: PromptHistory | None = None
    on_conflict: Callable[[int, Conflict, KnownPrompt], None] = lambda row_number, conflict, known: None

    def publish(self, path: str, *, first_row: int = 1, last_row: int | None = None) -> ProduceReport:
        """Publish rows `first_row` to `last_row` of a path or of standard input ("-"). Skip rows that an earlier call read."""
        report = ProduceReport()
        self.progress.start_step("reading the file to compute its hash")
        offset = None if path == "-" else self.make_start_offset(path, compute_content_hash(path), first_row, last_row)
        # Each input has one writer. A second producer of the same file fences the first one, so no row is published twice. Open
        # the writer before the offset is read. This fences an earlier producer, so that it cannot change the offset any more.
        run_start = ensure_run_start(self.bus, self.run_id)
        name = f"produce.{offset.record_id if offset else f'{self.run_id}.stdin'}"
        writer = self.bus.open_writer(name, topics=[Prompt.topic, self.kind, ProducerOffset.topic])
        offset = self.load_latest_offset(offset) if offset else None
        start = offset.next_line if offset else first_row
        report.num_already_read = start - first_row
        report.num_earlier_published = offset.published if offset else 0
        self.progress.start_step("reading the ids of the records that the run already has")
        prompt_ids, label_ids = self.read_published_ids(run_start)
        erased_prompt_ids = ErasedPrompts(self.bus).prompt_ids
        if self.history:
            self.progress.start_step("reading the prompts on the log")
            self.history.refresh(self.progress)
        self.progress.start_step("publishing")
        batch: list[ProducerRecord] = []
        last_read, num_new_rows = start - 1, 0
        try:
            for number, row in read_rows(path, start, last_row, columns=self.columns, progress=self.progress):
                parsed = self.parse_row(row, number, path, report)
                last_read = number
                if parsed is None:
                    continue
                # An erased text must not come back under the id of another epoch. Every erasure includes epoch 0.
                if ids.compute_prompt_id(parsed.messages) in erased_prompt_ids:
                    report.num_erased += 1
                    continue
                origin = f"{Path(path).name}:{number}"
                if self.history and self.drops_row(self.history, parsed, number, origin, prompt_ids, report):
                    continue
                records = self.make_producer_records(parsed, origin, prompt_ids, label_ids)
                report.num_duplicates += not records
                num_new_rows += bool(records)
                batch += [run_start.assign_partition(record) for record in records]
                if len(batch) >= _BATCH_SIZE:
                    self.commit(writer, batch, num_new_rows, offset, last_read, report)
                    batch, num_new_rows = [], 0
            self.commit(writer, batch, num_new_rows, offset, last_read, report)
        except WriterFenced as error:
            raise WriterFenced(
                f"another producer of {path} has started in run {self.run_id}",
                "each input has one producer at a time; what this one has published is kept",
                "wait until the other one ends, then type the same command: it publishes only what is missing",
            ) from error
        except UsageError as error:
            # If `strict` stops at an invalid row, or a file of a folder cannot be read, the valid rows before are still published.
            self.commit(writer, batch, num_new_rows, offset, last_read, report)
            if not report.num_published:
                raise
            why = f"{error.why}; published before this: {format_count(report.num_published, self.kind)}"
            raise UsageError(error.what, why, error.fix) from error
        finally:
            writer.close()
        return report

    def read_published_ids(self, run_start: StartPositions) -> tuple[set[str], set[str]]:
        """Return two sets of ids from the log: the prompts of this run and the human records of this run.

        A prompt or a human record is published only once per run, even if several files contain it. Two producers that run at
        the same time may both publish it. Then the stages and the database use only the first record.
        """
        run_header = ("run", self.run_id.encode())
        prompt_ids, label_ids = set[str](), set[str]()
        if self.kind == "prompts" or self.publish_prompts:
            starts, ends = run_start.get_offsets(self.bus, [Prompt.topic]), self.bus.end_offsets([Prompt.topic])
            records = read_between(self.bus, starts, ends, skip_deleted=True)
            prompt_ids = {(record.key or b"").decode() for record in records if run_header in record.headers}
        if self.kind != "prompts":
            for record in read_topic(self.bus, self.kind):
                if run_header in record.headers:
                    label_ids |= {value.decode() for name, value in record.headers if name == "label"}
        return prompt_ids, label_ids

    def parse_row(self, row: RawRow, number: int, path: str, report: ProduceReport) -> PromptRow | None:
        """Parse a row. If the row is invalid, report it and return None, or raise UsageError if `strict` is true."""
        try:
            parsed = parse_row(row, self.kind, source=self.source, max_chars=self.max_chars, columns=self.columns)
        except RowError as error:
            report.bad_rows.append((number, str(error)))
            self.on_bad_row(number, str(error))
            if self.strict:
                raise UsageError(
                    f"{path} row {number} is not a {_ROW_NOUNS[self.kind]}",
                    str(error),
                    "fix the row, or omit --strict to skip it",
                ) from error
            return None
        if new_names := [name for name in parsed.unread_columns if name not in report.unread_columns]:
            self.on_unread_columns(number, new_names)
        report.unread_columns.update(parsed.unread_columns)
        return parsed

    def drops_row(
        self,
        history: PromptHistory,
        parsed: PromptRow,
        number: int,
        origin: str,
        known_prompt_ids: set[str],
        report: ProduceReport,
    ) -> bool:
        """Return whether a prompt is dropped because it is near an earlier one. Otherwise add it to the history.

        A prompt that the run already has is no near-duplicate: it is a duplicate, as without the check.
        """
        prompt = make_prompt_record(self.make_metadata(parsed, origin))
        if prompt.prompt_id in known_prompt_ids:
            return False
        if found := history.find_conflict(parsed.messages, prompt.split, self.epoch):
            report.conflicts[found[0]] += 1
            self.on_conflict(number, *found)
            return True
        history.add_prompt(prompt)
        return False

    def make_metadata(self, parsed: PromptRow, origin: str) -> dict[str, Any]:
        return make_row_metadata(
            parsed,
            self.run_id,
            epoch=self.epoch,
            eval_fraction=self.eval_fraction,
            rl_fraction=self.rl_fraction,
            origin=origin,
        )

    def make_producer_records(
        self, parsed: PromptRow, origin: str, known_prompt_ids: set[str], known_label_ids: set[str]
    ) -> list[ProducerRecord]:
        """Return the new records of a row, and add their ids to the known ids.

        A row becomes a prompt or a human record. With `publish_prompts`, a human record also has a prompt.
        """
        new_records: list[ProducerRecord] = []
        metadata = self.make_metadata(parsed, origin)
        if self.kind == "prompts" or self.publish_prompts:
            prompt = make_prompt_record(metadata)
            if prompt.prompt_id not in known_prompt_ids:
                known_prompt_ids.add(metadata["prompt_id"])
                new_records.append(to_producer_record(prompt))
        record = make_human_record(parsed, metadata)
        if record is not None and record.record_id not in known_label_ids:
            known_label_ids.add(record.record_id)
            new_records.append(_with_label_header(record))
        return new_records

    def make_start_offset(self, path: str, content: str, first_row: int, last_row: int | None) -> ProducerOffset:
        """Return the initial offset of this run in a file. Its id depends on the file's content, but not on the file name."""
        kind_keys = {} if self.kind == "prompts" else {"kind": self.kind, "publish_prompts": self.publish_prompts}
        # Other columns of a file, or a larger limit, are other rows. By default, the id is the same as before these existed.
        options: dict[str, Any] = dict(self.columns)
        if self.max_chars != FileProducer.max_chars:
            options["max_chars"] = self.max_chars
        if self.history:  # without the check, or with another threshold, rows that this call drops can still be published
            options["duplicate_threshold"] = self.history.index.threshold
        rows = [first_row, last_row, *([options] if options else [])]
        configuration = ids.compute_fingerprint(
            "source", content=content, run=self.run_id, epoch=self.epoch, rows=rows, **kind_keys
        )
        return ProducerOffset(
            record_id=ids.compute_record_id("source", [], configuration),
            run_id=self.run_id,
            stage="produce",
            name=Path(path).name,
            content_hash=content,
            next_line=first_row,
            published=0,
        )

    def load_latest_offset(self, start_offset: ProducerOffset) -> ProducerOffset:
        """Return the latest offset that an earlier call published, or `start_offset` if there was no earlier call."""
        offsets = [decode_record(value, ProducerOffset) for value in read_values(self.bus, ProducerOffset.topic)]
        offsets = [offset for offset in offsets if offset.record_id == start_offset.record_id]
        return max([start_offset, *offsets], key=lambda offset: offset.next_line)

    def commit(
        self,
        writer: Any,
        batch: Sequence[ProducerRecord],
        num_new_rows: int,
        offset: ProducerOffset | None,
        row_number: int,
        report: ProduceReport,
    ) -> None:
        """Publish the records of `num_new_rows` rows and the offset after row `row_number`, in one transaction."""
        records = list(batch)
        report.num_published += num_new_rows
        if offset is not None and row_number >= offset.next_line:
            published = offset.published + report.num_published
            records.append(to_producer_record(offset.model_copy(update={"next_line": row_number + 1, "published": published})))
        if records:
            writer.commit(records)


def parse_row(
    row: RawRow, kind: InputKind, *, source: str, max_chars: int, columns: Mapping[str, str] = NO_COLUMNS
) -> PromptRow:
    """Parse a row of one kind. An empty `source` is the default source of the kind.

    Raise RowError if the row is invalid, or if its responses may not be compared or trained on (engine/eligibility.py).
    """
    parsed = ROW_PARSERS[kind](row, source=source or DEFAULT_SOURCES[kind], max_chars=max_chars, columns=columns)
    problem = None
    if isinstance(parsed, PreferenceRow):
        names = ("response_a", "response_b") if parsed.has_fixed_order else ("chosen", "rejected")
        problem = find_pair_problem(parsed.response_a, parsed.response_b, names=names)
    if isinstance(parsed, DemonstrationRow):
        problem = find_response_problem(parsed.completion, FinishReason.UNKNOWN, "the completion")
    if problem:
        raise RowError(problem[1])
    return parsed


def make_row_metadata(
    parsed: PromptRow, run_id: str, *, epoch: int = 0, eval_fraction: float, rl_fraction: float = 0.0, origin: str = ""
) -> dict[str, Any]:
    """Return the fields that the records of prompts, comparisons and demonstrations share.

    The labels of people train the reward model, so a prompt with such a label never has the purpose RL.
    """
    purpose = assign_purpose(parsed.messages, rl_fraction)
    if purpose is Purpose.RL and isinstance(parsed, PreferenceRow):
        purpose = Purpose.REWARD
    return {
        "prompt_id": ids.compute_prompt_id(parsed.messages, epoch),
        "run_id": run_id,
        "stage": "produce",
        "messages": list(parsed.messages),
        "source": parsed.source,
        "tags": list(parsed.tags),
        "split": assign_split(parsed.messages, eval_fraction),
        "epoch": epoch,
        "purpose": purpose,
        "origin": origin,
    }


def make_prompt_record(metadata: dict[str, Any]) -> Prompt:
    """Return the record of a prompt from the fields of `make_row_metadata`."""
    return Prompt(
        record_id=ids.compute_record_id("produce", [metadata["prompt_id"]], ids.compute_fingerprint("prompt")), **metadata
    )


def make_human_record(parsed: PromptRow, metadata: dict[str, Any]) -> Preference | Demonstration | None:
    """Return the human comparison or the human demonstration of a row, or None if the row is only a prompt."""
    if isinstance(parsed, PreferenceRow):
        return _make_preference(parsed, metadata)
    return _make_demonstration(parsed, metadata) if isinstance(parsed, DemonstrationRow) else None


def _make_preference(parsed: PreferenceRow, metadata: dict[str, Any]) -> Preference:
    """Return the record of a human comparison.

    The record id decides whether the chosen or the rejected response becomes A, so that A is not always the better response.
    """
    configuration = ids.compute_fingerprint(
        "human_preference", response_a=parsed.response_a, response_b=parsed.response_b, p_a=parsed.p_a, source=LabelSource.HUMAN
    )
    record_id = ids.compute_record_id("produce", [metadata["prompt_id"]], configuration)
    a, b, p_a = parsed.response_a, parsed.response_b, parsed.p_a
    if not parsed.has_fixed_order and ids.compute_seed(record_id) % 2:
        a, b, p_a = b, a, 1 - p_a
    return Preference(
        record_id=record_id,
        pairing="human",
        response_a=a,
        response_b=b,
        finish_reason_a=FinishReason.STOP,
        finish_reason_b=FinishReason.STOP,
        p_a=p_a,
        outcome=Outcome.OK,
        label_source=LabelSource.HUMAN,
        **metadata,
    )


def _make_demonstration(parsed: DemonstrationRow, metadata: dict[str, Any]) -> Demonstration:
    configuration = ids.compute_fingerprint("demonstration", completion=parsed.completion, is_complete=parsed.is_complete)
    record_id = ids.compute_record_id("produce", [metadata["prompt_id"]], configuration)
    finish_reason = FinishReason.STOP if parsed.is_complete else FinishReason.LENGTH
    return Demonstration(record_id=record_id, completion=parsed.completion, finish_reason=finish_reason, **metadata)


def count_shipped_prompts() -> int:
    """Return the number of prompts in the shipped file."""
    return sum(1 for _ in read_rows(str(SHIPPED_PROMPTS_PATH)))


def format_conflicts(conflict: Conflict, count: int) -> str:
    """Return the number of rows that were dropped for one reason."""
    if conflict is Conflict.DUPLICATE:
        return f"{format_count(count, 'near-duplicates')} dropped"
    return f"{count:,} dropped because they are near a prompt of an evaluation suite or of the other split"


def format_report(report: ProduceReport, path: str, kind: InputKind = "prompts") -> Iterable[str]:
    """Return the lines that `charter produce` prints about an input."""
    yield (
        f"{format_count(report.num_published, kind)} published from {path}"
        + (f", {format_count(report.num_duplicates, 'duplicates')} skipped" if report.num_duplicates else "")
        + "".join(f", {format_conflicts(conflict, count)}" for conflict, count in sorted(report.conflicts.items()))
        + (f", {report.num_erased} skipped because their prompts were erased" if report.num_erased else "")
        + (
            f"; its first {format_count(report.num_already_read, 'rows', 'were')} read by an earlier call, which published {report.num_earlier_published:,}"
            if report.num_already_read
            else ""
        )
    )
    if report.bad_rows:
        rest = "; the others are published" if report.num_published else ""
        yield f"{format_count(len(report.bad_rows), 'rows', 'are')} invalid (see above){rest}"
    if report.unread_columns:
        names = ", ".join(f"{name} ({format_count(count, 'rows')})" for name, count in sorted(report.unread_columns.items()))
        yield f"columns without effect: {names}"
