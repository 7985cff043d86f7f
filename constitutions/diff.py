"""What two constitutions, or two versions of one, differ in: principles added, removed, changed, and what the version says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from constitutions.loader import LISTS, Constitution

HEAD = ("name", "version", "description", "selection", "judge_with")
NOT_RAISED = "version not raised"


@dataclass(frozen=True)
class Change:
    """One difference. `what` is added, removed, changed, moved, or `version not raised`; `part` the list, or empty."""

    what: str
    part: str
    principle: str
    field: str
    before: str
    after: str


def diff(a: Constitution, b: Constitution) -> list[Change]:
    """Everything in which `b` differs from `a`; empty when their hashes are equal."""
    parts = ("prose",) if a.prose and b.prose else LISTS
    changes = [
        Change("changed", "", "", field, getattr(a, field), getattr(b, field))
        for field in HEAD
        if getattr(a, field) != getattr(b, field)
    ]
    for part in parts:
        changes += entries(part, *({p.id: p for p in getattr(side, part)} for side in (a, b)))
    changes += entries("examples", *({shown(e.prompt): e for e in side.examples} for side in (a, b)))
    if not_raised(a, b):
        changes.append(Change(NOT_RAISED, "", "", "version", f"{a.version} ({a.hash[:12]})", f"{b.version} ({b.hash[:12]})"))
    return changes


def not_raised(a: Constitution, b: Constitution) -> bool:
    """Whether two contents go by one name and version, so that records cannot be told apart by these."""
    return (a.name, a.version) == (b.name, b.version) and a.hash != b.hash


def entries(part: str, a: Mapping[str, BaseModel], b: Mapping[str, BaseModel]) -> Iterator[Change]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b:
            yield Change("removed", part, name, "", said(a[name]), "")
        elif name not in a:
            yield Change("added", part, name, "", "", said(b[name]))
        else:
            before, after = a[name].model_dump(mode="json"), b[name].model_dump(mode="json")
            for field in before:
                if before[field] != after[field]:
                    yield Change("changed", part, name, field, str(before[field]), str(after[field]))
    shared = [[name for name in side if name in a and name in b] for side in (a, b)]
    if shared[0] != shared[1]:
        yield Change("moved", part, "", "order", listed(shared[0]), listed(shared[1]))


def said(entry: BaseModel) -> str:
    """What a principle or an example asks."""
    texts: dict[str, Any] = entry.model_dump(mode="json")
    return " / ".join(texts[key] for key in ("text", "question", "critique", "revision") if key in texts)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}\u2026"
