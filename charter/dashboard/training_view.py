"""The training view: losses, accuracy, reward against KL, policy versions in time, staleness, incidents, what was dropped."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from charter.dashboard.intervals import compute_share
from engine.store import QueryFunction

MAX_STEPS = 50_000  # the newest
MAX_VERSIONS = 500  # the newest
_MAX_CURVE_POINTS = 300  # of one curve; more steps are averaged

# The curves of each phase, in the order in which they are shown: metric -> (title, unit).
_CURVES = {
    "sft": {
        "loss": ("Loss", "nats per token"),
        "mean_token_accuracy": ("Token accuracy", "share"),
        "entropy": ("Entropy", "nats per token"),
    },
    "reward": {"loss": ("Loss", "nats per pair"), "accuracy": ("Accuracy", "share of pairs"), "margin": ("Margin", "reward")},
    "ppo": {
        "policy_loss": ("Policy loss", ""),
        "value_loss": ("Value loss", "reward squared"),
        "kl_ref": ("KL to the reference", "nats per sequence"),
        "kl_ref_per_token": ("KL to the reference, per token", "nats per token"),
        "kl_update": ("KL of the update", "nats per sequence"),
        "approx_kl": ("KL of the update, per token", "nats per token"),
        "entropy": ("Entropy", "nats per token"),
        "clipfrac": ("Clipped", "share of tokens"),
        "explained_variance": ("Explained variance", "share"),
        "reward_mean": ("Reward", "normalized"),
    },
    "dpo": {"loss": ("Loss", "nats per pair"), "accuracy": ("Accuracy", "share of pairs")},
    "loop": {"wall_s": ("Seconds of an update", "s"), "duckdb_share": ("Spent in DuckDB", "share of an update")},
}
_HIDDEN_METRICS = {"epoch", "step", "steps"}
# Beside the metrics of its curves, what a line about an update shows first.
_SUMMARY_METRICS = ("mean_loss", "reward/accuracy", "examples", "rollouts", "wall_s")


def select_main_metrics(phase: str, metrics: dict[str, float]) -> dict[str, float]:
    """The figures of an update that are looked at first; all of them where none is known."""
    wanted = [name for name in (*_CURVES.get(phase, {}), *_SUMMARY_METRICS) if name in metrics]
    return {name: metrics[name] for name in wanted} or metrics


def load_training(query: QueryFunction, run: str) -> dict[str, Any]:
    """Everything about training; of one run, or of all when `run` is empty."""
    values = {"run": run}
    of_run = "WHERE ($run = '' OR run_id = $run)"
    updates = query(
        f"""SELECT kind, version, phase, base_version, batch_id, uri, metrics, created_at
            FROM policies {of_run} ORDER BY commit_seq DESC""",
        values,
        MAX_VERSIONS,
    ).to_dicts()[::-1]
    drawn = _load_batches(query, of_run, values)
    sql = f"SELECT created_at, phase, title, detail, metrics FROM incidents {of_run} ORDER BY commit_seq DESC"
    incidents = query(sql, values, 50).to_dicts()
    return {
        "run": run,
        "phases": _load_phases(query, of_run, values),
        "policies": load_policy_stats(query, run),
        "watched": _load_monitor_checks(query, of_run, values),
        "paused": query("SELECT phase, reason, since FROM paused_phases ORDER BY since", (), 20).to_dicts(),
        "frontier": _compute_frontier(updates),
        "updates": updates,
        "batches": drawn,
        "lanes": _build_lanes(updates, drawn, incidents),
        "staleness": _load_staleness(query, run),
        "incidents": incidents,
        "drops": query(
            f"SELECT reason, count(*) AS n FROM dropped_rollouts {of_run} GROUP BY 1 ORDER BY n DESC", values, 50
        ).to_dicts(),
    }


_TimelineLane = tuple[str, list[tuple[Any, str, str]]]


def _build_lanes(
    updates: list[dict[str, Any]], batches: list[dict[str, Any]], incidents: list[dict[str, Any]]
) -> list[_TimelineLane]:
    """What the time axis shows: (lane, [(time, mark, title)])."""

    def of_kind(kind: str) -> list[tuple[Any, str, str]]:
        chosen = [update for update in updates if update["kind"] == kind]
        return [(u["created_at"], str(u["version"]), f"{kind.lower()} {u['version']} from {u['phase']}") for u in chosen]

    batches_drawn = [
        (b["created_at"], b["phase"], f"{b['phase']} batch {b['batch_number']}: {b['rows']} rows") for b in reversed(batches)
    ]
    stops = [(i["created_at"], "", f"{i['phase']}: {i['title']}") for i in reversed(incidents)]
    return [
        ("policies", of_kind("POLICY")),
        ("reward models", of_kind("REWARD")),
        ("batches", batches_drawn),
        ("incidents", stops),
    ]


def _load_phases(query: QueryFunction, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """For each phase its curves: {metric, title, unit, points: [(step over all updates, value)], updates: [first steps]}."""
    sql = f"SELECT phase, batch_number, step, metrics FROM metrics {where} AND phase <> 'monitor' ORDER BY commit_seq DESC"
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reversed(query(sql, parameters, MAX_STEPS).to_dicts()):
        by_phase[row["phase"]].append(row)
    order = [*(phase for phase in _CURVES if phase in by_phase), *(phase for phase in by_phase if phase not in _CURVES)]
    return [{"phase": phase, **_build_curves(phase, by_phase[phase])} for phase in order]


def _build_curves(phase: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    starts: list[dict[str, int]] = []
    for at, row in enumerate(rows):
        if not starts or starts[-1]["number"] != row["batch_number"]:
            starts.append({"at": at, "number": row["batch_number"]})
        for name, value in row["metrics"].items():
            points[name].append((at, value))
    known = _CURVES.get(phase, {})
    names = [name for name in known if name in points] + sorted(set(points) - set(known) - _HIDDEN_METRICS)
    curves = [
        {
            "metric": name,
            "title": known.get(name, (name, ""))[0],
            "unit": known.get(name, ("", ""))[1],
            "points": _downsample(points[name]),
        }
        for name in names
    ]
    return {"steps": len(rows), "updates": starts, "curves": curves, "main": sum(name in points for name in known)}


def _downsample(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: each the mean of as many neighbours."""
    size = -(-len(points) // _MAX_CURVE_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _compute_frontier(updates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each PPO update the reward that it reached and the KL to the reference that it cost (Bai et al. 2022, figure 13)."""
    found = []
    for update in updates:
        metrics = update["metrics"] or {}
        kl = next((metrics[name] for name in ("kl_ref", "kl_rollouts") if name in metrics), None)
        if update["kind"] == "POLICY" and kl is not None and "reward_mean" in metrics:
            found.append({"version": update["version"], "kl": kl, "reward": metrics["reward_mean"]})
    return found


def load_policy_stats(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """For the first policy and the newest ones what became of their answers: found flawed, ended satisfied, and scored by the
    newest reward model."""
    sql = """WITH answered AS (
                 SELECT policy_version, count(*) AS prompts, sum(completion_tokens) / sum(len(completions)) AS tokens
                 FROM responses WHERE $run = '' OR run_id = $run GROUP BY 1),
             criticised AS (
                 SELECT policy_version, count(*) FILTER (round = 0 AND verdict IN ('CLEAN', 'FLAWED')) AS said,
                        count(*) FILTER (round = 0 AND verdict = 'FLAWED') AS flawed, count(*) FILTER (final) AS ended,
                        count(*) FILTER (final AND end_reason = 'SATISFIED') AS satisfied
                 FROM critiques WHERE $run = '' OR run_id = $run GROUP BY 1),
             scored AS (
                 SELECT r.policy_version, s.reward_version, avg(s.normalized_score) AS reward,
                        1.96 * stddev_samp(s.normalized_score) / sqrt(count(*)) AS reward_error
                 FROM scores s JOIN responses r ON r.record_id = s.response_id WHERE $run = '' OR r.run_id = $run
                 GROUP BY 1, 2 QUALIFY row_number() OVER (PARTITION BY r.policy_version ORDER BY s.reward_version DESC) = 1)
             SELECT * FROM answered LEFT JOIN criticised USING (policy_version) LEFT JOIN scored USING (policy_version)
             WHERE policy_version IS NOT NULL
             QUALIFY row_number() OVER (ORDER BY policy_version DESC) < $most OR row_number() OVER (ORDER BY policy_version) = 1
             ORDER BY policy_version"""
    return [
        row
        | compute_share("flawed", row["flawed"] or 0, row["said"] or 0)
        | compute_share("satisfied", row["satisfied"] or 0, row["ended"] or 0)
        for row in query(sql, {"run": run, "most": MAX_VERSIONS}).to_dicts()
    ]


def _load_monitor_checks(query: QueryFunction, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Each look at a policy for signs of reward hacking, newest first (docs/training.md)."""
    sql = f"""SELECT policy_version, metrics['reference'] AS reference, metrics['tripped'] AS tripped,
                     metrics['judge_wins'] AS judge_wins, metrics['judge_low'] AS judge_low,
                     metrics['judge_high'] AS judge_high, metrics['proxy_gain'] AS proxy_gain,
                     metrics['perplexity'] AS perplexity, metrics['perplexity_reference'] AS perplexity_reference, created_at
              FROM metrics {where} AND phase = 'monitor' ORDER BY commit_seq DESC"""
    return query(sql, parameters, 50).to_dicts()


def _load_batches(query: QueryFunction, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    sql = f"""SELECT created_at, phase, batch_number, len(record_ids) AS rows, base_policy_version, base_reward_version,
                     commit_seq_from, commit_seq_to, mixture, record_id FROM batches {where} ORDER BY commit_seq DESC"""
    return query(sql, parameters, 50).to_dicts()


def _load_staleness(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """For each PPO batch how old its answers were when it was drawn: in policy versions, and in seconds."""
    return query(
        """WITH drawn AS (SELECT record_id AS batch, created_at, commit_seq, batch_number, phase, base_policy_version,
                                 unnest(record_ids) AS row FROM batches
                          WHERE phase = 'ppo' AND ($run = '' OR run_id = $run))
           SELECT drawn.batch_number, any_value(drawn.created_at) AS created_at, count(*) AS rows,
                  avg(base_policy_version - policy_version) AS versions,
                  max(base_policy_version - policy_version) AS most_versions,
                  avg(epoch(drawn.created_at - responses.created_at)) AS age_s,
                  max(epoch(drawn.created_at - responses.created_at)) AS most_age_s
           FROM drawn JOIN responses ON responses.record_id = drawn.row GROUP BY drawn.batch, drawn.batch_number, drawn.commit_seq
           ORDER BY drawn.commit_seq DESC""",
        {"run": run},
        50,
    ).to_dicts()
