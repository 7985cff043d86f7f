"""The log that everything flows through: Apache Kafka, or one SQLite file on a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bus.port import Bus

KAFKA_SCHEME = "kafka://"


def open_bus(address: str, *, prefix: str = "", options: Mapping[str, Any] | None = None, static_members: bool = False) -> Bus:
    """The log at `kafka://HOST:PORT[,HOST:PORT]`, or the embedded one in a folder.

    `prefix` is put before topics, groups and transactional ids. `options` are kafka-python client settings (security).
    With `static_members` Kafka keeps a stopped member's partitions for it until its session ends (the embedded log always
    gives them back at once).
    """
    if address.startswith(KAFKA_SCHEME):
        from engine.bus.kafka import KafkaBus, parse_address

        return KafkaBus(parse_address(address), prefix=prefix, options=options, static_members=static_members)
    from engine.bus.embedded import EmbeddedBus

    return EmbeddedBus(Path(address), prefix=prefix)
