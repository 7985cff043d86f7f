"""Load win rates by principle, position bias, label distribution, calibration and agreement for the preferences view.

The views in `engine/stats_views.sql` have separate rows for each run. This module adds the counts of several runs, and computes
the intervals from the sums.
"""

from __future__ import annotations

from typing import Any

from charter.dashboard.intervals import compute_share
from engine.statistics import compute_wilson_interval
from engine.store import QueryFunction

_NUM_BINS = 10
_RUN_FILTER = "($run = '' OR run_id = $run)"


def load_preferences(query: QueryFunction, run: str) -> dict[str, Any]:
    """Return the statistics of the labels of one run. If `run` is empty, include all runs."""
    parameters = {"run": run}
    outcomes = (
        f"SELECT outcome, label_source, count(*) AS count FROM preferences WHERE {_RUN_FILTER} GROUP BY ALL ORDER BY count DESC"
    )
    return {
        "run": run,
        "outcomes": query(outcomes, parameters).to_dicts(),
        "principles": _load_principle_stats(query, parameters),
        "rounds": _load_round_stats(query, parameters),
        "position_bias": _load_position_bias(query, parameters),
        "label_histogram": _load_histogram(
            query, "p_a", f"preference_labels WHERE label_source <> 'CONTRAST' AND {_RUN_FILTER}", parameters
        ),
        "reward_calibration": _load_reward_calibration(query, parameters),
        "human_calibration": _load_human_calibration(query, parameters),
        "agreement": _load_agreement(query, parameters),
    }


