"""`charter eval judge`: rows by hand with a fake judge, files that are wrong, and the command."""

import csv
import io
import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.evaluation.agreement import HumanPair, compute_kappa
from charter.evaluation.judge_suites import (
    ALL_PAIRS,
    EQUAL_LENGTH,
    JudgeStudy,
    has_equal_length,
    parse_suite,
    read_llmbar,
)
from charter.models import RoleModels
from engine.errors import UsageError
from engine.models.interface import OptionScores
from engine.models.scripted import ScriptedModel
from engine.settings import load_settings
from schemas.records import ChatMessage


def write_llmbar(folder, name="gptinst.json", count=10):
    """Write pairs whose better output has the word good. The other output is longer in even rows and equally long in odd rows."""
    rows = []
    for n in range(count):
        outputs = [f"a good thing about {n}", "a bad thing right here" + " and here" * (n % 2 == 0)]
        label = 1 + n % 3 % 2
        first, second = outputs if label == 1 else outputs[::-1]
        rows.append({"input": f"Say something about number {n}.", "output_1": first, "output_2": second, "label": label})
    file = folder / name
    file.write_text(json.dumps(rows))
    return file


def prefers_good(request):
    """Return p(A) of a judge that prefers the good output, but the first one a bit more."""
    text = request.messages[-1].content
    return 0.9 if text.index("good thing") < text.index("bad thing") else 0.3


def run_study(file, model, suite="llmbar", flags=None, presets=("lee2023",)):
    settings, origins = load_settings({"models.policy": "scripted"} | (flags or {}), environment={})
    study = JudgeStudy(settings, origins, [(suite, read_llmbar(str(file), None, 0))], 0)
    study.run(RoleModels(settings, {"scripted": model}), presets, None)
    return study


def test_kappa_by_hand():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    choices = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert compute_kappa(choices) == pytest.approx(0.4)
    assert compute_kappa([(True, False), (False, True)]) == -1 and compute_kappa([(True, True), (False, False)]) == 1
    assert compute_kappa([]) is None and compute_kappa([(True, True)] * 3) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [((10, 9), True), ((10, 8), False), ((1, 1), True), ((100, 91), True), ((0, 0), True), ((2, 1), False)],
)
def test_equal_length_is_within_ten_percent_of_the_words(words, expected):
    assert has_equal_length(HumanPair("w " * words[0], "x " * words[1], True)) is expected
    assert has_equal_length(HumanPair("w " * words[1], "x " * words[0], True)) is expected


def test_rows_of_a_known_judge(tmp_path):
    study = run_study(write_llmbar(tmp_path), ScriptedModel(option_rule=prefers_good))
    judge, equal = study.rows[:2]
    assert (judge.judge, judge.kind, judge.subset, judge.file) == ("lee2023", "judge", ALL_PAIRS, "gptinst.json")
    assert (judge.pairs, judge.labels, judge.ties, judge.agreed, judge.accuracy, judge.kappa) == (10, 10, 0, 10, 1.0, 1.0)
    p = (0.9 + 0.7) / 2
    assert judge.brier == pytest.approx((1 - p) ** 2) and judge.ece == pytest.approx(1 - p) and judge.flip_rate == 0
    assert judge.evidence == "better than chance" and judge.tokens_per_label > 0 and judge.seconds_per_label >= 0
    assert (equal.subset, equal.pairs, equal.agreed) == (EQUAL_LENGTH, 5, 5)
    assert equal.seconds_per_label is None  # the time of a part is not measured
    baselines = {(row.judge, row.subset): row for row in study.rows if row.kind == "baseline"}
    longer, shorter = baselines["longer wins", ALL_PAIRS], baselines["shorter wins", ALL_PAIRS]
    assert (longer.agreed, shorter.agreed, longer.ties, longer.ece) == (0, 10, 0, None)
    published = {row.judge: row.accuracy for row in study.rows if row.kind == "published"}
    assert published == {"GPT-4": 0.864, "ChatGPT": 0.266, "longer wins": 0.13}


def test_published_accuracies_are_only_of_the_named_files(tmp_path):
    study = run_study(write_llmbar(tmp_path, "other.json"), ScriptedModel(option_rule=prefers_good))
    assert {row.kind for row in study.rows} == {"judge", "baseline"}
    study = run_study(write_llmbar(tmp_path, "LLMBar_Natural.json"), ScriptedModel(option_rule=prefers_good))
    assert [row.accuracy for row in study.rows if row.kind == "published"] == [0.955, 0.815, 0.56]


