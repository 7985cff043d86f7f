"""Compute the results of the soak test from the records, and decide whether the test has passed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import duckdb

from benchmarks.soak.checks import compare_with_lake, compare_with_log, count_index_faults, count_prompt_faults
from benchmarks.soak.supervision import SERVICES, SoakTest
from charter.connect import open_bus_from_settings, open_store
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.errors import CharterError
from engine.store import Store
from schemas.codec import decode_record
from schemas.records import BatchManifest

_MAX_DROPPED, _MIN_TRAINED = 0.10, 0.75
# An update is starved if no batch began for this time before it. An SFT update of the test takes about a minute on a busy machine.
_STARVATION_S = 300.0
_SINCE_REWARD_MODEL = "(SELECT min(created_at) FROM policies WHERE kind = 'REWARD')"

_INVARIANT_QUERIES = {
    "stale_rollouts": """
        SELECT count(*) FROM trained_rollouts WHERE policies_behind > $1 OR rewards_behind > $2 OR policies_behind < 0
        OR policy_version < reference_policy_version""",
    "responses_of_other_weights": """
        SELECT count(*) FROM responses r JOIN policy_versions p ON p.kind = 'POLICY' AND p.version = r.policy_version
        JOIN policies w ON w.kind = 'POLICY' AND w.version = p.weights_of WHERE w.model.revision <> r.model.revision
        AND $1 >= 0 AND $2 >= 0""",
    "rows_trained_twice": """
        SELECT count(*) FROM (SELECT phase, row_id FROM batch_rows WHERE trained AND NOT replayed AND $1 >= 0 AND $2 >= 0
                              GROUP BY ALL HAVING count(*) > 1)""",
    "missing_versions": """
        SELECT coalesce(sum(newest - versions), 0) FROM (SELECT kind, max(version) AS newest, count(*) AS versions
        FROM policy_versions WHERE $1 >= 0 AND $2 >= 0 GROUP BY kind)""",
}

# The times without a new batch, up to the last response. While a phase is paused, the trainer may have nothing to do.
_STARVED_SQL = f"""
    WITH begun AS (
        SELECT created_at, lag(created_at) OVER (ORDER BY created_at) AS previous_at
        FROM (SELECT created_at FROM batches UNION ALL SELECT max(created_at) FROM responses)
        WHERE created_at > {_SINCE_REWARD_MODEL}
    ), paused AS (
        SELECT created_at AS start_at, lead(created_at, 1, 'infinity') OVER (PARTITION BY phase ORDER BY commit_seq) AS end_at, paused
        FROM pauses
    )
    SELECT count(*) FILTER (epoch(created_at - previous_at) > $limit), coalesce(max(epoch(created_at - previous_at)), 0) FROM begun
    WHERE NOT EXISTS (SELECT 1 FROM paused WHERE paused AND start_at < begun.created_at AND end_at > begun.previous_at)"""

_COUNTS = {
    "prompts": "SELECT count(*) FROM prompts",
    "generated_prompts": "SELECT count(*) FROM prompts WHERE recipe_item IS NOT NULL",
    "generated_indexes": "SELECT max(next_line) FROM producer_offsets WHERE recipe_hash <> ''",
    "seconds_from_the_first_to_the_last_generated_prompt":
        "SELECT epoch(max(created_at) - min(created_at))::INT FROM prompts WHERE recipe_item IS NOT NULL",
    "responses": "SELECT count(*) FROM responses",
    "finished_prompts": "SELECT count(DISTINCT prompt_id) FROM revision_chains",
    "batches": "SELECT count(*) FROM batches",
    "policies": "SELECT count(*) FROM policy_versions WHERE kind = 'POLICY'",
    "reward_models": "SELECT count(*) FROM policy_versions WHERE kind = 'REWARD'",
    "responding_policies": "SELECT count(DISTINCT policy_version) FROM responses",
    "rl_rollouts": "SELECT count(*) FROM trained_rollouts WHERE trained",
    "voided_batches": "SELECT count(DISTINCT voided_batch_id) FROM incidents WHERE voided_batch_id IS NOT NULL",
    "pauses": "SELECT count(*) FROM pauses WHERE paused",
    "max_policies_behind": "SELECT max(policies_behind) FROM trained_rollouts",
    "max_rewards_behind": "SELECT max(rewards_behind) FROM trained_rollouts",
}  # fmt: skip


def drain_log(soak: SoakTest) -> None:
    """Write the remaining records of the log to the database."""
    bus = open_bus_from_settings(soak.settings)
    sink = Sink(bus, open_store(soak.settings), max_wait_s=0.1)
    while sink.step():
        pass
    sink.close()
    bus.close()


def export_last_rows(soak: SoakTest) -> dict[str, int]:
    """Export the last rows, and let `--verify` compare the lake. Return the exit codes of both commands."""
    export = soak.build_command("export", "lake", str(soak.lake))
    commands = {"last_export": export, "verify": [*export, "--verify"]}
    return {name: subprocess.run(command, check=False).returncode for name, command in commands.items()}


def compute_result(soak: SoakTest, exit_codes: Mapping[str, int]) -> dict[str, Any]:
    """Return the results. `failed` names everything that is not as in a test that passes."""
    store, bus = open_store(soak.settings), open_bus_from_settings(soak.settings)
    with duckdb.connect(str(store.path), read_only=True) as connection:  # the store cannot be used at the same time
        log_faults, log_sizes = compare_with_log(connection, bus)
        lake_faults, lake_sizes = compare_with_lake(connection, soak.lake)
        record_faults = count_index_faults(connection) | count_prompt_faults(connection)
    bus.close()
    zeros = {
        **_count_violations(soak, store),
        **record_faults,
        **log_faults,
        **lake_faults,
        **{f"exit_code_of_{name}": code for name, code in exit_codes.items()},
    }
    shares = _compute_rollout_shares(store)
    limits = compute_limits(shares["completion_shares_since_the_first_reward_model"], *count_starved_updates(store))
    failed = [name for name, value in zeros.items() if value] + [name for name, limit in limits.items() if not limit["holds"]]
    return {
        "minutes": round(soak.get_elapsed_s() / 60, 1),
        "kills": dict(soak.kills),
        "must_be_0": zeros,
        "limits": limits,
        **log_sizes,
        **lake_sizes,
        "exports": soak.num_exports,
        "failed_exports": soak.num_failed_exports,
        "killed_exports_that_left_an_unfinished_manifest": soak.num_unfinished_lakes,
        **{name: store.query(sql, limit_s=120.0).rows[0][0] for name, sql in _COUNTS.items()},
        "rejected_texts": _read_rejected_texts(store),
        "resumed": soak.num_resumed,
        **shares,
        "dropped_rollouts": dict(
            store.query("SELECT reason, sum(rollouts)::INT FROM dropped_rollout_stats GROUP BY 1", limit_s=120.0).rows
        ),
        **_compute_duckdb_shares(store),
        **_summarize_snapshots(soak),
        "failed": failed,
    }


def _count_violations(soak: SoakTest, store: Store) -> dict[str, int]:
    """Count what the trainer must never do, and the records that no stage could process."""
    bounds = [soak.settings.train.max_staleness, soak.settings.train.max_reward_staleness]
    return {
        **{name: int(store.query(sql, bounds, limit_s=120.0).rows[0][0]) for name, sql in _INVARIANT_QUERIES.items()},
        "unreproducible_batches": _count_unreproducible_batches(soak),
        "dead_letters": int(store.query("SELECT count(*) FROM raw.dead_letters").rows[0][0]),
    }


def compute_limits(shares: Mapping[str, float], num_starved: int, longest_wait_s: float) -> dict[str, dict[str, Any]]:
    """Return whether each limit holds. `shares` are those of the completions since the first reward model."""
    dropped, trained = shares.get("dropped", 0.0), shares.get("trained", 0.0)
    return {
        f"dropped completions <= {_MAX_DROPPED:.0%}": {"value": dropped, "holds": dropped <= _MAX_DROPPED},
        f"completions that trained RL >= {_MIN_TRAINED:.0%}": {"value": trained, "holds": trained >= _MIN_TRAINED},
        f"no update waited more than {_STARVATION_S:.0f} s": {"value": round(longest_wait_s, 1), "holds": num_starved == 0},
    }


def count_starved_updates(store: Store) -> tuple[int, float]:
    """Return the number of starved updates since the first reward model, and the longest time without a new batch in seconds."""
    ((num_starved, longest_s),) = store.query(_STARVED_SQL, {"limit": _STARVATION_S}, limit_s=60.0).rows
    return int(num_starved), float(longest_s)


def _read_rejected_texts(store: Store) -> dict[str, int]:
    """Return the number of texts that the gates of the generator rejected, by reason."""
    rows = store.query_dicts("SELECT rejected FROM producer_offsets WHERE recipe_hash <> '' LIMIT 1")
    return dict(rows[0]["rejected"]) if rows else {}


def _summarize_snapshots(soak: SoakTest) -> dict[str, Any]:
    lags = [snapshot.sink_lag for snapshot in soak.snapshots]
    memory = {
        f"{name}_mb": _summarize_memory([getattr(snapshot, f"{name}_mb") for snapshot in soak.snapshots]) for name in SERVICES
    }
    return memory | {"sink_lag": {"median": median(lags), "max": max(lags)} if lags else {}}


def _compute_rollout_shares(store: Store) -> dict[str, Any]:
    """Return which share of the completions RL trained on, dropped, left to the reward model, or could still use at the end.

    Before the first reward model, RL cannot train. So the shares of the completions since then are also returned.
    """
    sql = """
        WITH fates AS (
            SELECT CASE WHEN response_id IN (SELECT response_id FROM trained_rollouts WHERE trained) THEN 'trained'
                        WHEN response_id IN (SELECT dropped_id FROM dropped_rollouts) THEN 'dropped'
                        WHEN purpose = 'REWARD' THEN 'for_reward_model' ELSE 'unused' END AS fate FROM rollouts
            WHERE created_at > coalesce((SELECT min(created_at) FROM policies WHERE kind = 'REWARD' AND $since), '1970-01-01'))
        SELECT fate, count(*) / (SELECT count(*) FROM fates) FROM fates GROUP BY 1 ORDER BY 1"""
    all_shares, shares_since = (
        {fate: round(share, 3) for fate, share in store.query(sql, {"since": since}, limit_s=60.0).rows}
        for since in (False, True)
    )
    held = "SELECT count(*) FROM allowances WHERE num_completions = 0"
    shares = {"completion_shares": all_shares, "completion_shares_since_the_first_reward_model": shares_since}
    return shares | {"allowances_of_zero": store.query(held, limit_s=60.0).rows[0][0]}


def _count_unreproducible_batches(soak: SoakTest) -> int:
    """Return the number of batches that cannot be rebuilt exactly from the database."""
    from trainer.batches import rebuild_batch

    bus, store, failed = open_bus_from_settings(soak.settings), open_store(soak.settings), 0
    for value in read_values(bus, BatchManifest.topic):
        try:
            rebuild_batch(store, decode_record(value, BatchManifest))
        except CharterError as error:
            print(error, file=sys.stderr)
            failed += 1
    bus.close()
    return failed


def _compute_duckdb_shares(store: Store) -> dict[str, float]:
    """Return DuckDB's share of the update time, and its share of the total time, which includes polling for new rows."""
    sql = """SELECT sum(metrics['duckdb_s']) / sum(metrics['wall_s']), arg_max(metrics['alive_duckdb_share'], commit_seq)
             FROM metrics WHERE phase = 'loop'"""
    ((update_share, total_share),) = store.query(sql, limit_s=60.0).rows
    return {"duckdb_share_of_updates": update_share, "duckdb_share_of_total": total_share}


def _summarize_memory(sizes_mb: Sequence[float]) -> dict[str, float]:
    """Return the resident memory in MB after the first quarter, at the end, and at the peak.

    The first two numbers are medians over a tenth of the snapshots.
    """
    tenth, quarter = max(1, len(sizes_mb) // 10), len(sizes_mb) // 4
    early, late = sizes_mb[quarter : quarter + tenth], sizes_mb[-tenth:]
    sizes = {"early": median(early or [0.0]), "late": median(late or [0.0]), "max": max(sizes_mb, default=0.0)}
    return {name: round(size, 1) for name, size in sizes.items()}
