"""The whole stream in Confluent's framing: every schema is registered, and a registry that goes away loses nothing."""

import pytest

from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.bus.read import read_values
from engine.errors import DependencyUnreachable, UsageError
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas import codec
from tests.support.schema_registry import FakeSchemaRegistry

AWAY = 503, b"away"


@pytest.fixture
def server():
    found = FakeSchemaRegistry()
    yield found
    codec.configure_framing()
    found.close()


def framed(tmp_path, **more):
    values = {"data.folder": str(tmp_path / "data"), "models.policy": "scripted"} | more
    return load_settings(values, environment={})[0]


def confluent(tmp_path, server):
    return framed(tmp_path, **{"bus.framing": "confluent", "bus.schema_registry": server.url})


def judged(settings):
    return (
        open_store(settings)
        .query("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL")
        .rows[0][0]
    )


def run_until_judged(settings, bus, count, meanwhile=lambda host: None):
    with make_host(settings, bus, STAGES, sink=True) as host:
        meanwhile(host)
        while judged(settings) != count:
            host.failure_event.wait(0.05)
            host.raise_if_failed()


def test_every_record_has_confluents_framing_and_lands(tmp_path, server):
    settings = confluent(tmp_path, server)
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=3)
    run_until_judged(settings, bus, 3)
    values = [value for topic in ("prompts", "responses", "preferences") for value in read_values(bus, topic)]
    assert values and all(value[0] == 0 and int.from_bytes(value[1:5], "big") in server.schemas for value in values)
    bus.close()


def test_readers_with_a_registry_take_both_framings_and_wait_while_it_is_away(tmp_path, server):
    """Half of the prompts are Confluent's, half are not, and the process that reads them has never seen an id."""
    bus = connect_bus(framed(tmp_path))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=2)
    bus.close()
    bus = connect_bus(confluent(tmp_path, server))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=4)
    bus.close()
    settings = framed(tmp_path, **{"bus.schema_registry": server.url})
    bus = connect_bus(settings)
    server.answer = AWAY
    asked = len(server.requests)

    def outage(host):
        """Both the stages and the sink ask, and must ask again."""
        while len(server.requests) < asked + 6:
            host.failure_event.wait(0.05)
            host.raise_if_failed()
        server.answer = None

    run_until_judged(settings, bus, 4, outage)
    assert not read_values(bus, "dead-letters") and not open_store(settings).query("SELECT 1 FROM dead_letters").rows
    bus.close()


def test_a_registry_that_is_away_or_missing_is_said_at_the_start(tmp_path, server):
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
