"""Prompts, and people's comparisons and demonstrations, from files and standard input onto the log.

`producers.rows` says what files there can be, `producers.parse` what their rows mean. A row that means nothing is reported with
its number and reason; what was good before and after it is published, unless `strict` stops at the first.

Records and the place reached in the file go to the log in one transaction, so a producer that is killed goes on where it
stopped and publishes nothing twice. Standard input has no place to go back to: it is published at least once.

People's data goes to `preferences` and `demonstrations`, where no stage reads: its prompts are answered only when `answer` says
so. Ids follow from the content, so that a file that has grown adds what is new in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.bus.port import Bus, ProducerRecord
from engine.bus.read import read_topic, read_values
from engine.errors import UsageError
from engine.worker import to_producer_record
from producers.parse import ROW_PARSERS, DemonstrationRow, PreferenceRow, PromptRow, RowError
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
    Record,
    Split,
)

SHIPPED_PROMPTS_PATH = Path(__file__).with_name("prompts") / "shipped.jsonl"
_BATCH_SIZE = 500
InputKind = Literal["prompts", "preferences", "demonstrations"]
DEFAULT_SOURCES: dict[str, str] = {"prompts": "prompts", "preferences": "human", "demonstrations": "human"}
_ROW_NOUNS: dict[str, str] = {"prompts": "prompt", "preferences": "comparison", "demonstrations": "demonstration"}


@dataclass
class ProduceReport:
    """What became of an input: rows published now, rows that the run had already, the bad ones, and those that an earlier call
    has read."""

    num_published: int = 0
    num_duplicates: int = 0
    num_already_read: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)


def assign_split(messages: Sequence[ChatMessage], eval_fraction: float) -> Split:
    """TRAIN or EVAL by a hash of the dialogue: on the same side in every file, run and epoch."""
    share = int(ids.compute_prompt_id(messages)[:8], 16) / 2**32
    return Split.EVAL if share < eval_fraction else Split.TRAIN


def _with_label_header(record: Record) -> ProducerRecord:
    """A person's record as a message; a header has its id, so that the next producer knows it without decoding."""
    message = to_producer_record(record)
    return ProducerRecord(message.topic, message.key, message.value, (*message.headers, ("label", record.record_id.encode())))


