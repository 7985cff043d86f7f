"""Open the bus and the store from the settings."""

from __future__ import annotations

import os

from engine.bus import KAFKA_SCHEME, open_bus
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
