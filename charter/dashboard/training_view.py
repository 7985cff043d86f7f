"""Load metrics, reward against KL, policy versions, staleness, incidents and dropped rollouts for the training view."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from charter.dashboard.intervals import compute_share
from engine.statistics import Z_SCORE_95
from engine.store import QueryFunction
from engine.text import format_count

# Limits keep the page fast after a long training. The oldest rows are omitted.
MAX_STEPS = 50_000
MAX_VERSIONS = 500
_MAX_CURVE_POINTS = 300  # for one curve; longer curves are averaged in groups of steps

_GROUP_CURVES = {
    "policy_loss": ("Policy loss", ""),
    "kl_ref": ("KL to the reference", "nats per sequence"),
    "kl_ref_per_token": ("KL to the reference, per token", "nats per token"),
    "kl_update": ("KL of the update", "nats per sequence"),
    "approx_kl": ("KL of the update, per token", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "clipfrac": ("Clip fraction", "share"),
    "reward_mean": ("Reward", ""),
    "equal_groups": ("Groups with equal rewards", "groups"),
}
# Maps each phase to its curves, and each metric to (title, unit). The page shows the curves in this order.
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
        "clipfrac": ("Clip fraction", "share of tokens"),
        "explained_variance": ("Explained variance", "share"),
        "reward_mean": ("Reward", "normalized"),
    },
    "grpo": _GROUP_CURVES,
    "rloo": _GROUP_CURVES,
    "dpo": {"loss": ("Loss", "nats per pair"), "accuracy": ("Accuracy", "share of pairs")},
    "distill": {
        "loss": ("Divergence from the teacher", "nats per token"),
        "teacher_effect": ("Effect of the teacher", "nats per token"),
        "kl_ref": ("KL to the reference", "nats per sequence"),
        "kl_update": ("KL of the update", "nats per sequence"),
        "entropy": ("Entropy", "nats per token"),
        "completions/mean_length": ("Length of the completions", "tokens"),
        "completions/clipped_ratio": ("Truncated completions", "share"),
    },
    "loop": {"wall_s": ("Duration of an update", "s"), "duckdb_share": ("Time in DuckDB", "share of an update")},
}
_HIDDEN_METRICS = {"epoch", "step", "steps"}
# The table of updates shows these metrics in addition to the metrics of the curves.
_SUMMARY_METRICS = ("mean_loss", "reward/accuracy", "examples", "rollouts", "wall_s")


def select_main_metrics(phase: str, metrics: dict[str, float]) -> dict[str, float]:
    """Return the main metrics of an update. Return all metrics if the phase has no main metrics."""
    names = [name for name in (*_CURVES.get(phase, {}), *_SUMMARY_METRICS) if name in metrics]
    return {name: metrics[name] for name in names} or metrics


def load_training(query: QueryFunction, run: str) -> dict[str, Any]:
    """Return the data of the training view for one run. If `run` is empty, include all runs."""
    parameters = {"run": run}
    where = "WHERE ($run = '' OR run_id = $run)"
    updates = query(
        f"""SELECT kind, version, phase, base_version, batch_id, uri, metrics, created_at
            FROM policies {where} ORDER BY commit_seq DESC""",
        parameters,
        MAX_VERSIONS,
    ).to_dicts()[::-1]
    batches = _load_batches(query, where, parameters)
    sql = f"SELECT created_at, phase, title, detail, metrics FROM incidents {where} ORDER BY commit_seq DESC"
    incidents = query(sql, parameters, 50).to_dicts()
    return {
        "run": run,
        "phases": _load_phases(query, where, parameters),
        "policies": load_policy_stats(query, run),
        "monitor_checks": _load_monitor_checks(query, where, parameters),
        "paused_phases": query("SELECT phase, reason, since FROM paused_phases ORDER BY since", (), 20).to_dicts(),
        "frontier": _compute_frontier(updates),
        "updates": updates,
        "batches": batches,
        "timeline": _build_timeline(updates, batches, incidents),
        "staleness": _load_staleness(query, run),
        "incidents": incidents,
        "dropped_rollouts": query(
            f"SELECT reason, count(*) AS count FROM dropped_rollouts {where} GROUP BY 1 ORDER BY count DESC", parameters, 50
        ).to_dicts(),
    }


_TimelineRow = tuple[str, list[tuple[Any, str, str]]]


def _build_timeline(
    updates: list[dict[str, Any]], batches: list[dict[str, Any]], incidents: list[dict[str, Any]]
) -> list[_TimelineRow]:
    """Return the rows of the timeline as (name, [(time, label, title)])."""

    def list_versions(kind: str) -> list[tuple[Any, str, str]]:
        selected = [update for update in updates if update["kind"] == kind]
        return [(u["created_at"], str(u["version"]), f"{kind.lower()} {u['version']} from {u['phase']}") for u in selected]

    batch_events = [
        (b["created_at"], b["phase"], f"{b['phase']} batch {b['batch_number']}: {format_count(b['rows'], 'rows')}")
        for b in reversed(batches)
    ]
    incident_events = [(i["created_at"], "", f"{i['phase']}: {i['title']}") for i in reversed(incidents)]
    return [
        ("policies", list_versions("POLICY")),
        ("reward models", list_versions("REWARD")),
        ("batches", batch_events),
        ("incidents", incident_events),
    ]


def _load_phases(query: QueryFunction, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the curves of each phase as {metric, title, unit, points: [(step over all updates, value, name)], update_starts}.

    The steps over all updates begin with 1. The name of a point has the numbers that the trainer prints: the batch and its step.
    """
    sql = f"SELECT phase, batch_number, step, metrics FROM metrics {where} AND phase <> 'monitor' ORDER BY commit_seq DESC"
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reversed(query(sql, parameters, MAX_STEPS).to_dicts()):
        by_phase[row["phase"]].append(row)
    order = [*(phase for phase in _CURVES if phase in by_phase), *(phase for phase in by_phase if phase not in _CURVES)]
    return [{"phase": phase, **_build_curves(phase, by_phase[phase])} for phase in order]


