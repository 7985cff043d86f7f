"""Agreement with human labels: metrics against cases computed by hand, and the command with a fake judge."""

import gzip
import json
import math
from dataclasses import asdict

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from charter.cli import cli
from charter.evaluation.agreement import HumanPair, compute_agreement, compute_baselines, compute_judge_agreement
from charter.evaluation.agreement_study import JUDGE_PRESETS, AgreementStudy, apply_judge_preset, read_pairs
from charter.models import RoleModels
from engine.errors import UsageError
from engine.models.scripted import ScriptedModel
from engine.settings import PRESETS, load_settings
from engine.statistics import compute_brier_score, compute_confidence_error, compute_wilson_interval
from schemas import ids
from schemas.records import Outcome, Preference


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, to four digits.
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert compute_wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert compute_wilson_interval(0, 0) is None


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_its_fraction(case):
    hits, n = case
    low, high = compute_wilson_interval(hits, n)
    assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1


def test_brier_score_and_calibration_by_hand():
    assert compute_brier_score([1.0, 0.8, 0.5, 0.1]) == pytest.approx((0 + 0.04 + 0.25 + 0.81) / 4)
    # Confidence 0.9 three times, right twice: gap |0.9 - 2/3|. Confidence 0.6 once, right: gap 0.4.
    assert compute_confidence_error([0.9, 0.9, 0.1, 0.6]) == pytest.approx((3 * abs(0.9 - 2 / 3) + 0.4) / 4)
    assert compute_confidence_error([0.5] * 7) == 0 and compute_confidence_error([1.0, 0.0]) == pytest.approx(0.5)
    assert compute_brier_score([]) is None and compute_confidence_error([]) is None


@given(st.lists(st.floats(0, 1), min_size=1))
def test_calibration_is_symmetric_in_the_two_responses(ps):
    # The same label with the responses swapped: confidence and correctness are unchanged.
    bins = {}
    for p in ps:
        confidence, right = max(p, 1 - p), (0.5 if p == 0.5 else float(p > 0.5))
        bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append((confidence, right))
    expected = sum(len(b) / len(ps) * abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b)) for b in bins.values())
    assert compute_confidence_error(ps) == pytest.approx(expected, abs=1e-12) and 0 <= compute_confidence_error(ps) <= 1


PAIRS = [HumanPair("long answer", "short", True), HumanPair("x", "longer", True), HumanPair("same", "size", False)]


def label(p_a, outcome=Outcome.OK, position_flip=False, mass=0.9):
    return Preference(
        record_id=ids.compute_record_id("judge", [], "x"), run_id="r", stage="judge", messages=[], source="s", pairing="completions", response_a="",
        response_b="", p_a=p_a, outcome=outcome, position_flip=position_flip, option_mass=mass, prompt_tokens=100, completion_tokens=20,
    )  # fmt: skip


def test_judge_metrics_by_hand():
    pairs = [*PAIRS, *PAIRS]
    labels = [
        label(0.9), label(0.2, position_flip=True), label(0.3),  # right, wrong, right
        label(0.5), label(0.8, Outcome.POSITION_FLIP, position_flip=True), label(None, Outcome.LOW_MASS, mass=0.1),
    ]  # fmt: skip
    row = compute_judge_agreement("j", pairs, labels, seconds=12.0, cost=0.6)
    assert (row.pairs, row.labelled, row.decided, row.agreed) == (6, 4, 3, 2) and row.accuracy == pytest.approx(2 / 3)
    assert (row.accuracy_low, row.accuracy_high) == compute_wilson_interval(2, 3)
    assert row.brier == pytest.approx((0.01 + 0.64 + 0.09 + 0.25) / 4)
    assert row.swap_inconsistency == pytest.approx(2 / 5) and row.mass == pytest.approx((5 * 0.9 + 0.1) / 6)
    assert row.prefers_longer == 1.0  # both decided pairs of unequal length prefer the longer response
    assert row.abstentions == {"LOW_MASS": 1, "POSITION_FLIP": 1}
    assert (row.tokens_read, row.tokens_written, row.seconds) == (100, 20, 2.0)
    # Six pairs were judged, and four of them have labels.
    assert (row.tokens_per_label, row.seconds_per_label, row.cost_per_label) == (180, 3.0, pytest.approx(0.15))
    row = compute_judge_agreement("j", PAIRS[:2], [None, label(0.9)], 1.0, None)
    assert row.abstentions == {"NOT_ASKED": 1} and row.labelled == 1


def test_metrics_without_labels_are_null():
    row = compute_judge_agreement("j", PAIRS, [label(None, Outcome.REFUSED, mass=math.nan)] * 3, 1.0, None)
    assert (row.accuracy, row.brier, row.ece, row.mass, row.swap_inconsistency, row.prefers_longer) == (None,) * 6
    assert row.labelled == 0 and row.abstentions == {"REFUSED": 3} and row.seconds == pytest.approx(1 / 3)
    assert (row.tokens_per_label, row.seconds_per_label, row.cost_per_label) == (None,) * 3


