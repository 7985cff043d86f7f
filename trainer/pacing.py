"""Compute how many completions the trainer wants now, and publish it for the responders (engine/pacing.py).

Without a limit, the stream samples completions that no update can use: an SFT update makes all earlier completions unusable for
RL, and completions become too stale while updates take longer than sampling. A training loop therefore asks only for the rollouts
of the next `train.rollouts_ahead` updates. Before an SFT update it asks for no further ones: RL trains on the rollouts that exist,
then SFT starts, and the responders hold until its policy is published or its batch is voided.

There is no limit while a phase that is due lacks rows that only new prompts can bring. For example, RL waits for the first reward
model, which waits for labels, which wait for prompts.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from engine.bus.port import Bus
from engine.pacing import IS_RL_PROMPT_SQL
from engine.settings import Settings
from engine.store import Store
from schemas import ids
from schemas.records import Allowance, Response
from trainer.consumed import QUERY_TIMEOUT_S
from trainer.methods import RL_METHODS, SFT_PHASE
from trainer.state import TrainingState

logger = logging.getLogger("charter.trainer")
_RENEWAL_INTERVAL_S = 30.0
# SFT stops waiting for rollouts if no response has arrived for this time, and RL for rewards if none has arrived.
_MAX_SILENCE_S = 600.0


@dataclass(frozen=True)
class Demand:
    """The number of rollouts that the trainer wants in addition to those that exist, and the reason. None means no limit.

    The unit is the unit of the threshold of the RL phase: responses, or completions for groups.
    """

    num_rollouts: int | None
    reason: str


@dataclass(frozen=True)
class RolloutStock:
    """The rollouts that the next RL update can use, and what the update needs.

    `num_usable` counts rollouts that have everything, and `num_waiting` counts those whose grades are still to come. `threshold` is
    the number that starts an update. `unneeded_because` is the reason why RL uses no rollouts now; it is empty if RL uses them.
    """

    num_usable: int
    threshold: int
    num_waiting: int = 0
    unneeded_because: str = ""


def compute_demand(
    stock: RolloutStock, *, rollouts_ahead: float, sft_is_due: bool = False, is_drained: bool = False, futile_because: str = ""
) -> Demand:
    """Return how many more rollouts the trainer wants.

    `sft_is_due` is true if SFT has enough rows. `is_drained` is true if RL has then trained on all rollouts that it asked for.
    `futile_because` is the reason why RL cannot use further completions, or empty.
    """
    if stock.unneeded_because:
        return Demand(None, stock.unneeded_because)
    if futile_because:
        return Demand(None, futile_because)
    if sft_is_due and is_drained:
        return Demand(0, "SFT is due, and its update makes earlier completions unusable for RL")
    target = stock.threshold if sft_is_due else max(stock.threshold, math.ceil(rollouts_ahead * stock.threshold))
    num_unused = stock.num_usable + stock.num_waiting
    waiting = f", and {stock.num_waiting} wait for their rewards" if stock.num_waiting else ""
    reason = f"RL has {stock.num_usable} unused rollouts{waiting}; an update needs {stock.threshold}"
    return Demand(max(0, target - num_unused), reason)


@dataclass(frozen=True)
class _Position:
    """The position of the sink on the topic `responses`, and the next commit sequence number, at the time of a query."""

    offsets: list[int]
    next_seq: int


class Pacer:
    """Publishes allowances for a training loop, and remembers the last one.

    `plan` computes an allowance at each tick. It returns None while the last allowance is still right.
    """

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self.bus, self.settings, self.method = bus, settings, RL_METHODS[settings.train.rl_method]
        self.is_drained = False  # RL has trained on the last rollouts before an SFT update
        self.sft_is_due = False
        self.last: Allowance | None = None
        self.last_next_seq, self.last_at = 0, 0.0
        self.last_key: tuple[object, ...] = ()
        self.stock: RolloutStock | None = None
        self.futile_because = ""  # the reason why further completions would not help RL now
        self.progress, self.progress_at = (-1, -1, -1), time.monotonic()

    def plan(self, store: Store, state: TrainingState, stock: RolloutStock, *, sft_is_due: bool) -> Allowance | None:
        """Return the allowance to publish now, or None. The caller keeps the database open, so that all queries see one state."""
        self.stock, self.sft_is_due = stock, sft_is_due
        self.is_drained = self.is_drained and sft_is_due
        position = self.read_position(store)
        num_new = self.count_new(store) if self.last else 0
        wanted = self.last.num_completions if self.last else None
        self.check_progress(stock, len(state.updates), is_used_up=bool(wanted) and num_new >= (wanted or 0))
        demand = self.compute_demand(stock)
        # The demand changes with every response, but the allowance stays right until one of these values changes.
        changes = (len(state.manifests), len(state.updates), len(state.incidents), len(state.pauses))
        key = (
            *changes,
            sft_is_due,
            self.is_drained,
            demand.num_rollouts is None,
            demand.reason if demand.num_rollouts is None else "",
        )
        is_used_up = wanted is not None and bool(demand.num_rollouts) and num_new >= wanted
        is_old = bool(demand.num_rollouts) and time.monotonic() - self.last_at > _RENEWAL_INTERVAL_S
        has_moved = self.last is not None and self.last.offsets != position.offsets
        if key == self.last_key and not is_used_up and not (is_old and has_moved):
            return None
        self.last_key = key
        return self.make_allowance(demand, state, position)

    def plan_batch(self, phase: str, num_left: int, store: Store, state: TrainingState) -> list[Allowance]:
        """Return the allowance to publish together with the manifest of a batch, in a list that may be empty.

        For SFT, the allowance stops the responders. For RL, the stream samples the next rollouts during the update; `num_left` is
        the number of usable rollouts that are not in the batch.
        """
        if self.stock is None or self.stock.unneeded_because:
            self.is_drained = False
            return []
        if phase == SFT_PHASE:
            self.is_drained = False  # RL must train on the completions of the new policy before the next SFT update
            demand = Demand(0, "an SFT update is in progress, and makes earlier completions unusable for RL")
        elif phase == self.method.phase:
            self.is_drained = self.sft_is_due
            demand = self.compute_demand(replace(self.stock, num_usable=num_left))
        else:
            return []
        return [self.make_allowance(demand, state, self.read_position(store))]

    def require_renewal(self) -> None:
        """Publish an allowance at the next tick, even if nothing has changed."""
        self.last_key = ()

    def check_progress(self, stock: RolloutStock, num_updates: int, *, is_used_up: bool) -> None:
        """Find out whether RL can use no completion, or waits for rewards that do not arrive. Then there must be no limit."""
        progress = (stock.num_usable, 0 if self.futile_because else stock.num_waiting, num_updates)
        if progress != self.progress:
            self.progress, self.progress_at = progress, time.monotonic()
            self.futile_because = ""
        if is_used_up and not stock.num_usable + stock.num_waiting:
            self.futile_because = "RL can use none of the last completions"
        elif stock.num_waiting and stock.num_usable < stock.threshold and time.monotonic() - self.progress_at > _MAX_SILENCE_S:
            self.futile_because = "the rewards that RL waits for have not arrived for ten minutes"
            self.progress = (stock.num_usable, 0, num_updates)

    def compute_demand(self, stock: RolloutStock) -> Demand:
        return compute_demand(
            stock,
            rollouts_ahead=self.settings.train.rollouts_ahead,
            sft_is_due=self.sft_is_due,
            is_drained=self.is_drained,
            futile_because=self.futile_because,
        )

    def make_allowance(self, demand: Demand, state: TrainingState, position: _Position) -> Allowance:
        """Return the record of a demand, and remember it."""
        per_rollout = 1 if self.method.uses_groups else self.settings.respond.num_completions
        num_completions = None if demand.num_rollouts is None else demand.num_rollouts * per_rollout
        at = datetime.now(UTC)
        fingerprint = ids.compute_fingerprint(
            "allowance",
            policy_version=state.policy_version,
            offsets=position.offsets,
            num_completions=num_completions,
            reason=demand.reason,
            at=at.isoformat(),
        )
        allowance = Allowance(
            record_id=ids.compute_record_id("allowance", [], fingerprint),
            run_id=self.settings.run.id,
            stage="train",
            policy_version=state.policy_version,
            phase=self.method.phase,
            num_completions=num_completions,
            offsets=position.offsets,
            min_policy_version=state.reference_version,
            reason=demand.reason,
            created_at=at,
        )
        if self.last is None or (self.last.num_completions is None) != (num_completions is None):
            limit = "any number of" if num_completions is None else str(num_completions)
            logger.info("responders may sample %s further completions: %s", limit, demand.reason)
        self.last, self.last_next_seq, self.last_at = allowance, position.next_seq, time.monotonic()
        return allowance

    # Reading the database

    def read_position(self, store: Store) -> _Position:
        topic_id = self.bus.topic_ids([Response.topic])[Response.topic]  # the rows of a deleted topic stay in the database
        sql = "SELECT next_offset FROM raw.sink_offsets WHERE cluster_id = ? AND topic_id = ? ORDER BY partition"
        offsets = [row[0] for row in store.query(sql, [self.bus.cluster_id, topic_id]).rows]
        ((next_seq,),) = store.query("SELECT next_seq FROM raw.sink_state").rows
        return _Position(offsets, next_seq)

    def count_new(self, store: Store) -> int:
        """Return the number of completions that have used up the last allowance."""
        assert self.last is not None
        sql = f"""SELECT coalesce(sum(len(completions)), 0) FROM responses
                  WHERE commit_seq >= ? AND policy_version >= ? AND {IS_RL_PROMPT_SQL}"""
        ((count,),) = store.query(sql, [self.last_next_seq, self.last.min_policy_version], limit_s=QUERY_TIMEOUT_S).rows
        return int(count)

    def sft_waits(self, store: Store) -> bool:
        """Return whether SFT must wait until RL has trained on the rollouts that exist and that the trainer has asked for.

        SFT does not wait if no further rollouts can arrive: all prompts have responses, or no response has arrived for ten minutes.
        """
        stock = self.stock
        if stock is None or stock.unneeded_because or self.futile_because:
            return False
        if stock.num_usable >= stock.threshold:
            return True  # RL trains first
        return not self.is_drained and self.can_rollouts_arrive(store, stock.num_waiting)

    def can_rollouts_arrive(self, store: Store, num_waiting: int) -> bool:
        """Return whether prompts wait for a response or `num_waiting` rollouts wait for rewards, and responses arrive."""
        open_prompts = f"""
            SELECT count(*) FROM prompts p ANTI JOIN responses r ON r.prompt_id = p.prompt_id AND r.run_id = p.run_id
            WHERE {IS_RL_PROMPT_SQL.replace("split", "p.split").replace("purpose", "p.purpose")}
            AND p.prompt_id::VARCHAR NOT IN (SELECT decode(source_key) FROM dead_letters WHERE source_key IS NOT NULL)"""
        silence = (
            "SELECT epoch(? - max(created_at)) FROM (SELECT created_at FROM prompts UNION ALL SELECT created_at FROM responses)"
        )
        now = datetime.now(UTC).replace(tzinfo=None)
        ((num_open,),) = store.query(open_prompts, limit_s=QUERY_TIMEOUT_S).rows
        ((silence_s,),) = store.query(silence, [now], limit_s=QUERY_TIMEOUT_S).rows
        return bool(num_open or num_waiting) and silence_s is not None and silence_s < _MAX_SILENCE_S
