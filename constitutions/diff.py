"""Find the differences between two constitutions or two versions of a constitution.

A difference is a changed field, or a principle that was added, removed, changed or moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from constitutions.loader import PRINCIPLE_LISTS, Constitution

_METADATA_FIELDS = ("name", "version", "description", "selection", "judge_with")
VERSION_NOT_RAISED = "version not raised"


@dataclass(frozen=True)
class ConstitutionChange:
    """One difference. `what` is added, removed, changed, moved or VERSION_NOT_RAISED.

    `part` is the list that contains the principle. For a field of the constitution itself, `part` is empty.
    """

    what: str
    part: str
    principle: str
    field: str
    before: str
    after: str


def compare_constitutions(a: Constitution, b: Constitution) -> list[ConstitutionChange]:
    """Return all differences from `a` to `b`. The list is empty if the hashes are equal."""
    parts = ("prose",) if a.prose and b.prose else PRINCIPLE_LISTS
    changes = [
        ConstitutionChange("changed", "", "", field, getattr(a, field), getattr(b, field))
        for field in _METADATA_FIELDS
        if getattr(a, field) != getattr(b, field)
    ]
    for part in parts:
        changes += _compare_entries(part, *({p.id: p for p in getattr(side, part)} for side in (a, b)))
    changes += _compare_entries("examples", *({_shorten(e.prompt): e for e in side.examples} for side in (a, b)))
    if _has_reused_version(a, b):
        changes.append(
            ConstitutionChange(
                VERSION_NOT_RAISED, "", "", "version", f"{a.version} ({a.hash[:12]})", f"{b.version} ({b.hash[:12]})"
            )
        )
    return changes


def _has_reused_version(a: Constitution, b: Constitution) -> bool:
    """Return whether two constitutions have the same name and version but different contents."""
    return (a.name, a.version) == (b.name, b.version) and a.hash != b.hash


def _compare_entries(part: str, a: Mapping[str, BaseModel], b: Mapping[str, BaseModel]) -> Iterator[ConstitutionChange]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b:
            yield ConstitutionChange("removed", part, name, "", _format_entry(a[name]), "")
        elif name not in a:
            yield ConstitutionChange("added", part, name, "", "", _format_entry(b[name]))
        else:
            before, after = a[name].model_dump(mode="json"), b[name].model_dump(mode="json")
            for field in before:
                if before[field] != after[field]:
                    yield ConstitutionChange("changed", part, name, field, str(before[field]), str(after[field]))
    shared = [[name for name in side if name in a and name in b] for side in (a, b)]
    if shared[0] != shared[1]:
        yield ConstitutionChange("moved", part, "", "order", _join_names(shared[0]), _join_names(shared[1]))


def _format_entry(entry: BaseModel) -> str:
    """Return the prompts of a principle, or the critique and revision of an example, separated by slashes."""
    texts: dict[str, Any] = entry.model_dump(mode="json")
    return " / ".join(
        texts[key]
        for key in ("text", "judge_prompt", "critique_prompt", "revision_prompt", "critique", "revision")
        if key in texts
    )


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}\u2026"
