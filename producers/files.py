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

from engine.bus.port import Bus, Outgoing
from engine.bus.read import read_messages, read_values
from engine.errors import UsageError
from engine.worker import outgoing
from producers.parse import PARSERS, Asked, BadRow, Compared, Shown
from producers.rows import Row, content_hash, rows
from schemas import ids
from schemas.codec import decode
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

SHIPPED = Path(__file__).with_name("prompts") / "shipped.jsonl"
BATCH = 500
Kind = Literal["prompts", "preferences", "demonstrations"]
DEFAULT_SOURCE: dict[str, str] = {"prompts": "prompts", "preferences": "human", "demonstrations": "human"}
MEANT: dict[str, str] = {"prompts": "prompt", "preferences": "comparison", "demonstrations": "demonstration"}


@dataclass
class Report:
    """What became of an input: rows published now, rows that the run had already, the bad ones, and those that an earlier call
    has read."""

    published: int = 0
    earlier: int = 0
    passed: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


def split_of(messages: Sequence[ChatMessage], eval_share: float) -> Split:
    """TRAIN or EVAL by a hash of the dialogue: on the same side in every file, run and epoch."""
    share = int(ids.prompt_id(messages)[:8], 16) / 2**32
    return Split.EVAL if share < eval_share else Split.TRAIN


def labelled(record: Record) -> Outgoing:
    """A person's record as a message; a header has its id, so that the next producer knows it without decoding."""
    message = outgoing(record)
    return Outgoing(message.topic, message.key, message.value, (*message.headers, ("label", record.record_id.encode())))


@dataclass(frozen=True)
class Producer:
    """Publishes what the rows of files say, for one run, as records of one kind."""

    bus: Bus
    run_id: str
    source: str = ""
    epoch: int = 0
    max_chars: int = 32_000
    eval_share: float = 0.05
    strict: bool = False
    on_bad: Callable[[int, str], None] = lambda number, why: None
    kind: Kind = "prompts"
    answer: bool = False

    def publish(self, path: str, *, first: int = 1, last: int | None = None) -> Report:
        """Publish rows `first` to `last` of a path (or "-"); goes on after what an earlier call published."""
        report = Report()
        place = None if path == "-" else self.beginning(path, content_hash(path), first, last)
        # One writer per input: two producers of the same file fence each other instead of doubling it. So it comes first: once
        # an earlier producer is fenced, where it stood is where it stays.
        writer = self.bus.writer(f"produce.{place.record_id if place else 'stdin'}")
        place = self.newest(place) if place else None
        start = place.next_line if place else first
        report.passed = start - first
        prompts, labels = self.published_before()
        batch: list[Outgoing] = []
        done, new = start - 1, 0
        try:
            for number, row in rows(path, start, last):
                parsed = self.parsed(row, number, path, report)
                done = number
                if parsed is None:
                    continue
                messages = self.messages(parsed, f"{Path(path).name}:{number}", prompts, labels)
                report.earlier += not messages
                new += bool(messages)
                batch += messages
                if len(batch) >= BATCH:
                    self.commit(writer, batch, new, place, done, report)
                    batch, new = [], 0
        finally:
            # Also when a strict run stops: what was good before the bad row is kept.
            self.commit(writer, batch, new, place, done, report)
            writer.close()
        return report

    def published_before(self) -> tuple[set[str], set[str]]:
        """The ids of this run's prompts and of its people's records on the log: each is published once in a run, whichever
        file it comes from."""
        run = ("run", self.run_id.encode())
        prompts, labels = set[str](), set[str]()
        if self.kind == "prompts" or self.answer:
            prompts = {(m.key or b"").decode() for m in read_messages(self.bus, Prompt.topic) if run in m.headers}
        if self.kind != "prompts":
            headers = (m.headers for m in read_messages(self.bus, self.kind) if run in m.headers)
            labels = {value.decode() for of_one in headers for name, value in of_one if name == "label"}
        return prompts, labels

    def parsed(self, row: Row, number: int, path: str, report: Report) -> Asked | None:
        try:
            return PARSERS[self.kind](row, source=self.source or DEFAULT_SOURCE[self.kind], max_chars=self.max_chars)
        except BadRow as error:
            report.bad.append((number, str(error)))
            self.on_bad(number, str(error))
            if self.strict:
                raise UsageError(
                    f"{path} line {number} is no {MEANT[self.kind]}",
                    str(error),
                    "mend the line, or leave --strict out to skip it",
                ) from error
            return None

    def messages(self, parsed: Asked, origin: str, prompts: set[str], labels: set[str]) -> list[Outgoing]:
        """What is new in a row, which is then remembered: a prompt, or a person's record and, with `answer`, its prompt."""
        made: list[Outgoing] = []
        about = about_row(parsed, self.run_id, epoch=self.epoch, eval_share=self.eval_share, origin=origin)
        if self.kind == "prompts" or self.answer:
            prompt = prompt_record(about)
            if prompt.prompt_id not in prompts:
                prompts.add(about["prompt_id"])
                made.append(outgoing(prompt))
        record: Preference | Demonstration | None = None
        if isinstance(parsed, Compared):
            record = comparison(parsed, about)
        elif isinstance(parsed, Shown):
            record = demonstration(parsed, about)
        if record is not None and record.record_id not in labels:
            labels.add(record.record_id)
            made.append(labelled(record))
        return made

    def beginning(self, path: str, content: str, first: int, last: int | None) -> ProducerOffset:
        """Where this run begins in this content (whatever the file is called)."""
        more = {} if self.kind == "prompts" else {"kind": self.kind, "answer": self.answer}
        configuration = ids.fingerprint(content=content, run=self.run_id, epoch=self.epoch, lines=[first, last], **more)
        return ProducerOffset(
            record_id=ids.record_id("source", [], configuration),
            run_id=self.run_id,
            stage="produce",
            name=Path(path).name,
            content_hash=content,
            next_line=first,
            published=0,
        )

    def newest(self, beginning: ProducerOffset) -> ProducerOffset:
        """Where earlier calls came to."""
        known = [decode(value, ProducerOffset) for value in read_values(self.bus, ProducerOffset.topic)]
        return max([beginning, *(s for s in known if s.record_id == beginning.record_id)], key=lambda s: s.next_line)

    def commit(
        self, writer: Any, batch: Sequence[Outgoing], new: int, place: ProducerOffset | None, number: int, report: Report
    ) -> None:
        """Records of `new` rows and the place after them, in one transaction."""
        messages = list(batch)
        report.published += new
        if place is not None and number >= place.next_line:
            published = place.published + report.published
            messages.append(outgoing(place.model_copy(update={"next_line": number + 1, "published": published})))
        if messages:
            writer.commit(messages)


