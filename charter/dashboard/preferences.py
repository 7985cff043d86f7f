"""The preferences view: who wins under which principle, whether the order of the answers decides, and whether labels hold."""

from __future__ import annotations

from typing import Any

from charter.dashboard.intervals import of_mean, of_share
from engine.store import Ask

BINS = 10

# One row a judgement of a run (a run's records are those that it made, those too that another run had made before).
JUDGED = """SELECT DISTINCT ON (record_id) record_id, prompt_id, response_id, a_candidate, b_candidate, hash(a) AS a, hash(b) AS b,
                   principle_id, pairing, outcome, label_source, p_a, p_forward, p_backward, gap, mass, flipped
            FROM raw.preferences WHERE run_id = $run"""
ALL = """SELECT record_id, prompt_id, response_id, a_candidate, b_candidate, hash(a) AS a, hash(b) AS b, principle_id, pairing,
                outcome, label_source, p_a, p_forward, p_backward, gap, mass, flipped FROM preferences WHERE $run = ''"""


def gather(ask: Ask, run: str) -> dict[str, Any]:
    """Everything about the labels; of one run, or of all when `run` is empty."""
    judged = f"WITH judged AS NOT MATERIALIZED ({JUDGED if run else ALL})"
    values = {"run": run}
    return {
        "run": run,
        "outcomes": ask(f"{judged} SELECT outcome, label_source, count(*) AS n FROM judged GROUP BY ALL ORDER BY n DESC", values).records(),
        "principles": principles(ask, judged, values),
        "revising": revising(ask, run),
        "position": position(ask, judged, values),
        "labels": histogram(ask, judged, values),
        "reward_calibration": reward_calibration(ask, judged, values),
        "human_calibration": human_calibration(ask, judged, values),
        "agreement": agreement(ask, judged, values),
    }


