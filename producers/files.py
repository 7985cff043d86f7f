"""Prompts from JSONL files and standard input onto the `prompts` topic.

A line is a JSON string, or an object with `prompt` (a string) or `turns`/`messages` (a list of {role, content} that ends with
the user), and optionally `source` and `tags`. A line that is none of these is reported with its number and reason; what was
good before and after it is published, unless `strict` stops at the first.

Prompts and the place reached in the file go to the log in one transaction, so a producer that is killed goes on where it
stopped and publishes nothing twice. Standard input has no place to go back to: it is published at least once.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bus.port import Bus
from engine.bus.read import read_messages, read_values
from engine.errors import UsageError
from engine.worker import outgoing
from schemas import ids
from schemas.codec import decode
from schemas.records import Prompt, Source, Split, Turn

SHIPPED = Path(__file__).with_name("prompts") / "shipped.jsonl"
BATCH = 500
ROLES = ("system", "user", "assistant")
NOT_UTF8 = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class BadLine(ValueError):
    """A line that is no prompt, and why."""


@dataclass(frozen=True)
class Parsed:
    """What one line says."""

    turns: tuple[Turn, ...]
    source: str
    tags: tuple[str, ...]


@dataclass
class Report:
    """What became of an input: prompts published now, prompts that the run had already, and the bad lines."""

    published: int = 0
    earlier: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


def parse_line(line: bytes, *, source: str, max_chars: int) -> Parsed:
    """The prompt in a line; raises BadLine."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadLine("not a prompt: nested too deeply") from error
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise BadLine("neither a JSON string nor an object")
    turns = turns_of(value)
    length = sum(len(turn.content) for turn in turns)
    if length > max_chars:
        raise BadLine(f"{length} characters, more than prompts.max_chars = {max_chars}")
    tags = value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BadLine('"tags" is not a list of strings')
    named = value.get("source", source)
    if not isinstance(named, str) or not named:
        raise BadLine('"source" is not a string')
    return Parsed(turns, named, tuple(tags))


def turns_of(value: dict[str, Any]) -> tuple[Turn, ...]:
    """The dialogue in an object: `turns`, `messages` or one `prompt`."""
    listed = value.get("turns", value.get("messages"))
    if listed is None:
        if "prompt" not in value:
            raise BadLine('no "prompt", "turns" or "messages" in it')
        listed = [{"role": "user", "content": value["prompt"]}]
    if not isinstance(listed, list) or not listed:
        raise BadLine("the dialogue is not a list of turns")
    turns = tuple(turn_of(turn) for turn in listed)
    if turns[-1].role != "user":
        raise BadLine("the last turn is not the user's")
    return turns


def turn_of(value: Any) -> Turn:
    if not isinstance(value, dict) or value.get("role") not in ROLES or not isinstance(value.get("content"), str):
        raise BadLine(f"a turn needs a role ({', '.join(ROLES)}) and a content")
    content = value["content"]
    if not content.strip():
        raise BadLine("an empty prompt")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise BadLine("a lone surrogate, which no text can hold")
    return Turn(role=value["role"], content=content)


def split_of(turns: Sequence[Turn], eval_share: float) -> Split:
    """TRAIN or EVAL by a hash of the dialogue: on the same side in every file, run and epoch."""
    share = int(ids.prompt_id(turns)[:8], 16) / 2**32
    return Split.EVAL if share < eval_share else Split.TRAIN


def prompt_record(parsed: Parsed, *, run_id: str, epoch: int, eval_share: float, origin: str) -> Prompt:
    prompt = ids.prompt_id(parsed.turns, epoch)
    return Prompt(
        record_id=ids.record_id("produce", [prompt], ids.fingerprint()),
        prompt_id=prompt,
        run_id=run_id,
        stage="produce",
        turns=list(parsed.turns),
        source=parsed.source,
        tags=list(parsed.tags),
        split=split_of(parsed.turns, eval_share),
        epoch=epoch,
        origin=origin,
    )


