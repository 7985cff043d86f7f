"""Check the topics on the log: another program, or a broker that creates topics itself, may have created them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.bus.port import Bus, TopicDescription
from engine.errors import UsageError
from schemas.topics import PERMANENT_TOPICS, TOPICS


class TopicProblem(NamedTuple):
    """A topic whose configuration breaks a guarantee. `is_fatal` means that nothing may be written to it."""

    what: str
    why: str
    fix: str
    is_fatal: bool


def find_topic_problems(bus: Bus) -> Iterator[TopicProblem]:
    """Yield the problems of the existing topics."""
    for description in bus.describe_topics(list(TOPICS)):
        spec = TOPICS[description.name]
        if spec.num_partitions == 1 and description.partitions > 1:
            yield TopicProblem(
                f"the topic {description.name} has {description.partitions} partitions and needs exactly 1",
                "the order of all its records matters, and another program or the broker itself has created it",
                "delete the topic while nothing runs, then type: charter topics create",
                is_fatal=True,
            )
        if (description.name in PERMANENT_TOPICS or spec.is_compacted) and (limit := _find_retention(description)):
            setting = "cleanup.policy=compact" if spec.is_compacted else "retention.ms=-1,retention.bytes=-1"
            yield TopicProblem(
                f"the topic {description.name} does not keep its records ({limit})",
                "runs, training and erasures need them for ever, and another program or the broker itself has changed or created it",
                f"type: kafka-configs.sh --alter --topic {description.name} --add-config {setting}",
                is_fatal=False,
            )


def _find_retention(description: TopicDescription) -> str | None:
    """Return the setting that lets the log delete old records. Return None if the log keeps them."""
    if "delete" not in description.configs.get("cleanup.policy", "compact"):
        return None
    limits = {name: description.configs.get(name, "-1") for name in ("retention.ms", "retention.bytes")}
    return next((f"{name}={value}" for name, value in limits.items() if value != "-1"), None)


def require_usable_topics(bus: Bus) -> list[TopicProblem]:
    """Return the problems. Raise UsageError if there is a fatal one."""
    problems = list(find_topic_problems(bus))
    for problem in problems:
        if problem.is_fatal:
            raise UsageError(problem.what, problem.why, problem.fix)
    return problems
