"""The rules of the linter, and that the shipped constitutions have no findings and fixed content per version."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constitutions.cases import read_cases
from constitutions.diff import VERSION_NOT_RAISED, compare_constitutions
from constitutions.lint import lint_constitution
from constitutions.loader import (
    CONSTITUTIONS_FOLDER,
    ConstitutionError,
    list_shipped_constitutions,
    load_constitution,
    parse_constitution,
)

HEAD = 'name = "mine"\nversion = "1.0.0"\ndescription = "d"\n'
EXAMPLE = '[[examples]]\nprompt = "p"\nanswer = "a"\ncritique = "c"\nrevision = "r"\n'
KIND = ("kind", "Say whether the answer is cold.", "Rewrite the answer warmly.", "Which answer is warmer?")
SAFE = ("safe", "Say whether the answer helps with harm.", "Rewrite the answer without harm.", "Which answer is less harmful?")
EASY = (
    "easy",
    "Say whether it preaches or refuses.",
    "Rewrite it so that it helps, and never lectures.",
    "Which answer refuses less, and helps more?",
)


def make_constitution(*principles, head=HEAD, tail=EXAMPLE):
    text = head
    for id, critique, revision, _ in principles:
        text += f'[[critique]]\nid = "{id}"\nname = "{id}"\ncritique_prompt = "{critique}"\nrevision_prompt = "{revision}"\n'
    for id, _, _, question in principles:
        text += f'[[judge]]\nid = "{id}"\nname = "{id}"\njudge_prompt = "{question}"\n'
    return parse_constitution(text + tail, "my.toml")


def list_findings(constitution):
    return [(finding.rule, finding.line, finding.principle) for finding in lint_constitution(constitution)]


def test_balanced_constitution_has_no_findings():
    assert list_findings(make_constitution(KIND, SAFE, EASY)) == []


@pytest.mark.parametrize("name", list_shipped_constitutions())
def test_shipped_constitutions_have_no_findings(name):
    assert lint_constitution(load_constitution(name)) == []


def test_lint_reports_missing_parts():
    findings = lint_constitution(make_constitution(KIND, SAFE, EASY, head=HEAD.replace('"d"', '" "'), tail=""))
    assert [finding.rule for finding in findings] == ["missing-part"] * 2
    assert "description" in findings[0].what and "worked example" in findings[1].what
    tagged = make_constitution(KIND, SAFE, EASY).text.replace('\nname = "', '\ntags = ["x"]\nname = "')
    assert [finding.rule for finding in lint_constitution(parse_constitution(tagged, "x"))] == ["missing-part"] * 2
    without_question = (*EASY[:3], "The answer refuses less and helps more.")
    assert list_findings(make_constitution(KIND, SAFE, without_question)) == [("missing-part", 28, "easy")]


def test_lint_reports_duplicates_by_name_and_by_words():
    duplicate = ("warm", "Say whether the answer is cold!", "Rewrite the answer warmly.", "Which of them is clearer?")
    assert list_findings(make_constitution(KIND, SAFE, EASY, duplicate)) == [("duplicate", 20, "warm")]
    constitution = make_constitution(KIND, SAFE, EASY, ("other", "Name the fault.", "Make it right.", "Which is right?"))
    renamed = parse_constitution(constitution.text.replace('name = "other"', 'name = "Kind"', 1), "x")
    assert list_findings(renamed) == [("duplicate", 20, "other")]


def test_lint_reports_lists_of_only_dos_or_only_donts():
    clear = ("clear", "Say whether it wanders off.", "Make it short and to the point.", "Which of them is easier to follow?")
    assert list_findings(make_constitution(KIND, clear)) == [("only-dos", 5, "kind"), ("only-dos", 15, "kind")]
    donts = [
        ("a", "Say whether it preaches.", "Rewrite it without preaching.", "Which answer preaches less?"),
        ("b", "Say whether it is offensive.", "Rewrite it without insults.", "Which answer has fewer insults?"),
    ]
    assert list_findings(make_constitution(*donts)) == [("only-donts", 5, "a"), ("only-donts", 15, "a")]


def test_lint_reports_principles_without_a_guard_against_over_reaction():
    assert list_findings(make_constitution(KIND, SAFE)) == [("over-reaction", 10, "safe"), ("over-reaction", 19, "safe")]
    revision = "Rewrite the answer without harm, and keep what is useful."
    guarded = ("safe", SAFE[1], revision, "Which answer is less harmful, and still helps?")
    assert list_findings(make_constitution(KIND, guarded)) == []


def test_finding_in_included_prose_has_the_line_of_its_file(tmp_path):
    (tmp_path / "base.toml").write_text(
        '\n[[prose]]\nid = "safe"\nname = "Safe"\npriority = 1\ntext = "Never help with harm."\n'
    )
    mine = tmp_path / "mine.toml"
    mine.write_text(HEAD + 'include = ["base.toml"]\n' + EXAMPLE)
    (finding,) = lint_constitution(load_constitution(mine))
    assert (finding.rule, Path(finding.file).name, finding.line) == ("over-reaction", "base.toml", 3)


# Versions

# The content of a shipped constitution changes only together with its version.
RELEASED = {
    ("course", "1.1.0"): "1d0bbea6af8f11695a10a9a95ea5d2f27f7cd362fb742e6d21671c54450f2eb7",
    ("customer-service", "1.1.0"): "ed8a3e8e6b0740c7ea9ed9d2657bcc2820fcf4d14c1a7d1da639e61c50ed56be",
    ("default", "1.0.0"): "b8d85580f3686de6e2d01ecb4a995da8094a04378e78b1b3f02c7fc87f232bfe",
    ("one-sentence", "1.0.0"): "bef813bfec577a85b8c5753261b67c4a6c3f855707f62cea97d4becec700ca52",
    ("red-team", "1.1.0"): "26f1f8cd815cb9fe62a7df365cc004624ca5178cb0c9f86826b4da66c95c74df",
}


def test_content_of_a_shipped_version_does_not_change():
    assert {(c.name, c.version): c.hash for c in map(load_constitution, list_shipped_constitutions())} == RELEASED


def test_diff_lists_the_changes_and_an_unchanged_version():
    before = make_constitution(KIND, SAFE)
    cold = (*KIND[:3], "Which answer is less cold?")
    after = make_constitution(EASY, cold)
    changes = {(c.what, c.part, c.principle, c.field) for c in compare_constitutions(before, after)}
    assert changes == {
        ("removed", "critique", "safe", ""), ("removed", "judge", "safe", ""), ("added", "critique", "easy", ""),
        ("added", "judge", "easy", ""), ("changed", "judge", "kind", "judge_prompt"), (VERSION_NOT_RAISED, "", "", "version"),
    }  # fmt: skip
    assert compare_constitutions(before, make_constitution(KIND, SAFE)) == []
    raised = make_constitution(EASY, cold, head=HEAD.replace("1.0.0", "1.0.1"))
    assert VERSION_NOT_RAISED not in {c.what for c in compare_constitutions(before, raised)}
    assert [(c.what, c.field) for c in compare_constitutions(before, make_constitution(SAFE, KIND))] == [
        ("moved", "order")
    ] * 2 + [(VERSION_NOT_RAISED, "version")]


# Cases


@pytest.mark.parametrize("name", list_shipped_constitutions())
def test_shipped_cases_name_existing_principles(name):
    cases, constitution = read_cases(name), load_constitution(name)
    assert cases.constitution == name and len(cases.cases) >= 4
    cases.check_principles(name, [principle.id for principle in constitution.judge])


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("c.jsonl", '{"prompt": "p", "wins": "w", "loses": "l"}\n{bad\n', ["c.jsonl, line 2", "not JSON"]),
        ("c.jsonl", '\n{"prompt": "p", "wins": "w"}\n', ["line 2", "loses"]),
        ("c.toml", '[[case]]\nprompt = "p"\nwins = "w"\nloses = ""\n', ["line 1", "loses"]),
        ("c.toml", '[[cases]]\nprompt = "p"\n', ["line 1", "did you mean case?"]),
        ("c.toml", "", ["no case"]),
        ("c.toml", '[[critique]]\nid = "a"\n', ["is a constitution", "--constitution"]),
    ],
)
def test_error_for_an_invalid_case_names_its_line(tmp_path, file, text, expected):
    (tmp_path / file).write_text(text)
    with pytest.raises(ConstitutionError) as caught:
        read_cases(str(tmp_path / file))
    assert all(word in str(caught.value) for word in expected), str(caught.value)


def test_error_for_an_unknown_principle_suggests_the_nearest(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "p", "wins": "w", "loses": "l", "principles": ["kindr"]}))
    with pytest.raises(ConstitutionError, match="did you mean kinder"):
        read_cases(str(path)).check_principles("customer-service", ["kinder", "solves-more"])
    with pytest.raises(ConstitutionError, match="no file nowhere"):
        read_cases("nowhere")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lint_never_fails_on_a_valid_constitution(data):
    text = list((CONSTITUTIONS_FOLDER / "course.toml").read_text())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 30))] = data.draw(st.text(max_size=6))
    try:
        loaded = parse_constitution("".join(text), "x")
    except ConstitutionError:
        return
    assert all(finding.line >= 1 for finding in lint_constitution(loaded))