def numbered_lines(path: str, first: int, last: int | None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a file or of standard input ("-"), without blank lines."""
    with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if last is not None and number > last:
                return
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if number >= first and text.strip():
                yield number, text


def check_file(path: str) -> str:
    """The content hash of a readable file that may be UTF-8; raises UsageError."""
    try:
        with Path(path).open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}", error.strerror or str(error), "give a JSONL file, or - for standard input"
        ) from error
    if start in NOT_UTF8:
        kind = NOT_UTF8[start]
        raise UsageError(
            f"{path} is {kind}, not UTF-8",
            "JSON lines are UTF-8",
            f"type: iconv -f {kind} -t UTF-8 {path} > prompts.jsonl",
        )
    return digest


@dataclass(frozen=True)
class Producer:
    """Publishes prompts of one run."""

    bus: Bus
    run_id: str
    source: str = "prompts"
    epoch: int = 0
    max_chars: int = 32_000
    eval_share: float = 0.05
    strict: bool = False
    on_bad: Callable[[int, str], None] = lambda number, why: None

    def publish(self, path: str, *, first: int = 1, last: int | None = None) -> Report:
        """Publish lines `first` to `last` of a file (or "-"); goes on after what an earlier call published."""
        report = Report()
        place = None if path == "-" else self.beginning(path, check_file(path), first, last)
        # One writer per input: two producers of the same file fence each other instead of doubling it. So it comes first: once
        # an earlier producer is fenced, where it stood is where it stays.
        writer = self.bus.writer(f"produce.{place.record_id if place else 'stdin'}")
        place = self.newest(place) if place else None
        start = place.next_line if place else first
        seen = self.published_before()
        batch: list[Prompt] = []
        done = start - 1
        try:
            for number, line in numbered_lines(path, start, last):
                prompt = self.prompt(line, number, path, report)
                done = number
                if prompt is not None and prompt.prompt_id in seen:
                    report.earlier += 1
                elif prompt is not None:
                    seen.add(prompt.key.decode())
                    batch.append(prompt)
                if len(batch) >= BATCH:
                    self.commit(writer, batch, place, done, report)
                    batch = []
        finally:
            # Also when a strict run stops: what was good before the bad line is kept.
            self.commit(writer, batch, place, done, report)
            writer.close()
        return report

    def published_before(self) -> set[str]:
        """The ids of this run's prompts on the topic: a prompt is asked once in a run, whichever file it comes from."""
        run = ("run", self.run_id.encode())
        return {(m.key or b"").decode() for m in read_messages(self.bus, Prompt.topic) if run in m.headers}

    def prompt(self, line: bytes, number: int, path: str, report: Report) -> Prompt | None:
        try:
            parsed = parse_line(line, source=self.source, max_chars=self.max_chars)
        except BadLine as error:
            report.bad.append((number, str(error)))
            self.on_bad(number, str(error))
            if self.strict:
                raise UsageError(
                    f"{path} line {number} is no prompt", str(error), "mend the line, or leave --strict out to skip it"
                ) from error
            return None
        return prompt_record(
            parsed,
            run_id=self.run_id,
            epoch=self.epoch,
            eval_share=self.eval_share,
            origin=f"{Path(path).name}:{number}",
        )

    def beginning(self, path: str, content_hash: str, first: int, last: int | None) -> Source:
        """Where this run begins in this content (whatever the file is called)."""
        configuration = ids.fingerprint(content=content_hash, run=self.run_id, epoch=self.epoch, lines=[first, last])
        record_id = ids.record_id("source", [], configuration)
        return Source(
            record_id=record_id,
            run_id=self.run_id,
            stage="produce",
            name=Path(path).name,
            content_hash=content_hash,
            next_line=first,
            published=0,
        )

    def newest(self, beginning: Source) -> Source:
        """Where earlier calls came to."""
        known = [decode(value, Source) for value in read_values(self.bus, Source.topic)]
        return max([beginning, *(s for s in known if s.record_id == beginning.record_id)], key=lambda s: s.next_line)

    def commit(self, writer: Any, batch: Sequence[Prompt], place: Source | None, number: int, report: Report) -> None:
        """Prompts and the place after them, in one transaction."""
        records: list[Prompt | Source] = list(batch)
        report.published += len(batch)
        if place is not None and number >= place.next_line:
            published = place.published + report.published
            records.append(place.model_copy(update={"next_line": number + 1, "published": published}))
        if records:
            writer.commit([outgoing(record) for record in records])


def shipped_lines() -> int:
    """How many prompts the shipped file has."""
    return sum(1 for _ in numbered_lines(str(SHIPPED), 1, None))


def summary(report: Report, path: str) -> Iterable[str]:
    """What to tell the person who typed `produce`."""
    yield f"{report.published} prompts published from {path}" + (
        f", {report.earlier} were there already" if report.earlier else ""
    )
    if report.bad:
        yield f"{len(report.bad)} lines are no prompts (see above); the others are published"
