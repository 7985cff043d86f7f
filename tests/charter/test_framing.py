"""The whole stream in Confluent's framing: every schema is registered, and a registry that goes away loses nothing."""

import pytest

from charter.pipeline import STAGES, connect, make_host, store_of
from engine.bus.read import read_values
from engine.errors import DependencyUnreachable, UsageError
from engine.settings import load
from producers.files import SHIPPED, Producer
from schemas import codec
from tests.support.registry import FakeRegistry

AWAY = 503, b"away"


@pytest.fixture
def server():
    found = FakeRegistry()
    yield found
    codec.use()
    found.close()


def framed(tmp_path, **more):
    values = {"data.folder": str(tmp_path / "data"), "models.policy": "scripted"} | more
    return load(values, environment={})[0]


def confluent(tmp_path, server):
    return framed(tmp_path, **{"bus.framing": "confluent", "bus.schema_registry": server.url})


def judged(settings):
    return (
        store_of(settings)
        .query("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL")
        .rows[0][0]
    )


def run_until_judged(settings, bus, count, meanwhile=lambda host: None):
    with make_host(settings, bus, STAGES, sink=True) as host:
        meanwhile(host)
        while judged(settings) != count:
            host.failed.wait(0.05)
            host.check()


def test_every_record_has_confluents_framing_and_lands(tmp_path, server):
    settings = confluent(tmp_path, server)
    bus = connect(settings)
    Producer(bus, "live", eval_share=0.0).publish(str(SHIPPED), last=3)
    run_until_judged(settings, bus, 3)
    values = [value for topic in ("prompts", "responses", "preferences") for value in read_values(bus, topic)]
    assert values and all(value[0] == 0 and int.from_bytes(value[1:5], "big") in server.schemas for value in values)
    bus.close()


def test_readers_with_a_registry_take_both_framings_and_wait_while_it_is_away(tmp_path, server):
    """Half of the prompts are Confluent's, half are not, and the process that reads them has never seen an id."""
    bus = connect(framed(tmp_path))
    Producer(bus, "live", eval_share=0.0).publish(str(SHIPPED), last=2)
    bus.close()
    bus = connect(confluent(tmp_path, server))
    Producer(bus, "live", eval_share=0.0).publish(str(SHIPPED), last=4)
    bus.close()
    settings = framed(tmp_path, **{"bus.schema_registry": server.url})
    bus = connect(settings)
    server.answer = AWAY
    asked = len(server.asked)

    def outage(host):
        """Both the stages and the sink ask, and must ask again."""
        while len(server.asked) < asked + 6:
            host.failed.wait(0.05)
            host.check()
        server.answer = None

    run_until_judged(settings, bus, 4, outage)
    assert not read_values(bus, "dead-letters") and not store_of(settings).query("SELECT 1 FROM dead_letters").rows
    bus.close()


def test_a_registry_that_is_away_or_missing_is_said_at_the_start(tmp_path, server):
    with pytest.raises(UsageError, match="needs a schema registry"):
        connect(framed(tmp_path, **{"bus.framing": "confluent"}))
    with pytest.raises(UsageError, match="no login in it"):
        connect(framed(tmp_path, **{"bus.schema_registry": "http://user:secret@127.0.0.1:1"}))
    server.answer = AWAY
    with pytest.raises(DependencyUnreachable, match="does not answer like a schema registry"):
        connect(confluent(tmp_path, server))
    server.answer = 409, {"message": "incompatible"}
    with pytest.raises(UsageError, match="refuses the schema of"):
        connect(confluent(tmp_path, server))
