"""Find near-duplicates among the prompts of the log.

Two prompts are near-duplicates if they share many words and word pairs: the Jaccard similarity of these sets is at least
`threshold`. MinHash with locality-sensitive hashing (Broder 1997; package rensa) finds the candidates, and the similarity of each
candidate is then computed exactly. So a reported match is always one, and a match can be missed. docs/sources.md has both rates.

The index is in memory. `PromptHistory` reads the topic `prompts` from its beginning, and then the new records of all producers at
each call of `refresh`. So a restarted process has the same index as before.

A prompt conflicts with an earlier one in two cases:

* DUPLICATE: the run already has a near-duplicate;
* CONTAMINATION: a near-duplicate in any run is a prompt of an evaluation suite, or is on the other side of the split, so that one of
  the two trains a policy and the other one evaluates it. All runs count, because they share the policies of the log.

The words of the system message are not compared, because many prompts can share it.
"""

from __future__ import annotations

import importlib.util
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from engine.bus.port import Bus, ConsumerRecord, Offsets, TopicPartition
from engine.bus.read import read_between
from engine.errors import UsageError
from engine.progress import WorkProgress
from schemas.codec import RecordError, decode_record
from schemas.records import ChatMessage, Prompt, Split

_NUM_PERMUTATIONS, _NUM_BANDS, _SEED = 128, 32, 1
# Chinese, Japanese and Thai have no spaces between words, so each of their letters counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Conflict(StrEnum):
    """Why a prompt may not be published. See the module docstring."""

    DUPLICATE = "duplicate"
    CONTAMINATION = "contamination"


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt of the index. `origin` names it in messages."""

    prompt_id: str
    origin: str
    split: Split
    is_of_run: bool
    epoch: int = 0


def require_minhash(install_command: str) -> None:
    """Raise UsageError if the package is missing that computes MinHash signatures."""
    if importlib.util.find_spec("rensa") is None:
        raise UsageError(
            "the check for near-duplicates needs the package rensa, which is not installed",
            "it computes the MinHash signatures of the prompts",
            install_command,
        )


def extract_features(text: str) -> list[str]:
    """Return the words of a text and its pairs of neighboring words, each once. A text without words is its own feature."""
    words = _WORD.findall(text.casefold())
    features = dict.fromkeys([*words, *(" ".join(pair) for pair in pairwise(words))])
    return list(features) or [text.strip()]


def join_messages(messages: Sequence[ChatMessage]) -> str:
    """Return the text of a dialogue that is compared with other dialogues."""
    return "\n".join(message.content for message in messages if message.role != "system")


def contaminates(split: Split, other: Split) -> bool:
    """Return whether two near-duplicates with these splits must not both be published."""
    return Split.SUITE in (split, other) or (split is Split.EVAL) != (other is Split.EVAL)


class NearDuplicateIndex:
    """An index of texts, each with the prompt that it belongs to."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHash, RMinHashLSH

        self.threshold, self.make_signature = threshold, RMinHash
        self.lsh = RMinHashLSH(threshold=threshold, num_perm=_NUM_PERMUTATIONS, num_bands=_NUM_BANDS)
        self.prompts: list[KnownPrompt] = []
        self.features: list[array[int]] = []  # hashes of the features; an array of integers needs little memory

    def add(self, text: str, prompt: KnownPrompt) -> None:
        features = extract_features(text)
        self.lsh.insert(len(self.prompts), self.compute_signature(features))
        self.prompts.append(prompt)
        self.features.append(array("q", map(hash, features)))

    def find(self, text: str) -> list[KnownPrompt]:
        """Return the prompts whose texts are near-duplicates of a text, oldest first."""
        features = extract_features(text)
        hashes = set(map(hash, features))
        candidates: Iterable[int] = self.lsh.query(self.compute_signature(features))
        return [self.prompts[number] for number in sorted(candidates) if self.is_near(hashes, self.features[number])]

    def is_near(self, hashes: set[int], others: array[int]) -> bool:
        num_shared = sum(value in hashes for value in others)
        return num_shared >= self.threshold * (len(hashes) + len(others) - num_shared)

    def compute_signature(self, features: Sequence[str]) -> Any:
        signature = self.make_signature(_NUM_PERMUTATIONS, _SEED)
        signature.update(features)
        return signature


class PromptHistory:
    """All prompts on the log, for one run: their index, and the offsets of the prompts of the run.

    The caller adds the prompts that it is about to publish with `add_prompt`; `refresh` recognizes them later by their ids.
    """

    def __init__(self, bus: Bus, run_id: str, threshold: float) -> None:
        self.bus, self.run_id = bus, run_id
        self.index = NearDuplicateIndex(threshold)
        self.next_offsets: Offsets = bus.beginning_offsets([Prompt.topic])
        self.known_keys: set[tuple[str, str]] = set()  # (run, prompt id)
        self.offsets: dict[TopicPartition, array[int]] = {}  # of the prompts of this run

    def refresh(self, progress: WorkProgress | None = None) -> None:
        """Add the prompts that were published since the last call. Skip prompts that retention or an erasure has deleted."""
        ends = self.bus.end_offsets([Prompt.topic])
        if ends == self.next_offsets:
            return
        for record in read_between(self.bus, dict(self.next_offsets), ends, skip_deleted=True):
            self.add_record(record)
            if progress:
                progress.num_done += 1
            # If the log becomes unreachable here, the next call continues after this record.
            self.next_offsets[record.topic_partition] = record.offset + 1
        self.next_offsets = ends

    def add_record(self, record: ConsumerRecord) -> None:
        try:
            prompt = decode_record(record.value or b"", Prompt)
        except RecordError:  # the prompt was erased, or the stage respond makes a dead letter of the record
            return
        if prompt.run_id == self.run_id:
            self.offsets.setdefault(record.topic_partition, array("q")).append(record.offset)
        self.add_prompt(prompt)

    def add_prompt(self, prompt: Prompt) -> None:
        """Add a prompt to the index, unless its run has it already."""
        key = (prompt.run_id, str(prompt.prompt_id))
        if key in self.known_keys:
            return
        self.known_keys.add(key)
        known = KnownPrompt(str(prompt.prompt_id), prompt.origin, prompt.split, prompt.run_id == self.run_id, prompt.epoch)
        self.index.add(join_messages(prompt.messages), known)

    def has_prompt(self, prompt_id: str) -> bool:
        """Return whether the run has a prompt."""
        return (self.run_id, prompt_id) in self.known_keys

    def add_evaluation_text(self, text: str, origin: str) -> None:
        """Add a prompt for evaluation that is not on the log, such as one of a suite that will be evaluated later."""
        self.index.add(text, KnownPrompt("", origin, Split.SUITE, is_of_run=False))

    def find_conflict(
        self, messages: Sequence[ChatMessage], split: Split, epoch: int | None = None
    ) -> tuple[Conflict, KnownPrompt] | None:
        """Return why a prompt may not be published, and the earlier prompt, or None. Contamination comes first.

        With `epoch`, prompts of other epochs are no duplicates, because an epoch repeats the prompts of the others on purpose.
        """
        matches = self.index.find(join_messages(messages))
        for match in matches:
            if contaminates(split, match.split):
                return Conflict.CONTAMINATION, match
        of_run = (match for match in matches if match.is_of_run and epoch in (None, match.epoch))
        return next(((Conflict.DUPLICATE, match) for match in of_run), None)

    def count_waiting(self, next_offsets: Offsets) -> int:
        """Return the number of prompts of the run at or after these offsets."""
        return sum(len(known) - bisect_left(known, next_offsets.get(tp, 0)) for tp, known in self.offsets.items())
