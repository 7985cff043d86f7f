"""Keep the responses of a record whose other requests failed, so that a second attempt does not pay for them again.

The requests of one record are a group. A group that has failed gives each kept response out once, for an identical request. The
usage of a response counts when the record that uses it is finished. The usage of a response that is never used is returned to the
caller, which counts it elsewhere.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

from engine.models.interface import NO_USAGE, Usage

_MAX_GROUPS = 512  # more than all batches in flight have

_PaidResponse = tuple[dict[str, Any], Usage]
_ResponsesByRequest = defaultdict[str, list[_PaidResponse]]


def _sum_usage(responses: _ResponsesByRequest) -> Usage:
    return sum((usage for paid in responses.values() for _, usage in paid), NO_USAGE)


@dataclass
class _Group:
    """`received` are the responses of the current attempt, `kept` those of a failed attempt that are not used yet."""

    received: _ResponsesByRequest = field(default_factory=lambda: defaultdict(list))
    kept: _ResponsesByRequest = field(default_factory=lambda: defaultdict(list))
    has_failed: bool = False

    @property
    def unused_usage(self) -> Usage:
        return _sum_usage(self.kept) + (_sum_usage(self.received) if self.has_failed else NO_USAGE)


class PaidResponses:
    """The responses of recent groups. The class is thread-safe. A request is identified by the hash of its body."""

    def __init__(self) -> None:
        self.groups: OrderedDict[str, _Group] = OrderedDict()
        self.lock = threading.Lock()

    def begin(self, names: set[str]) -> Usage:
        """Begin the next requests of these groups. Return the usage of the responses of old groups that are dropped unused."""
        with self.lock:
            for name in names:
                group = self.groups.setdefault(name, _Group())
                self.groups.move_to_end(name)
                if group.has_failed:
                    for key, paid in group.received.items():
                        group.kept[key] += paid
                    group.received, group.has_failed = defaultdict(list), False
            dropped = NO_USAGE
            while len(self.groups) > max(_MAX_GROUPS, len(names)):
                dropped += self.groups.popitem(last=False)[1].unused_usage
            return dropped

    def take(self, name: str, key: str) -> _PaidResponse | None:
        """Return a kept response to this request, or None."""
        with self.lock:
            kept = self.groups[name].kept[key] if name in self.groups else []
            return kept.pop(0) if kept else None

    def add(self, name: str, key: str, response: dict[str, Any], usage: Usage) -> None:
        with self.lock:
            if name in self.groups:
                self.groups[name].received[key].append((response, usage))

    def mark_failed(self, name: str) -> None:
        with self.lock:
            if name in self.groups:
                self.groups[name].has_failed = True

    def forget(self, name: str) -> Usage:
        """Drop the responses of a group that is not tried again. Return their usage."""
        with self.lock:
            group = self.groups.pop(name, None)
            return _sum_usage(group.kept) + _sum_usage(group.received) if group else NO_USAGE