def test_judge_that_cannot_be_read_has_an_outcome_and_no_accuracy(tmp_path):
    class SilentModel(ScriptedModel):
        def score_options(self, requests, options):
            return [OptionScores((-9.0, -9.0), 0.001) for _ in requests]

    row = run_study(write_llmbar(tmp_path), SilentModel()).rows[0]
    assert (row.labels, row.accuracy, row.kappa, row.ece, row.brier, row.evidence) == (
        0,
        None,
        None,
        None,
        None,
        "no decided label",
    )
    assert row.abstentions == {"LOW_MASS": 10} and (row.tokens_per_label, row.seconds_per_label) == (None, None)


def test_undecided_judge_has_ties(tmp_path):
    row = run_study(write_llmbar(tmp_path), ScriptedModel(option_rule=lambda request: 0.5)).rows[0]
    assert (row.labels, row.ties, row.accuracy, row.evidence) == (10, 10, None, "no decided label")


def test_question_of_llmbar_is_about_the_instruction(tmp_path):
    questions = []

    def remember(request):
        questions.append(request.messages[-1].content)
        return 0.6

    run_study(write_llmbar(tmp_path), ScriptedModel(option_rule=remember))
    assert len(questions) == 20 and all("what the user's instruction asks" in question for question in questions)
    questions.clear()
    run_study(write_llmbar(tmp_path), ScriptedModel(option_rule=remember), flags={"run.constitution": "default"})
    assert not any("what the user's instruction asks" in question for question in questions)


def test_pair_keeps_its_prompt_and_its_label(tmp_path):
    dataset = read_llmbar(str(write_llmbar(tmp_path)), 4, 3)
    assert (len(dataset.human_pairs), dataset.num_rows, dataset.name) == (4, 10, "gptinst.json")
    for pair, response in zip(dataset.human_pairs, dataset.judge_inputs, strict=True):
        preferred = pair.response_a if pair.a_preferred else pair.response_b
        number = preferred.removeprefix("a good thing about ")
        assert response.messages == [ChatMessage(role="user", content=f"Say something about number {number}.")]
        assert [completion.text for completion in response.completions] == [pair.response_a, pair.response_b]


GOOD = {"input": "i", "output_1": "a", "output_2": "b", "label": 1}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "has no rows"),
        ("{}", "has no rows"),
        (json.dumps([GOOD, 3]), "row 2 is not an object"),
        (json.dumps([{"input": "i"}]), "row 1 has no output_1"),
        (json.dumps([GOOD, GOOD | {"label": 3}]), "row 2 has the label 3"),
        (json.dumps([GOOD | {"label": True}]), "row 1 has the label True"),
        (json.dumps([GOOD | {"label": "1"}]), "row 1 has the label '1'"),
        (json.dumps([GOOD | {"output_1": None}]), "row 1 is not a pair"),
        (json.dumps([GOOD | {"output_2": "a"}]), "row 1 has two equal outputs"),
    ],
)
def test_wrong_file_is_refused(tmp_path, content, what):
    file = tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=what) as error:
        read_llmbar(str(file), None, 0)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("suite", "what"),
    [("mtbench=x", "there is no judge suite mtbench"), ("llmbar", "names no file"), ("pairs=", "names no file")],
)
def test_wrong_suite_is_refused(suite, what):
    with pytest.raises(UsageError, match=what) as error:
        parse_suite(suite)
    assert len(str(error.value).splitlines()) == 3


def test_missing_file_is_refused():
    with pytest.raises(UsageError, match="there is no file missing"):
        read_llmbar("missing.json", None, 0)


def test_command_prints_a_table_json_and_csv(tmp_path):
    llmbar, pairs = write_llmbar(tmp_path, count=4), tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"p {n}", "chosen": "good", "rejected": "some bad one"}) + "\n" for n in range(3))
    )
    arguments = [
        "eval",
        "judge",
        "--suite",
        f"llmbar={llmbar}",
        "--suite",
        f"pairs={pairs}",
        "--preset",
        "lee2023",
        "--limit",
        "2",
    ]
    arguments += ["--data", str(tmp_path / "data"), "--set", "models.policy=scripted"]
    outputs = {}
    for option in ((), ("--json",), ("--csv",)):
        result = CliRunner().invoke(cli, [*arguments, *option], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs[option] = result.stdout
    assert "GPT-4 (published)" in outputs[()] and "judge: scripted" in outputs[()]
    rows = json.loads(outputs["--json",])
    assert [(row["suite"], row["pairs"]) for row in rows if row["kind"] == "judge" and row["subset"] == "all"] == [
        ("llmbar", 2),
        ("pairs", 2),
    ]
    assert [row["judge"] for row in csv.DictReader(io.StringIO(outputs["--csv",]))] == [row["judge"] for row in rows]
