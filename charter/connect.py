"""Open the bus and the store from the settings."""

from __future__ import annotations

import os
from pathlib import Path

from engine.bus import KAFKA_SCHEME, open_bus
from engine.bus.embedded import LOG_FILENAME
from engine.bus.port import Bus
from engine.bus.security import make_client_options
from engine.errors import SchemaRegistryUnreachable, UsageError
from engine.instances import FileLock
from engine.settings import BusSettings, Settings
from engine.store import Store
from schemas import codec
from schemas.confluent import SchemaRegistryClient, SchemaRejected
from schemas.http_client import ClientSettingsError
from schemas.topics import TopicSpec, make_topic_table

_REGISTRY_TIMEOUT_S = 5.0


def connect_bus(settings: Settings) -> Bus:
    """Open the bus and create the topics that are missing."""
    bus = open_bus_from_settings(settings)
    try:
        bus.create_topics(get_topic_specs(settings))
    except BaseException:
        bus.close()
        raise
    return bus


def is_log_missing(settings: Settings) -> bool:
    """Return whether the log is embedded and has no file yet, or an empty file. To open the log would create it."""
    path = Path(settings.bus_address) / LOG_FILENAME
    return not settings.bus_address.startswith(KAFKA_SCHEME) and not (path.exists() and path.stat().st_size)


def require_log(settings: Settings) -> None:
    """Raise UsageError if there is no log, for example because the name of the data folder is misspelled."""
    if is_log_missing(settings):
        raise UsageError(
            f"there is no log in {settings.bus_address} yet",
            "the first command that publishes records creates it",
            "type: charter produce FILE    or: charter demo, or give the folder of the log: --data FOLDER",
        )


def connect_existing_bus(settings: Settings) -> Bus:
    """Open the bus for a command that only reads, so that it creates no log (see `require_log`)."""
    require_log(settings)
    return connect_bus(settings)


def open_bus_from_settings(settings: Settings) -> Bus:
    """Open the bus without creating topics. Also set the record framing for the whole process."""
    _configure_framing(settings.bus)
    options = make_client_options(settings.bus) if settings.bus_address.startswith(KAFKA_SCHEME) else {}
    return open_bus(
        settings.bus_address, prefix=settings.bus.prefix, options=options, static_members=settings.bus.static_members
    )


def _configure_framing(bus_settings: BusSettings) -> None:
    """Set the framing of written records. The Confluent framing needs a schema registry.

    The Avro single-object framing works without a schema registry.

    If a registry is configured, the process can read records in both framings.
    """
    try:
        codec.configure_framing(
            bus_settings.framing, _make_schema_registry(bus_settings) if bus_settings.schema_registry else None
        )
    except SchemaRejected as error:
        raise UsageError(error.what, error.why, error.fix) from None
    except ClientSettingsError as error:
        raise UsageError(error.what, error.why, error.fix) from None
    except ValueError as error:
        fix = "set bus.schema_registry to the URL of the registry, or do not set bus.framing"
        raise UsageError("bus.framing and bus.schema_registry do not match", str(error), fix) from None


def _make_schema_registry(bus_settings: BusSettings) -> SchemaRegistryClient:
    return SchemaRegistryClient(
        bus_settings.schema_registry,
        credentials=os.environ.get(bus_settings.schema_registry_auth_env, ""),
        prefix=bus_settings.prefix,
        timeout_s=_REGISTRY_TIMEOUT_S,
        make_unreachable_error=SchemaRegistryUnreachable,
    )


def get_topic_specs(settings: Settings) -> list[TopicSpec]:
    options = settings.bus
    return list(
        make_topic_table(options.partitions, options.retention_ms, options.replication, options.prompts_retention_ms).values()
    )


def open_sink_lock(settings: Settings) -> FileLock:
    """Return the lock of the only sink that may write to the database of this data folder."""
    return FileLock(settings.folder / "sink.lock")


def open_store(settings: Settings) -> Store:
    return Store(settings.folder / "charter.duckdb")
