"""Open the log: Apache Kafka, or an embedded log in one SQLite file for use on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bus.port import Bus

KAFKA_SCHEME = "kafka://"


def open_bus(address: str, *, prefix: str = "", options: Mapping[str, Any] | None = None, static_members: bool = False) -> Bus:
    """Open the log at `kafka://HOST:PORT[,HOST:PORT]`, or the embedded log in a folder.

    `prefix` is added to the names of topics and groups and to transactional ids. `options` are security options of the
    kafka-python client. If `static_members` is true, Kafka keeps the partitions of a stopped member until its session times
    out. The embedded log always releases them at once.
    """
    if address.startswith(KAFKA_SCHEME):
        from engine.bus.kafka import KafkaBus, parse_address

        return KafkaBus(parse_address(address), prefix=prefix, options=options, static_members=static_members)
    from engine.bus.embedded import EmbeddedBus

    return EmbeddedBus(Path(address), prefix=prefix)
