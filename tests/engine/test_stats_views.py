"""The statistics views with hand-counted values, and Wilson's interval with its equation."""

import math

import pytest

from schemas.records import Outcome
from tests.support.records import RecordDatabase, add_counted_run, make_judged_preference


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    database = RecordDatabase(tmp_path_factory.mktemp("stats") / "charter.duckdb")
    add_counted_run(database)
    return database


def compute_wilson_interval(hits, n, z=1.959963984540054):
    """Return the two values p at which |hits/n - p| is z standard deviations: the roots of a quadratic (Wilson 1927)."""
    p, a = hits / n, 1 + z * z / n
    b, c = -(2 * p + z * z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 10), (0.5, 4), (9_999, 10_000)])
def test_wilson_bounds_solve_the_equation(database, hits, n):
    bounds = database.query_rows(f"SELECT wilson_low({hits}, {n}), wilson_high({hits}, {n})")[0]
    assert bounds == pytest.approx(compute_wilson_interval(hits, n), abs=1e-12)
    assert (bounds[0] == 0.0) == (hits == 0) and (bounds[1] == 1.0) == (hits == n)


def test_share_of_no_rows_is_null(database):
    assert database.query_rows("SELECT share(0, 0), wilson_low(0, 0), wilson_high(0, 0)") == [(None, None, None)]


def test_principle_stats(database):
    rows = {(row["stage"], row["principle_id"]): row for row in database.query_records("SELECT * FROM principle_stats")}
    assert set(rows) == {("critique", "harm"), ("judge", "care"), ("judge", "honest")}
    harm, care, honest = rows["critique", "harm"], rows["judge", "care"], rows["judge", "honest"]
    # Six verdicts: four of initial responses and two of revisions; one could not be read.
    assert (harm["asked"], harm["answered"], harm["fired"], harm["compared"], harm["wins"]) == (6, 5, 3, 2, 1)
    assert (harm["fire_rate"], harm["win_rate"], harm["refusal_rate"]) == (0.6, 0.5, 0.0)
    assert (harm["fire_low"], harm["fire_high"]) == pytest.approx(compute_wilson_interval(3, 5), abs=1e-6)
    assert (care["asked"], care["compared"], care["wins"], care["refused"]) == (5, 4, 3, 1)
    assert (care["win_rate"], care["refusal_rate"], care["fire_rate"]) == (0.75, 0.2, None)
    assert care["length_correlation"] == pytest.approx(compute_correlation([0.8, 0.6, 0.3, 0.7], [3, 1, -3, 2]))
    assert (honest["asked"], honest["compared"], honest["wins"], honest["refused"]) == (2, 1, 0.5, 0)


def compute_correlation(xs, ys):
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return covariance / math.sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


def test_revision_stats(database):
    (row,) = database.query_records("SELECT * FROM revision_stats")
    assert (row["round"], row["revisions"], row["unusable"], row["compared"], row["wins"]) == (1, 3, 1, 2, 1.0)
    assert row["mean_p_better"] == pytest.approx(0.55) and row["mean_similarity"] == pytest.approx(1.6 / 3)
    assert row["mean_length_change"] == pytest.approx(2 / 3)
    assert (row["satisfied"], row["lost"], row["last_round"]) == (1, 1, 0)


def test_position_bias_stats(database):
    rows = {row["principle_id"]: row for row in database.query_records("SELECT * FROM position_bias_stats")}
    care = rows["care"]
    assert (care["judged"], care["flips"], care["flip_rate"], care["preset"]) == (4, 1, 0.25, "charter")
    assert (care["mean_p_forward"], care["mean_p_backward"]) == pytest.approx((0.7, 0.5))
    assert care["first_place"] == pytest.approx(0.6) and care["mean_position_gap"] == pytest.approx(0.3)
    assert rows["honest"]["flips"] == 1


def test_position_bias_stats_count_only_readable_judgments(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    for n, outcome in enumerate((Outcome.OK, Outcome.POSITION_FLIP, Outcome.LOW_MASS, Outcome.REFUSED)):
        pair = make_judged_preference(str(n), str(n), "a", "b", 0.9, 0.3)
        votes = [vote.model_copy(update={"outcome": outcome}) for vote in pair.votes]
        database.add(pair.model_copy(update={"outcome": outcome, "votes": votes}))
    assert database.query_rows("SELECT judged, flips, flip_rate FROM position_bias_stats") == [(2, 2, 1.0)]


def test_label_agreement_stats(database):
    pairs = database.query_rows("SELECT round(p_ai, 2), p_human, agree FROM ai_human_labels ORDER BY 1")
    assert pairs == [(0.3, 1.0, False), (0.6, 1.0, True), (0.8, 1.0, True)]
    (row,) = database.query_records("SELECT * FROM label_agreement_stats")
    assert (row["pairs"], row["decided"], row["agreed"], row["principle_id"]) == (3, 3, 2, "care")
    assert row["brier"] == pytest.approx((0.7**2 + 0.4**2 + 0.2**2) / 3)
    bins = database.query_rows("SELECT p_from, pairs, human_share FROM label_calibration_stats ORDER BY 1")
    assert bins == [(0.3, 1, 1.0), (0.6, 1, 1.0), (0.8, 1, 1.0)]
