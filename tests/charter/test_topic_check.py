"""Topics that another program has created: too many partitions are refused, and a retention is reported."""

import uuid

import pytest

from charter.connect import connect_bus
from charter.topic_check import find_topic_problems, require_usable_topics
from engine.errors import UsageError
from tests.support.deployment import Deployment
from tests.support.kafka_operator import KafkaOperator
from tests.support.waiting import wait_until

pytestmark = pytest.mark.kafka


@pytest.fixture
def deployment(tmp_path, kafka_address):
    return Deployment(tmp_path / "data", kafka_address, f"t{uuid.uuid4().hex[:8]}.")


def test_retention_of_a_permanent_topic_is_reported(deployment):
    bus = connect_bus(deployment.settings())
    assert list(find_topic_problems(bus)) == []
    operator = KafkaOperator(bus.servers, bus.prefix)
    operator.set_topic_configs("run-starts", {"retention.ms": "604800000"})
    operator.set_topic_configs("policies", {"cleanup.policy": "delete", "retention.ms": "604800000"})
    operator.set_topic_configs("responses", {"retention.ms": "604800000"})  # as bus.retention_ms does
    wait_until(lambda: len(require_usable_topics(bus)) == 2)  # the broker applies the settings shortly after its answer
    problems = require_usable_topics(bus)
    assert {problem.what for problem in problems} == {
        f"the topic {name} does not keep its records (retention.ms=604800000)" for name in ("run-starts", "policies")
    }
    assert not any(problem.is_fatal for problem in problems)
    bus.close()


def test_several_partitions_of_an_ordered_topic_are_refused(deployment):
    bus = connect_bus(deployment.settings())
    KafkaOperator(bus.servers, bus.prefix).add_partitions(2, "policies")
    with pytest.raises(UsageError, match="policies has 2 partitions and needs exactly 1"):
        require_usable_topics(bus)
    bus.close()
    deployment.fails(UsageError, "policies has 2 partitions", "run", "--stage", "sink", "--until-done")