def _load_principle_stats(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the share of FLAWED verdicts, the win rate and the position flips for each principle and stage (critique, judge).

    In the critique stage, a win means that the revision is preferred. In the judge stage, a win means that response A is preferred.
    """
    sql = f"""SELECT stage, principle_id AS principle, pairing, sum(asked)::BIGINT AS asked, sum(answered)::BIGINT AS answered,
                     sum(fired)::BIGINT AS fired, sum(compared)::BIGINT AS compared, sum(wins) AS wins,
                     sum(refused)::BIGINT AS refused
              FROM principle_stats WHERE {_RUN_FILTER} GROUP BY ALL ORDER BY stage DESC, asked DESC, principle LIMIT 200"""
    rows = query(sql, parameters).to_dicts()
    bias = {
        row["principle"]: row
        for row in query(_POSITION_BIAS_SQL.format(by="principle_id AS principle,"), parameters).to_dicts()
    }
    for row in rows:
        row.update(compute_share("fire", row["fired"], row["answered"]) | compute_share("win", row["wins"], row["compared"]))
        flips = bias.get(row["principle"]) if row["stage"] == "judge" else None
        row.update(compute_share("flip", flips["flips"], flips["judged"]) if flips else compute_share("flip", 0, 0))
    return rows


_POSITION_BIAS_SQL = f"""SELECT {{by}} sum(judged)::BIGINT AS judged, sum(flips)::BIGINT AS flips,
                      sum(first_place * judged) / sum(judged) AS first_place, sum(mean_position_gap * judged) / sum(judged) AS mean_position_gap
               FROM position_bias_stats WHERE {_RUN_FILTER} GROUP BY ALL"""


def _load_round_stats(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return counts, similarity, length change, win rate and end reasons of chains for each revision round."""
    sql = f"""SELECT round, sum(revisions)::BIGINT AS revisions, sum(unusable)::BIGINT AS unusable,
                     sum(compared)::BIGINT AS compared, sum(wins) AS wins,
                     sum(mean_similarity * revisions) / sum(revisions) AS similarity,
                     sum(mean_length_change * revisions) / sum(revisions) AS length_change, sum(satisfied)::BIGINT AS satisfied,
                     sum(lost)::BIGINT AS lost, sum(last_round)::BIGINT AS last_round
              FROM revision_stats WHERE {_RUN_FILTER} GROUP BY 1 ORDER BY 1 LIMIT 50"""
    return [row | compute_share("win", row["wins"] or 0, row["compared"]) for row in query(sql, parameters).to_dicts()]


def _load_position_bias(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the mean probability of the response shown first, and the position flips (Zheng et al. 2023, sec. 3.3).

    A mean probability of 0.5 means that there is no position bias.
    """
    rows = query(_POSITION_BIAS_SQL.format(by=""), parameters).to_dicts()
    totals = rows[0] if rows else {"judged": 0, "flips": 0, "first_place": None, "mean_position_gap": None}
    histogram = _load_histogram(query, "position_gap", f"preferences WHERE {_RUN_FILTER} AND label_source = 'AI'", parameters)
    return totals | compute_share("flip", totals["flips"] or 0, totals["judged"] or 0) | {"gap_histogram": histogram}


def _load_histogram(query: QueryFunction, column: str, source: str, parameters: dict[str, Any]) -> list[int]:
    """Return the number of values of a column in each tenth of the range from 0 to 1."""
    sql = f"""SELECT least({_NUM_BINS - 1}, floor({column} * {_NUM_BINS}))::INTEGER AS bin, count(*) AS n
              FROM {source} AND {column} IS NOT NULL AND NOT isnan({column}) GROUP BY 1"""
    counts = [0] * _NUM_BINS
    for index, n in query(sql, parameters).rows:
        counts[index] = n
    return counts


def _load_reward_calibration(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """Compare sigmoid(score_a - score_b) of the reward model with the share of pairs in which the judge prefers A.

    Only pairs with scores for both completions are used. If several reward models scored a completion, the newest score is used.
    """
    sql = f"""WITH newest AS (SELECT response_id, completion_index, arg_max(score, reward_version) AS score FROM scores GROUP BY ALL)
              SELECT least({_NUM_BINS - 1}, floor(p * {_NUM_BINS}))::INTEGER AS bin, count(*) AS n, avg(p) AS predicted,
                     count(*) FILTER (p_a > 0.5) AS hits
              FROM (SELECT p_a, 1 / (1 + exp(two.score - one.score)) AS p FROM preferences
                    JOIN newest one ON one.response_id = preferences.response_id AND one.completion_index = completion_index_a
                    JOIN newest two ON two.response_id = preferences.response_id AND two.completion_index = completion_index_b
                    WHERE {_RUN_FILTER} AND outcome = 'OK' AND p_a <> 0.5) GROUP BY 1 ORDER BY 1"""
    return _compute_reliability(query(sql, parameters).to_dicts())


def _load_human_calibration(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the calibration of the judge's probability on the pairs that also have a human label."""
    sql = f"""SELECT p_from, sum(pairs)::BIGINT AS n, sum(mean_p_ai * pairs) / sum(pairs) AS predicted,
                     sum(human_share * pairs) AS hits
              FROM label_calibration_stats WHERE {_RUN_FILTER} GROUP BY 1 ORDER BY 1"""
    return _compute_reliability(query(sql, parameters).to_dicts())


def _compute_reliability(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the bins of a reliability diagram and the expected calibration error (Guo et al. 2017)."""
    for row in rows:
        row["observed"], row["interval"] = row["hits"] / row["n"], compute_wilson_interval(row["hits"], row["n"])
    n = sum(row["n"] for row in rows)
    error = sum(row["n"] * abs(row["observed"] - row["predicted"]) for row in rows) / n if n else None
    return {"num_pairs": n, "calibration_error": error, "bins": rows}


def _load_agreement(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each judge model, the share of pairs for which the judge and the human label prefer the same response."""
    sql = f"""SELECT model, preset, sum(pairs)::BIGINT AS pairs, sum(decided)::BIGINT AS decided, sum(agreed)::BIGINT AS agreed,
                     sum(brier * pairs) / sum(pairs) AS brier
              FROM label_agreement_stats WHERE {_RUN_FILTER} GROUP BY ALL ORDER BY pairs DESC LIMIT 50"""
    return [row | compute_share("agreement", row["agreed"], row["decided"]) for row in query(sql, parameters).to_dicts()]
