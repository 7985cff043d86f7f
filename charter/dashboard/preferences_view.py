"""The preferences view: who wins under which principle, whether the order of the answers decides, and whether labels hold.

It asks the views of `engine/stats_views.sql`; over several runs their counts are added and the intervals taken anew.
"""

from __future__ import annotations

from typing import Any

from charter.dashboard.intervals import compute_share
from engine.statistics import compute_wilson_interval
from engine.store import QueryFunction

_NUM_BINS = 10
_RUN_FILTER = "($run = '' OR run_id = $run)"


def load_preferences(query: QueryFunction, run: str) -> dict[str, Any]:
    """Everything about the labels; of one run, or of all when `run` is empty."""
    values = {"run": run}
    outcomes = f"SELECT outcome, label_source, count(*) AS n FROM preferences WHERE {_RUN_FILTER} GROUP BY ALL ORDER BY n DESC"
    return {
        "run": run,
        "outcomes": query(outcomes, values).to_dicts(),
        "principles": _load_principle_stats(query, values),
        "rounds": _load_round_stats(query, values),
        "position": _load_position_bias(query, values),
        "labels": _load_histogram(query, "p_a", f"preference_labels WHERE {_RUN_FILTER}", values),
        "reward_calibration": _load_reward_calibration(query, values),
        "human_calibration": _load_human_calibration(query, values),
        "agreement": _load_agreement(query, values),
    }


def _load_principle_stats(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Each principle as a critic's and as a judge's: how often it fires, and how often its revision (or `a`) wins."""
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
        judged = bias.get(row["principle"]) if row["stage"] == "judge" else None
        row.update(compute_share("flip", judged["flips"], judged["judged"]) if judged else compute_share("flip", 0, 0))
    return rows


_POSITION_BIAS_SQL = f"""SELECT {{by}} sum(judged)::BIGINT AS judged, sum(flips)::BIGINT AS flips,
                      sum(first_place * judged) / sum(judged) AS first_place, sum(mean_position_gap * judged) / sum(judged) AS mean_position_gap
               FROM position_bias_stats WHERE {_RUN_FILTER} GROUP BY ALL"""


def _load_round_stats(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """What each round of revision does."""
    sql = f"""SELECT round, sum(revisions)::BIGINT AS revisions, sum(unusable)::BIGINT AS unusable,
                     sum(compared)::BIGINT AS compared, sum(wins) AS wins,
                     sum(mean_similarity * revisions) / sum(revisions) AS similarity,
                     sum(mean_length_change * revisions) / sum(revisions) AS length_change, sum(satisfied)::BIGINT AS satisfied,
                     sum(lost)::BIGINT AS lost, sum(last_round)::BIGINT AS last_round
              FROM revision_stats WHERE {_RUN_FILTER} GROUP BY 1 ORDER BY 1 LIMIT 50"""
    return [row | compute_share("win", row["wins"] or 0, row["compared"]) for row in query(sql, parameters).to_dicts()]


def _load_position_bias(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """How much judges favour the answer that they are shown first: a half is not at all (Zheng et al. 2023, section 3.3)."""
    found = query(_POSITION_BIAS_SQL.format(by=""), parameters).to_dicts()
    both = found[0] if found else {"judged": 0, "flips": 0, "first_place": None, "mean_position_gap": None}
    gaps = _load_histogram(query, "position_gap", f"preferences WHERE {_RUN_FILTER} AND label_source = 'AI'", parameters)
    return both | compute_share("flip", both["flips"] or 0, both["judged"] or 0) | {"gaps": gaps}


def _load_histogram(query: QueryFunction, column: str, source: str, parameters: dict[str, Any]) -> list[int]:
    """How many values of a column fall into each tenth of the span from 0 to 1."""
    sql = f"""SELECT least({_NUM_BINS - 1}, floor({column} * {_NUM_BINS}))::INTEGER AS bin, count(*) AS n
              FROM {source} AND {column} IS NOT NULL AND NOT isnan({column}) GROUP BY 1"""
    found = [0] * _NUM_BINS
    for number, n in query(sql, parameters).rows:
        found[number] = n
    return found


def _load_reward_calibration(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """Whether the reward model's margin means what it says: sigmoid(score a - score b) against how often the judge prefers a.

    Pairs of which the newest reward model that looked at them has scored both answers.
    """
    sql = f"""WITH newest AS (SELECT response_id, completion_index, arg_max(score, reward_version) AS score FROM scores GROUP BY ALL)
              SELECT least({_NUM_BINS - 1}, floor(p * {_NUM_BINS}))::INTEGER AS bin, count(*) AS n, avg(p) AS said,
                     count(*) FILTER (p_a > 0.5) AS hits
              FROM (SELECT p_a, 1 / (1 + exp(two.score - one.score)) AS p FROM preferences
                    JOIN newest one ON one.response_id = preferences.response_id AND one.completion_index = completion_index_a
                    JOIN newest two ON two.response_id = preferences.response_id AND two.completion_index = completion_index_b
                    WHERE {_RUN_FILTER} AND outcome = 'OK' AND p_a <> 0.5) GROUP BY 1 ORDER BY 1"""
    return _compute_reliability(query(sql, parameters).to_dicts())


def _load_human_calibration(query: QueryFunction, parameters: dict[str, Any]) -> dict[str, Any]:
    """Whether the judge's probability means what it says, where a person has labelled the same pair."""
    sql = f"""SELECT p_from, sum(pairs)::BIGINT AS n, sum(mean_p_ai * pairs) / sum(pairs) AS said,
                     sum(human_share * pairs) AS hits
              FROM label_calibration_stats WHERE {_RUN_FILTER} GROUP BY 1 ORDER BY 1"""
    return _compute_reliability(query(sql, parameters).to_dicts())


def _compute_reliability(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The bins of a reliability diagram, and the expected calibration error (Guo et al. 2017)."""
    for row in rows:
        row["share"], row["interval"] = row["hits"] / row["n"], compute_wilson_interval(row["hits"], row["n"])
    n = sum(row["n"] for row in rows)
    error = sum(row["n"] * abs(row["share"] - row["said"]) for row in rows) / n if n else None
    return {"n": n, "error": error, "bins": rows}


def _load_agreement(query: QueryFunction, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """How often judge and person prefer the same answer, by judge."""
    sql = f"""SELECT model, preset, sum(pairs)::BIGINT AS pairs, sum(decided)::BIGINT AS decided, sum(agreed)::BIGINT AS agreed,
                     sum(brier * pairs) / sum(pairs) AS brier
              FROM label_agreement_stats WHERE {_RUN_FILTER} GROUP BY ALL ORDER BY pairs DESC LIMIT 50"""
    return [row | compute_share("agreement", row["agreed"], row["decided"]) for row in query(sql, parameters).to_dicts()]