def test_baselines_by_hand():
    longer, shorter, sampled = compute_baselines(PAIRS, 0)
    assert (longer.decided, longer.agreed, shorter.agreed) == (2, 1, 1) and longer.labelled == 2
    assert longer.prefers_longer == 1 and shorter.prefers_longer == 0 and longer.brier is None
    assert sampled.labelled == 3 and sampled == compute_baselines(PAIRS, 0)[2] != compute_baselines(PAIRS, 1)[2]
    many = compute_baselines([PAIRS[0]] * 4000, 3)[2]
    assert many.accuracy == pytest.approx(0.5, abs=0.03) and many.brier == pytest.approx(1 / 3, abs=0.02)
    assert compute_agreement("x", PAIRS, [1.0, 1.0, 1.0]).accuracy == 1


# The command


@pytest.fixture
def pairs(tmp_path):
    """Write dialogues in the format of HH-RLHF; each preferred response contains the word good."""
    file = tmp_path / "pairs.jsonl.gz"
    rows = [
        {
            "chosen": f"\n\nHuman: hi {n}\n\nAssistant: yes: no\n\nHuman: and?\n\nAssistant: a good answer {n}",
            "rejected": f"\n\nHuman: hi {n}\n\nAssistant: yes: no\n\nHuman: and?\n\nAssistant: some other, longer one",
        }
        for n in range(12)
    ]
    same = {"prompt": "p", "chosen": "x", "rejected": "x"}
    with gzip.open(file, "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in [*rows, same]))
    return file


def prefers_good(ask):
    text = ask.messages[-1].content
    return 0.8 if text.index("good answer") < text.index("longer one") else 0.3


def run(tmp_path, *arguments):
    base = ["--data", str(tmp_path / "data"), "--set", "models.policy=scripted"]
    result = CliRunner().invoke(cli, ["eval", "agreement", *map(str, arguments), *base], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_report_measures_a_known_judge(pairs):
    settings, origins = load_settings({"models.policy": "scripted", "budget.prices": "scripted=1000000/0"}, environment={})
    study = AgreementStudy(settings, origins, read_pairs(str(pairs), None, 0), 0)
    study.run(RoleModels(settings, {"scripted": ScriptedModel(option_rule=prefers_good)}), ["lee2023"], None)
    judge, longer, shorter, sampled = (asdict(row) for row in study.rows)
    assert (judge["judge"], judge["pairs"], judge["agreed"], judge["accuracy"]) == ("lee2023", 12, 12, 1.0)
    assert judge["brier"] == pytest.approx((1 - (0.8 + 0.7) / 2) ** 2) and judge["prefers_longer"] == 0
    assert judge["swap_inconsistency"] == 0 and judge["tokens_read"] > 0 and judge["mass"] == pytest.approx(0.9)
    assert (longer["accuracy"], shorter["accuracy"], sampled["pairs"]) == (0, 1, 12)
    assert judge["cost_per_label"] == judge["tokens_read"] and judge["cost_per_label"] > 0
    report = json.loads(study.to_json())
    assert "12 of the 13 rows" in report["about"] and "1 row without a preferred response" in report["about"]
    assert len(report["labels"]["lee2023"]) == 12 and 0 < sum(report["a_preferred"]) < 12


def test_report_contains_every_preset(tmp_path, pairs):
    out = tmp_path / "report.md"
    output = run(tmp_path, "--pairs", pairs, "--limit", 6, "--limit-generative", 2, "--out", out)
    assert [row["judge"] for row in json.loads(run(tmp_path, "--pairs", pairs, "--limit", 2, "--json"))][:5] == list(
        JUDGE_PRESETS
    )
    for name in (*JUDGE_PRESETS, "longer wins", "shorter wins", "random", "judge: scripted"):
        assert name in output and name in out.read_text()
    assert set(JUDGE_PRESETS) == set(PRESETS["judge"])
    rows = json.loads(run(tmp_path, "--pairs", pairs, "--limit", 6, "--limit-generative", 2, "--json"))
    assert [row["pairs"] for row in rows if row["judge"] == "random"] == [6, 2]  # baselines for the pairs of each judge


def test_pairs_are_sampled_by_seed_and_prompts_end_with_a_human_message(pairs):
    sampled, repeated, other = (read_pairs(str(pairs), 5, seed) for seed in (0, 0, 1))
    assert (
        sampled.human_pairs == repeated.human_pairs != other.human_pairs
        and len(sampled.human_pairs) == 5
        and sampled.num_invalid == 1
    )
    messages = sampled.judge_inputs[0].messages
    assert [message.role for message in messages] == ["user", "assistant", "user"] and messages[1].content == "yes: no"
    assert messages[-1].content == "and?"


def test_file_without_pairs_raises(tmp_path):
    file = tmp_path / "none.jsonl"
    file.write_text('{"prompt": "only a prompt"}\n')
    with pytest.raises(UsageError, match="no pair"):
        read_pairs(str(file), None, 0)


def test_explicit_settings_override_every_preset():
    settings, origins = load_settings({"judge.preset": "course", "judge.min_option_mass": "0.3"}, environment={})
    ensemble = apply_judge_preset(settings, origins, "ensemble-k").judge
    assert (ensemble.num_principles, ensemble.min_option_mass, ensemble.answer_mode, ensemble.reject_position_flips) == (
        5,
        0.3,
        "logprobs",
        False,
    )
    assert apply_judge_preset(settings, origins, "course").judge == settings.judge