def _build_curves(phase: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    points: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    starts: list[dict[str, int]] = []
    for step, row in enumerate(rows, 1):
        if not starts or starts[-1]["batch_number"] != row["batch_number"]:
            starts.append({"step": step, "batch_number": row["batch_number"]})
        for name, value in row["metrics"].items():
            points[name].append((step, value, f"batch {row['batch_number']}, step {row['step']}"))
    main_curves = _CURVES.get(phase, {})
    names = [name for name in main_curves if name in points] + sorted(set(points) - set(main_curves) - _HIDDEN_METRICS)
    curves = [
        {
            "metric": name,
            "title": main_curves.get(name, (name, ""))[0],
            "unit": main_curves.get(name, ("", ""))[1],
            "points": _downsample(points[name]),
        }
        for name in names
    ]
    num_main_curves = sum(name in points for name in main_curves)
    return {"num_steps": len(rows), "update_starts": starts, "curves": curves, "num_main_curves": num_main_curves}


def _downsample(points: list[tuple[int, float, str]]) -> list[tuple[float, float, str]]:
    """Return at most _MAX_CURVE_POINTS points. Each point is the mean of a group of consecutive points."""
    size = -(-len(points) // _MAX_CURVE_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _, _ in group), fmean(y for _, y, _ in group), _name_group(group)) for group in groups]


def _name_group(group: list[tuple[int, float, str]]) -> str:
    first, last = group[0][2], group[-1][2]
    return first if first == last else f"mean of {first} to {last}"


def _compute_frontier(updates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reward and the KL to the reference policy of each update on rollouts (Bai et al. 2022, figure 13)."""
    points = []
    for update in updates:
        metrics = update["metrics"] or {}
        kl = next((metrics[name] for name in ("kl_ref", "kl_rollouts") if name in metrics), None)
        if update["kind"] == "POLICY" and kl is not None and "reward_mean" in metrics:
            points.append({"version": update["version"], "kl": kl, "reward": metrics["reward_mean"]})
    return points


def load_policy_stats(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Return statistics of the responses of the first policy and of the newest policies.

    The statistics of a policy are the number of prompts, the tokens per completion, the share of initial responses with a FLAWED
    verdict, the share of chains that end SATISFIED, and the mean reward by the newest reward model that scored its responses.
    """
    sql = f"""WITH responded AS (
                 SELECT policy_version, count(*) AS prompts, sum(completion_tokens) / sum(len(completions)) AS tokens
                 FROM responses WHERE split <> 'SUITE' AND ($run = '' OR run_id = $run) GROUP BY 1),
             criticized AS (
                 SELECT policy_version, count(*) FILTER (round = 0 AND verdict IN ('CLEAN', 'FLAWED')) AS critiqued,
                        count(*) FILTER (round = 0 AND verdict = 'FLAWED') AS flawed, count(*) FILTER (final) AS ended,
                        count(*) FILTER (final AND end_reason = 'SATISFIED') AS satisfied
                 FROM critiques WHERE $run = '' OR run_id = $run GROUP BY 1),
             scored AS (
                 SELECT r.policy_version, s.reward_version, avg(s.normalized_score) AS reward,
                        {Z_SCORE_95} * stddev_samp(s.normalized_score) / sqrt(count(*)) AS reward_error
                 FROM scores s JOIN responses r ON r.record_id = s.response_id WHERE r.split <> 'SUITE' AND ($run = '' OR r.run_id = $run)
                 GROUP BY 1, 2 QUALIFY row_number() OVER (PARTITION BY r.policy_version ORDER BY s.reward_version DESC) = 1)
             SELECT * FROM responded LEFT JOIN criticized USING (policy_version) LEFT JOIN scored USING (policy_version)
             WHERE policy_version IS NOT NULL
             QUALIFY row_number() OVER (ORDER BY policy_version DESC) < $max_versions OR row_number() OVER (ORDER BY policy_version) = 1
             ORDER BY policy_version"""
    return [
        row
        | compute_share("flawed", row["flawed"] or 0, row["critiqued"] or 0)
        | compute_share("satisfied", row["satisfied"] or 0, row["ended"] or 0)
        for row in query(sql, {"run": run, "max_versions": MAX_VERSIONS}).to_dicts()
    ]


def _load_monitor_checks(query: QueryFunction, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the checks of the reward-hacking monitor, newest first (docs/training.md)."""
    sql = f"""SELECT policy_version, metrics['reference'] AS reference, metrics['limits_exceeded'] AS limits_exceeded,
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
    """Return how old the rollouts of each RL batch were when the batch was sampled, in policy versions and in seconds.

    Only batches of rollouts have responses as rows.
    """
    return query(
        """WITH sampled AS (SELECT record_id AS batch, created_at, commit_seq, batch_number, phase, base_policy_version,
                                 unnest(record_ids) AS row FROM batches
                          WHERE $run = '' OR run_id = $run)
           SELECT sampled.batch_number, any_value(sampled.phase) AS phase, any_value(sampled.created_at) AS created_at, count(*) AS rows,
                  avg(base_policy_version - policy_version) AS mean_versions_behind,
                  max(base_policy_version - policy_version) AS max_versions_behind,
                  avg(epoch(sampled.created_at - responses.created_at)) AS mean_age_s,
                  max(epoch(sampled.created_at - responses.created_at)) AS max_age_s
           FROM sampled JOIN responses ON responses.record_id = sampled.row GROUP BY sampled.batch, sampled.batch_number, sampled.commit_seq
           ORDER BY sampled.commit_seq DESC""",
        {"run": run},
        50,
    ).to_dicts()