def principles(ask: Ask, judged: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """For each judging principle: how often it gives a label, how sure, how often the order of the answers turns it around.

    `win` is the mean probability that the first-named answer wins; with the pairing `revision` that is the revision.
    """
    sql = f"""{judged} SELECT principle_id AS principle, pairing, count(*) AS judged, count(p_a) FILTER (outcome = 'OK') AS labels,
                     avg(p_a) FILTER (outcome = 'OK') AS win, stddev_samp(p_a) FILTER (outcome = 'OK') AS deviation,
                     avg(2 * abs(p_a - 0.5)) FILTER (outcome = 'OK') AS sureness,
                     count(*) FILTER (flipped) AS flips, avg(gap) AS gap, avg(mass) AS mass
              FROM judged WHERE label_source <> 'HUMAN' GROUP BY ALL ORDER BY judged DESC, principle LIMIT 100"""
    rows = ask(sql, values).records()
    for row in rows:
        row["win_interval"] = clipped(of_mean(row["win"], row.pop("deviation"), row["labels"]))
        row["flip_share"] = row["flips"] / row["judged"]
        row["flip_interval"] = of_share(row["flips"], row["judged"])
    return rows


def revising(ask: Ask, run: str) -> list[dict[str, Any]]:
    """For each critique principle: how often a text was flawed, and how often its revision was better than what it revised."""
    source = "raw.critiques WHERE run_id = $run AND" if run else "critiques WHERE $run = '' AND"
    sql = f"""SELECT principle_id AS principle, count(*) FILTER (verdict IN ('CLEAN', 'FLAWED')) AS verdicts,
                     count(*) FILTER (verdict = 'FLAWED') AS flawed, count(p_better) AS compared,
                     count(*) FILTER (p_better > 0.5) AS better, avg(p_better) AS p_better
              FROM {source} principle_id IS NOT NULL GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 100"""
    rows = ask(sql, {"run": run}).records()
    for row in rows:
        row["flawed_interval"] = of_share(row["flawed"], row["verdicts"])
        row["better_interval"] = of_share(row["better"], row["compared"])
    return rows


def clipped(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def position(ask: Ask, judged: str, values: dict[str, Any]) -> dict[str, Any]:
    """How much the judge favours the answer that it is shown first: 0.5 is not at all (Zheng et al. 2023, section 3.3)."""
    sql = f"""{judged} SELECT count(*) AS n, avg(first) AS mean, stddev_samp(first) AS deviation,
                     count(*) FILTER (flipped) AS flips, avg(gap) AS gap
              FROM (SELECT *, (p_forward + 1 - p_backward) / 2 AS first FROM judged
                    WHERE p_forward IS NOT NULL AND p_backward IS NOT NULL)"""
    found = ask(sql, values).records()[0]
    found["interval"] = clipped(of_mean(found["mean"], found.pop("deviation"), found["n"]))
    found["flip_interval"] = of_share(found["flips"], found["n"])
    gaps = f"""{judged} SELECT least({BINS - 1}, floor(gap * {BINS}))::INTEGER AS bin, count(*) AS n FROM judged
               WHERE gap IS NOT NULL GROUP BY 1"""
    return found | {"gaps": bins(ask(gaps, values).rows)}


def histogram(ask: Ask, judged: str, values: dict[str, Any]) -> list[int]:
    """How many labels fall into each tenth of p(a)."""
    sql = f"""{judged} SELECT least({BINS - 1}, floor(p_a * {BINS}))::INTEGER AS bin, count(*) AS n FROM judged
              WHERE outcome = 'OK' AND p_a IS NOT NULL GROUP BY 1"""
    return bins(ask(sql, values).rows)


def bins(rows: list[tuple[Any, ...]]) -> list[int]:
    found = [0] * BINS
    for number, n in rows:
        found[number] = n
    return found


def reward_calibration(ask: Ask, judged: str, values: dict[str, Any]) -> dict[str, Any]:
    """Whether the reward model's margin means what it says: sigmoid(score a - score b) against how often the judge prefers a.

    Pairs of the newest reward model that scored both answers.
    """
    sql = f"""{judged}, newest AS (SELECT response_id, candidate, arg_max(score, reward_version) AS score FROM scores GROUP BY ALL)
              SELECT least({BINS - 1}, floor(p * {BINS}))::INTEGER AS bin, count(*) AS n, avg(p) AS said,
                     count(*) FILTER (p_a > 0.5) AS hits
              FROM (SELECT p_a, 1 / (1 + exp(one.score * -1 + two.score)) AS p FROM judged
                    JOIN newest one ON one.response_id = judged.response_id AND one.candidate = a_candidate
                    JOIN newest two ON two.response_id = judged.response_id AND two.candidate = b_candidate
                    WHERE outcome = 'OK' AND p_a IS NOT NULL AND p_a <> 0.5) GROUP BY 1 ORDER BY 1"""
    return reliability(ask(sql, values).records())


def human_calibration(ask: Ask, judged: str, values: dict[str, Any]) -> dict[str, Any]:
    """Whether the judge's probability means what it says, where a person has labelled the same pair."""
    sql = f"""{judged}, people AS (
                  SELECT prompt_id, a, b, p_a FROM judged WHERE label_source = 'HUMAN' AND p_a IS NOT NULL
                  UNION ALL SELECT prompt_id, b, a, 1 - p_a FROM judged WHERE label_source = 'HUMAN' AND p_a IS NOT NULL)
              SELECT least({BINS - 1}, floor(judged.p_a * {BINS}))::INTEGER AS bin, count(*) AS n, avg(judged.p_a) AS said,
                     count(*) FILTER (people.p_a > 0.5) AS hits
              FROM judged JOIN people USING (prompt_id, a, b)
              WHERE label_source = 'AI' AND outcome = 'OK' AND judged.p_a IS NOT NULL AND people.p_a <> 0.5 GROUP BY 1 ORDER BY 1"""
    return reliability(ask(sql, values).records())


def reliability(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The bins of a reliability diagram, and the expected calibration error (Guo et al. 2017)."""
    for row in rows:
        row["share"], row["interval"] = row["hits"] / row["n"], of_share(row["hits"], row["n"])
    n = sum(row["n"] for row in rows)
    error = sum(row["n"] * abs(row["share"] - row["said"]) for row in rows) / n if n else None
    return {"n": n, "error": error, "bins": rows}


def agreement(ask: Ask, judged: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """How often two labels of the same pair prefer the same answer: judge and person, and one judgement and another."""
    sql = f"""{judged}, labels AS (SELECT prompt_id, least(a, b) AS x, greatest(a, b) AS y, label_source,
                     CASE WHEN a <= b THEN p_a ELSE 1 - p_a END > 0.5 AS x_wins, principle_id
              FROM judged WHERE outcome = 'OK' AND p_a IS NOT NULL AND p_a <> 0.5),
              pairs AS (SELECT count(*) FILTER (label_source = 'AI') AS ai, count(*) FILTER (label_source = 'AI' AND x_wins) AS ai_x,
                     count(*) FILTER (label_source = 'HUMAN') AS human, count(*) FILTER (label_source = 'HUMAN' AND x_wins) AS human_x
              FROM labels GROUP BY prompt_id, x, y HAVING count(*) > 1)
              SELECT 'judge and judge' AS who, sum(ai * (ai - 1) // 2)::BIGINT AS n,
                     sum(ai_x * (ai_x - 1) // 2 + (ai - ai_x) * (ai - ai_x - 1) // 2)::BIGINT AS same FROM pairs
              UNION ALL SELECT 'judge and person', sum(ai * human)::BIGINT,
                     sum(ai_x * human_x + (ai - ai_x) * (human - human_x))::BIGINT FROM pairs
              UNION ALL SELECT 'person and person', sum(human * (human - 1) // 2)::BIGINT,
                     sum(human_x * (human_x - 1) // 2 + (human - human_x) * (human - human_x - 1) // 2)::BIGINT FROM pairs"""
    rows = [row for row in ask(sql, values).records() if row["n"]]
    for row in rows:
        row["share"], row["interval"] = row["same"] / row["n"], of_share(row["same"], row["n"])
    return rows