@dataclass(frozen=True)
class FileProducer:
    """Publishes what the rows of files say, for one run, as records of one kind."""

    bus: Bus
    run_id: str
    source: str = ""
    epoch: int = 0
    max_chars: int = 32_000
    eval_fraction: float = 0.05
    strict: bool = False
    on_bad_row: Callable[[int, str], None] = lambda number, why: None
    kind: InputKind = "prompts"
    publish_prompts: bool = False

    def publish(self, path: str, *, first_row: int = 1, last_row: int | None = None) -> ProduceReport:
        """Publish rows `first` to `last` of a path (or "-"); goes on after what an earlier call published."""
        report = ProduceReport()
        place = None if path == "-" else self.make_start_offset(path, compute_content_hash(path), first_row, last_row)
        # One writer per input: two producers of the same file fence each other instead of doubling it. So it comes first: once
        # an earlier producer is fenced, where it stood is where it stays.
        writer = self.bus.open_writer(f"produce.{place.record_id if place else 'stdin'}")
        place = self.load_latest_offset(place) if place else None
        start = place.next_line if place else first_row
        report.num_already_read = start - first_row
        prompts, labels = self.read_published_ids()
        batch: list[ProducerRecord] = []
        done, new = start - 1, 0
        try:
            for number, row in read_rows(path, start, last_row):
                parsed = self.parse_row(row, number, path, report)
                done = number
                if parsed is None:
                    continue
                messages = self.make_producer_records(parsed, f"{Path(path).name}:{number}", prompts, labels)
                report.num_duplicates += not messages
                new += bool(messages)
                batch += messages
                if len(batch) >= _BATCH_SIZE:
                    self.commit(writer, batch, new, place, done, report)
                    batch, new = [], 0
        finally:
            # Also when a strict run stops: what was good before the bad row is kept.
            self.commit(writer, batch, new, place, done, report)
            writer.close()
        return report

    def read_published_ids(self) -> tuple[set[str], set[str]]:
        """The ids of this run's prompts and of its people's records on the log: each is published once in a run, whichever
        file it comes from."""
        run = ("run", self.run_id.encode())
        prompts, labels = set[str](), set[str]()
        if self.kind == "prompts" or self.publish_prompts:
            prompts = {(m.key or b"").decode() for m in read_topic(self.bus, Prompt.topic) if run in m.headers}
        if self.kind != "prompts":
            headers = (m.headers for m in read_topic(self.bus, self.kind) if run in m.headers)
            labels = {value.decode() for of_one in headers for name, value in of_one if name == "label"}
        return prompts, labels

    def parse_row(self, row: RawRow, number: int, path: str, report: ProduceReport) -> PromptRow | None:
        try:
            return ROW_PARSERS[self.kind](row, source=self.source or DEFAULT_SOURCES[self.kind], max_chars=self.max_chars)
        except RowError as error:
            report.bad_rows.append((number, str(error)))
            self.on_bad_row(number, str(error))
            if self.strict:
                raise UsageError(
                    f"{path} line {number} is no {_ROW_NOUNS[self.kind]}",
                    str(error),
                    "mend the line, or leave --strict out to skip it",
                ) from error
            return None

    def make_producer_records(
        self, parsed: PromptRow, origin: str, known_prompt_ids: set[str], known_label_ids: set[str]
    ) -> list[ProducerRecord]:
        """What is new in a row, which is then remembered: a prompt, or a person's record and, with `answer`, its prompt."""
        made: list[ProducerRecord] = []
        about = make_row_metadata(parsed, self.run_id, epoch=self.epoch, eval_fraction=self.eval_fraction, origin=origin)
        if self.kind == "prompts" or self.publish_prompts:
            prompt = make_prompt_record(about)
            if prompt.prompt_id not in known_prompt_ids:
                known_prompt_ids.add(about["prompt_id"])
                made.append(to_producer_record(prompt))
        record: Preference | Demonstration | None = None
        if isinstance(parsed, PreferenceRow):
            record = _make_preference(parsed, about)
        elif isinstance(parsed, DemonstrationRow):
            record = _make_demonstration(parsed, about)
        if record is not None and record.record_id not in known_label_ids:
            known_label_ids.add(record.record_id)
            made.append(_with_label_header(record))
        return made

    def make_start_offset(self, path: str, content: str, first_row: int, last_row: int | None) -> ProducerOffset:
        """Where this run begins in this content (whatever the file is called)."""
        more = {} if self.kind == "prompts" else {"kind": self.kind, "publish_prompts": self.publish_prompts}
        configuration = ids.compute_fingerprint(
            "source", content=content, run=self.run_id, epoch=self.epoch, rows=[first_row, last_row], **more
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
        """Where earlier calls came to."""
        known = [decode_record(value, ProducerOffset) for value in read_values(self.bus, ProducerOffset.topic)]
        return max([start_offset, *(s for s in known if s.record_id == start_offset.record_id)], key=lambda s: s.next_line)

    def commit(
        self,
        writer: Any,
        batch: Sequence[ProducerRecord],
        num_new_rows: int,
        offset: ProducerOffset | None,
        row_number: int,
        report: ProduceReport,
    ) -> None:
        """Records of `new` rows and the place after them, in one transaction."""
        messages = list(batch)
        report.num_published += num_new_rows
        if offset is not None and row_number >= offset.next_line:
            published = offset.published + report.num_published
            messages.append(to_producer_record(offset.model_copy(update={"next_line": row_number + 1, "published": published})))
        if messages:
            writer.commit(messages)


def make_row_metadata(
    parsed: PromptRow, run_id: str, *, epoch: int = 0, eval_fraction: float, origin: str = ""
) -> dict[str, Any]:
    """What a prompt, a comparison and a demonstration have in common."""
    return {
        "prompt_id": ids.compute_prompt_id(parsed.messages, epoch),
        "run_id": run_id,
        "stage": "produce",
        "messages": list(parsed.messages),
        "source": parsed.source,
        "tags": list(parsed.tags),
        "split": assign_split(parsed.messages, eval_fraction),
        "epoch": epoch,
        "origin": origin,
    }


def make_prompt_record(metadata: dict[str, Any]) -> Prompt:
    return Prompt(
        record_id=ids.compute_record_id("produce", [metadata["prompt_id"]], ids.compute_fingerprint("prompt")), **metadata
    )


def _make_preference(parsed: PreferenceRow, metadata: dict[str, Any]) -> Preference:
    """A person's comparison. Which answer of chosen and rejected is `a` is drawn from the id: no place must always win."""
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
    """How many prompts the shipped file has."""
    return sum(1 for _ in read_rows(str(SHIPPED_PROMPTS_PATH)))


def format_report(report: ProduceReport, path: str, kind: InputKind = "prompts") -> Iterable[str]:
    """What to tell the person who typed `produce`."""
    yield (
        f"{report.num_published} {kind} published from {path}"
        + (f", {report.num_duplicates} were there already" if report.num_duplicates else "")
        + (f"; its first {report.num_already_read} rows were read before" if report.num_already_read else "")
    )
    if report.bad_rows:
        yield f"{len(report.bad_rows)} lines are no {kind} (see above); the others are published"
