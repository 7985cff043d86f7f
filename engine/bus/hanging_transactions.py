"""End the transactions that a Kafka broker left open although they are complete.

When a transaction is committed, the transaction coordinator writes a marker to each of its partitions. Kafka 4.3 skips a partition
that has no leader at this moment, because it takes it for deleted, and then declares the transaction complete. This happens if a
single broker is killed shortly after a commit and starts again. From then on readers wait at the records of this transaction, and
the committed offsets of its group stay unstable, without a time limit.

The next marker of the same producer id ends such a transaction, because the broker does not know to which transaction a marker
belongs. So this module commits an empty transaction that has the same partitions and the same group.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import kafka
from kafka import errors
from kafka.admin import TransactionState
from kafka.structs import TopicPartition as KafkaTopicPartition

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

logger = logging.getLogger("charter.bus")

_UNSUPPORTED_ERRORS = (errors.AuthorizationError, errors.UnsupportedVersionError, errors.IncompatibleBrokerVersion)


def is_last_transaction_committed(admin: KafkaAdminClient, transactional_id: str) -> bool:
    """Return whether the last transaction with this id was committed. Call this before a new producer changes this state."""
    try:
        state = admin.describe_transactions([transactional_id])[transactional_id].state
    except errors.TransactionalIdNotFoundError:
        return False
    except _UNSUPPORTED_ERRORS as error:
        logger.warning("transactions that the broker left open cannot be found: %s: %s", transactional_id, error)
        return False
    return state in (TransactionState.PREPARE_COMMIT, TransactionState.COMPLETE_COMMIT)


def find_hanging_partitions(
    admin: KafkaAdminClient, partitions: Iterable[KafkaTopicPartition], producer_id: int
) -> list[KafkaTopicPartition]:
    """Return the partitions in which a transaction of this producer id is open."""
    try:
        states = admin.describe_producers(partitions)
    except _UNSUPPORTED_ERRORS as error:
        logger.warning("transactions that the broker left open cannot be found: %s", error)
        return []
    return [
        tp
        for tp, state in states.items()
        if any(p.producer_id == producer_id and p.current_transaction_start_offset >= 0 for p in state.active_producers)
    ]


def commit_empty_transaction(producer: kafka.KafkaProducer, partitions: Iterable[KafkaTopicPartition], group: str) -> None:
    """Commit a transaction that writes nothing but its markers: to the partitions, and to the offsets of the group, if any."""
    producer.begin_transaction()
    for partition in partitions:
        producer._transaction_manager.maybe_add_partition_to_transaction(partition)
    if group:
        producer.send_offsets_to_transaction({}, group)
    producer.commit_transaction()


class ConnectionWatch:
    """Notices that a producer has lost a connection to a broker since the last call of `restart`."""

    def __init__(self, producer: kafka.KafkaProducer) -> None:
        self.connections: dict[Any, Any] = producer._sender._client._manager._conns
        self.restart()

    def restart(self) -> None:
        self.watched = tuple(self.connections.values())

    def has_lost_connection(self) -> bool:
        return any(connection.closed for connection in self.watched)