def about_row(parsed: Asked, run_id: str, *, epoch: int = 0, eval_share: float, origin: str = "") -> dict[str, Any]:
    """What a prompt, a comparison and a demonstration have in common."""
    return {
        "prompt_id": ids.prompt_id(parsed.messages, epoch),
        "run_id": run_id,
        "stage": "produce",
        "messages": list(parsed.messages),
        "source": parsed.source,
        "tags": list(parsed.tags),
        "split": split_of(parsed.messages, eval_share),
        "epoch": epoch,
        "origin": origin,
    }


def prompt_record(about: dict[str, Any]) -> Prompt:
    return Prompt(record_id=ids.record_id("produce", [about["prompt_id"]], ids.fingerprint()), **about)


def comparison(parsed: Compared, about: dict[str, Any]) -> Preference:
    """A person's comparison. Which answer of chosen and rejected is `a` is drawn from the id: no place must always win."""
    configuration = ids.fingerprint(a=parsed.a, b=parsed.b, p_a=parsed.p_a, source=LabelSource.HUMAN)
    record_id = ids.record_id("produce", [about["prompt_id"]], configuration)
    a, b, p_a = parsed.a, parsed.b, parsed.p_a
    if not parsed.ordered and ids.seed(record_id) % 2:
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
        **about,
    )


def demonstration(parsed: Shown, about: dict[str, Any]) -> Demonstration:
    configuration = ids.fingerprint(completion=parsed.completion, stopped=parsed.stopped)
    record_id = ids.record_id("produce", [about["prompt_id"]], configuration)
    finish_reason = FinishReason.STOP if parsed.stopped else FinishReason.LENGTH
    return Demonstration(record_id=record_id, completion=parsed.completion, finish_reason=finish_reason, **about)


def shipped_lines() -> int:
    """How many prompts the shipped file has."""
    return sum(1 for _ in rows(str(SHIPPED)))


def summary(report: Report, path: str, kind: Kind = "prompts") -> Iterable[str]:
    """What to tell the person who typed `produce`."""
    yield (
        f"{report.published} {kind} published from {path}"
        + (f", {report.earlier} were there already" if report.earlier else "")
        + (f"; its first {report.passed} rows were read before" if report.passed else "")
    )
    if report.bad:
        yield f"{len(report.bad)} lines are no {kind} (see above); the others are published"
