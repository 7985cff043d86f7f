"""The pipeline in Confluent's wire format: every schema is registered, and an outage of the registry loses nothing."""

import pytest

from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.bus.read import read_values
from engine.errors import DependencyUnreachable, UsageError
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas import codec
from tests.support.schema_registry import FakeSchemaRegistry
from tests.support.waiting import wait_until

AWAY = 503, b"away"


@pytest.fixture
def server():
    registry = FakeSchemaRegistry()
    yield registry
    codec.configure_framing()
    registry.close()


def framed(tmp_path, **more):
    values = {"data.folder": str(tmp_path / "data"), "models.policy": "scripted"} | more
    return load_settings(values, environment={})[0]


def confluent(tmp_path, server):
    return framed(tmp_path, **{"bus.framing": "confluent", "bus.schema_registry": server.url})


def count_judged(settings):
    return (
        open_store(settings)
        .query("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL")
        .rows[0][0]
    )


def run_until_judged(settings, bus, count, meanwhile=lambda host: None):
    with make_host(settings, bus, STAGES, sink=True) as host:
        meanwhile(host)
        wait_until(lambda: count_judged(settings) == count, host)


def test_every_record_uses_confluent_framing_and_is_stored(tmp_path, server):
    settings = confluent(tmp_path, server)
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=3)
    run_until_judged(settings, bus, 3)
    values = [value for topic in ("prompts", "responses", "preferences") for value in read_values(bus, topic)]
    assert values and all(value[0] == 0 and int.from_bytes(value[1:5], "big") in server.schemas for value in values)
    bus.close()


def test_readers_accept_both_framings_and_wait_during_a_registry_outage(tmp_path, server):
    """Half of the prompts use Confluent's framing; the reading process has no cached schema ids."""
    bus = connect_bus(framed(tmp_path))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=2)
    bus.close()
    bus = connect_bus(confluent(tmp_path, server))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=4)
    bus.close()
    settings = framed(tmp_path, **{"bus.schema_registry": server.url})
    bus = connect_bus(settings)
    server.answer = AWAY
    num_requests = len(server.requests)

    def outage(host):
        """Wait until the stages and the sink have asked the registry repeatedly, then end the outage."""
        wait_until(lambda: len(server.requests) >= num_requests + 6, host)
        server.answer = None

    run_until_judged(settings, bus, 4, outage)
    assert not read_values(bus, "dead-letters") and not open_store(settings).query("SELECT 1 FROM dead_letters").rows
    bus.close()


def test_absent_registry_raises_at_startup(tmp_path, server):
    with pytest.raises(UsageError, match="requires a schema registry"):
        connect_bus(framed(tmp_path, **{"bus.framing": "confluent"}))
    with pytest.raises(UsageError, match="must not contain credentials"):
        connect_bus(framed(tmp_path, **{"bus.schema_registry": "http://user:secret@127.0.0.1:1"}))
    server.answer = AWAY
    with pytest.raises(DependencyUnreachable, match="does not respond like a schema registry"):
        connect_bus(confluent(tmp_path, server))
    server.answer = 409, {"message": "incompatible"}
    with pytest.raises(UsageError, match="rejects the schema of"):
        connect_bus(confluent(tmp_path, server))
