"""Change a Kafka cluster as an operator does: delete groups, topics and records, change offsets, add partitions."""

from collections.abc import Mapping
from contextlib import contextmanager, suppress

import kafka
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewPartitions
from kafka.errors import CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError
from kafka.structs import OffsetAndMetadata

from tests.support.waiting import wait_until

_POLL_INTERVAL_S = 0.1
_COORDINATOR_ERRORS = (CoordinatorNotAvailableError, CoordinatorLoadInProgressError, NotCoordinatorError)


class KafkaOperator:
    """An administrator of the cluster at `servers`. Topics and groups are named without `prefix`."""

    def __init__(self, servers, prefix=""):
        self.servers, self.prefix = list(servers), prefix

    @contextmanager
    def connect(self):
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            yield admin
        finally:
            admin.close()

    def list_partitions(self, admin, topic):
        (described,) = admin.describe_topics([self.prefix + topic])
        return [kafka.TopicPartition(self.prefix + topic, number) for number in range(len(described["partitions"]))]

    def delete_group(self, group):
        """Delete a group with its offsets. Wait until its members have left."""

        def delete():
            with self.connect() as admin:
                result = admin.delete_groups([self.prefix + group])[self.prefix + group]
            assert result in ("OK", "NonEmptyGroupError"), result
            return result == "OK"

        wait_until(delete, description=f"the group {group} is deleted", interval_s=_POLL_INTERVAL_S)

    def list_offsets(self, group):
        """Return the committed offsets of a group, by (topic, partition).

        A new cluster has no coordinator until the first request for one has created the topic of the offsets.
        """
        found = []

        def fetch():
            with self.connect() as admin, suppress(*_COORDINATOR_ERRORS):
                found.append(admin.list_group_offsets({self.prefix + group: None}).get(self.prefix + group, {}))
            return bool(found)

        wait_until(fetch, description=f"the group {group} has a coordinator", interval_s=_POLL_INTERVAL_S)
        (offsets,) = found
        return {(tp.topic.removeprefix(self.prefix), tp.partition): entry.offset for tp, entry in offsets.items()}

    def alter_offsets(self, group, offsets: Mapping, metadata=""):
        """Replace offsets, given by (topic, partition), as kafka-consumer-groups --reset-offsets does. No member may be left."""
        entries = {
            kafka.TopicPartition(self.prefix + topic, partition): OffsetAndMetadata(offset, metadata, -1)
            for (topic, partition), offset in offsets.items()
        }

        def alter():
            with self.connect() as admin:
                results = {error.__name__ for error in admin.alter_group_offsets(self.prefix + group, entries).values()}
            assert results <= {"NoError", "UnknownMemberIdError", "NonEmptyGroupError"}, results
            return results == {"NoError"}

        wait_until(alter, description=f"the offsets of {group} are changed", interval_s=_POLL_INTERVAL_S)

    def end_offsets(self, topic):
        with self.connect() as admin:
            partitions = self.list_partitions(admin, topic)
        consumer = kafka.KafkaConsumer(bootstrap_servers=self.servers, allow_auto_create_topics=False)
        try:
            return {(topic, tp.partition): offset for tp, offset in consumer.end_offsets(partitions).items()}
        finally:
            consumer.close()

    def delete_records(self, topic, before=None):
        """Delete the records of each partition below offset `before`, or all records."""
        ends = self.end_offsets(topic)
        self.delete_records_below({tp: end if before is None else min(before, end) for tp, end in ends.items()})

    def delete_records_below(self, bounds: Mapping):
        """Delete records below offsets, given by (topic, partition)."""
        with self.connect() as admin:
            admin.delete_records(
                {kafka.TopicPartition(self.prefix + topic, number): o for (topic, number), o in bounds.items()}
            )

    def recreate_topics(self, *topics):
        """Delete topics and create them again with the same number of partitions.

        The broker deletes a topic in the background, so the creation is repeated. Return when the broker has the new topics: until
        then, it would still accept records for the old ones.
        """
        names = [self.prefix + topic for topic in topics]
        with self.connect() as admin:
            counts = {topic: len(self.list_partitions(admin, topic)) for topic in topics}
            old_ids = self._list_topic_ids(admin, names)
            admin.delete_topics(names)
        self.create_topics(counts)

        def has_new_topics():
            with self.connect() as admin:
                ids = self._list_topic_ids(admin, names)
            return len(ids) == len(names) and not ids & old_ids

        wait_until(has_new_topics, description="the broker has the new topics", interval_s=_POLL_INTERVAL_S)

    def _list_topic_ids(self, admin, names):
        """Return the ids of the topics that the broker knows."""
        return {str(topic["topic_id"]) for topic in admin.describe_topics(names) if not topic["error_code"]}

    def create_topics(self, partition_counts: Mapping):
        pending = {self.prefix + topic: count for topic, count in partition_counts.items()}

        def create():
            with self.connect() as admin:
                for name, count in list(pending.items()):
                    options = {"num_partitions": count, "replication_factor": -1, "configs": {}}
                    result = admin.create_topics({name: options}, raise_errors=False)["topics"][0]
                    if not result["error_code"]:
                        del pending[name]
            return not pending

        wait_until(create, description=f"the topics {', '.join(pending)} are created", interval_s=_POLL_INTERVAL_S)

    def add_partitions(self, partition_count, *topics):
        """Increase the number of partitions of topics."""
        with self.connect() as admin:
            admin.create_partitions({self.prefix + topic: NewPartitions(partition_count) for topic in topics})
            wait_until(
                lambda: all(len(self.list_partitions(admin, topic)) == partition_count for topic in topics),
                description="the partitions are added",
                interval_s=_POLL_INTERVAL_S,
            )

    def set_topic_configs(self, topic, configs: Mapping):
        with self.connect() as admin:
            admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, self.prefix + topic, dict(configs))])
