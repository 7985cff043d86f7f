"""Human preferences from JSON lines: two answers to one prompt, and which of them a person preferred.

A row has `chosen` and `rejected`: answers beside a `prompt`, or whole dialogues as in HH-RLHF (Bai et al. 2022, arXiv
2204.05862), in which "Human:" and "Assistant:" begin paragraphs. Only there do they mark a turn, and the last human turn ends
the prompt.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from schemas.records import Turn

MARKER = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t\r]*)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
GZIP = b"\x1f\x8b"


class BadPair(ValueError):
    """A row that is no decided pair, and why."""


@dataclass(frozen=True)
class ChosenPair:
    """Two answers to a prompt; a person preferred `chosen`."""

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str


def pair_lines(path: str) -> Iterator[bytes]:
    """The lines of a file (gzipped too) or of standard input ("-"), without blank ones."""
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            zipped = path != "-" and file.read(len(GZIP)) == GZIP
            if path != "-":
                file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            yield from (line for line in stream if line.strip())
    except (OSError, EOFError) as error:
        raise UsageError(
            f"cannot read {path}", str(error), "give a JSONL file, also gzipped, or - for standard input"
        ) from error


def parse_pair(line: bytes) -> ChosenPair:
    """The pair in a line; raises BadPair."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadPair("not JSON") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        raise BadPair("no chosen and rejected text in it")
    turns: tuple[Turn, ...]
    if "prompt" in row:
        turns, chosen, rejected = (turn("user", row["prompt"]),), row["chosen"], row["rejected"]
    else:
        (turns, chosen), (other, rejected) = dialogue(row["chosen"]), dialogue(row["rejected"])
        if turns != other:
            raise BadPair("the two do not answer the same prompt")
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        raise BadPair("an empty answer, or twice the same one")
    return ChosenPair(turns, chosen, rejected)


def dialogue(text: str) -> tuple[tuple[Turn, ...], str]:
    """The prompt, which ends with the last human turn, and what the assistant said after it."""
    before, *marked = MARKER.split(text)
    spoken = [(SPEAKERS[who], said.strip()) for who, said in zip(marked[::2], marked[1::2], strict=True)]
    asked = max((place for place, (role, _) in enumerate(spoken) if role == "user"), default=None)
    if before.strip() or asked is None:
        raise BadPair("no dialogue that begins with Human:")
    turns = tuple(turn(role, said) for role, said in spoken[: asked + 1] if said)
    if not turns or turns[-1].role != "user":
        raise BadPair("an empty prompt")
    return turns, "\n\n".join(said for _, said in spoken[asked + 1 :])


def turn(role: str, content: Any) -> Turn:
    if not isinstance(content, str) or any("\ud800" <= character <= "\udfff" for character in content):
        raise BadPair("a turn that is no text")
    return Turn(role=role, content=content)
