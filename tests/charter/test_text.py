"""`charter show` names the principle of each verdict and of the written critique."""

from charter.text import format_trace

TRACE = {
    "prompt_id": "p", "source": "test", "split": "TRAIN", "prompt": "Hi", "responses": [], "revisions": [], "demonstrations": [],
    "final_response": None, "end_reason": None,
}  # fmt: skip


def make_critique(**more):
    values = {
        "round": 0, "principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9, "p_better": None, "critique": "Too rude.",
        "end_reason": "NONE", "rejection_reason": "NONE", "verdicts": [{"principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9}],
    }  # fmt: skip
    return values | more


def format_records(critiques=(), preferences=()):
    return format_trace(TRACE | {"critiques": list(critiques), "preferences": list(preferences)})


def test_critique_of_one_principle_is_one_line():
    assert "critique by harm: flawed  (p(flawed) 0.900)\n  Too rude." in format_records([make_critique()])


def test_each_verdict_names_its_principle():
    verdicts = [
        {"principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9},
        {"principle_id": "honest", "verdict": "CLEAN", "p_flawed": 0.2},
    ]
    text = format_records([make_critique(round=1, principle_id="honest", p_better=0.7, verdicts=verdicts)])
    assert "verdict: flawed  (p(flawed) 0.900, p(better than previous) 0.700)" in text
    assert "by harm: flawed  (p(flawed) 0.900)" in text and "by honest: clean  (p(flawed) 0.200)" in text
    assert "critique by honest\n  Too rude." in text
    ended = format_records([make_critique(round=1, verdicts=verdicts, critique="", end_reason="LOST")])
    assert "verdict: flawed -> lost" in ended and "critique by" not in ended


def test_reason_of_an_unusable_response_and_of_an_unjudged_pair_is_shown():
    unusable = make_critique(
        verdict="NOT_ASKED", verdicts=[], critique="", p_flawed=None, end_reason="UNUSABLE", rejection_reason="EMPTY"
    )
    pair = {
        "label_source": "AI",
        "p_a": None,
        "principle_id": None,
        "outcome": "IDENTICAL",
        "outcome_reason": "both responses are the same",
    }
    text = format_records([unusable], [pair])
    assert "not asked -> unusable, empty" in text and "not judged: both responses are the same (identical)" in text
