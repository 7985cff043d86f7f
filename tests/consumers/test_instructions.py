"""The grader of verifiable instructions: each of the 25 types, the measures, and instructions that cannot be checked."""

import importlib.util
import json
from pathlib import Path

import pytest
from langdetect.detector_factory import PROFILES_DIRECTORY

from charter.models import RoleModels
from charter.pipeline import make_grade_stage
from constitutions.loader import load_constitution
from consumers.grade import COMPLETION, GradeStage
from consumers.graders.instruction_checks import INSTRUCTIONS, count_sentences, make_loose_variants
from consumers.graders.instructions import FAILS, FOLLOWS, InstructionsGrader, parse_instructions
from consumers.graders.interface import GradedText
from consumers.graders.length import LengthGrader
from engine.errors import UsageError
from engine.languages import LANGUAGES, detect_language
from engine.settings import load_settings
from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, Outcome, Response, SuiteItem

ENGLISH = "the garden behind the house was full of tall flowers and the children played there every day"
GERMAN = "Der Garten hinter dem Haus war voller hoher Blumen, und die Kinder spielten dort jeden Tag."
AT_LEAST_2, LESS_THAN_2 = {"relation": "at least"}, {"relation": "less than"}

# Each case: the instruction, its parameters, texts that follow it, texts that do not.
CASES = [
    (
        "keywords:existence",
        {"keywords": ["river", "C++"]},
        ["A RIVER and c++.", "riverside, C++11"],
        ["A river and C.", "C++", "r i v e r C++"],
    ),
    ("keywords:existence", {"keywords": ["café"]}, ["the CAFÉ", "the cafe\u0301"], ["the cafe"]),
    (
        "keywords:frequency",
        {"keyword": "a.b", "frequency": 2, "relation": "at least"},
        ["a.b A.B", "a.ba.b"],
        ["a.b axb", ""],
    ),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, ["tea", "none"], ["tea for the team"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["run", "c++"]},
        ["runner, prune, ccc++x", "naïve"],
        ["Run!", "go\nrun\ngo", "`run`", "C++"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        ["qQ", "quiet quay"],
        ["quiet"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "less than"},
        ["# title", "none"],
        ["## title"],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN, GERMAN.upper()], [ENGLISH, "12345", "```\n1\n```"]),
    ("language:response_language", {"language": "zh"}, ["今天天气很好，我们一起去公园散步吧。"], [ENGLISH]),
    (
        "language:response_language",
        {"language": "hi"},
        ["आज मौसम बहुत अच्छा है और हम बगीचे में टहलने जा रहे हैं।"],
        [GERMAN],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2} | AT_LEAST_2,
        ["One is here. Two is here.", "Yes! No", "一。二。"],
        ["Dr. A. Smith paid 3.5 dollars", "...", "1. a list item"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2} | LESS_THAN_2, ["Only one", "e.g. this one."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n\na\n***\nb\n***"],
        ["a\n\nb", "a\n***\n\n***\nb", "a\n***\nb\n***\nc"],
    ),
    ("length_constraints:number_words", {"num_words": 3} | AT_LEAST_2, ["one two three", "well-known word", "для всех нас"], ["one two !"]),
    ("length_constraints:number_words", {"num_words": 3} | LESS_THAN_2, ["one two", "- - -x"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
        ["One.\n\nElm trees.", "One.\n\n\n\n“elm” trees", "One.\n \nElm: a tree"],
        ["One.\n\nElms", "Elm.\n\nOne", "One.\n\nElm.\n\nThree", "One.\nElm", "One.\n\n!"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] lives in [straße]", "[a][b][c]"],
        ["[name]", "(name) {city}", "[two\nlines] [name]"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\n\nP.S. Call me.", "p. s. hi"], ["PS hi", "caps."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S hi", "p. p. s. hi"], ["P.S. hi"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B. (*)"}, ["Bye.\nn.b. (*) hi"], ["nxb. (*)"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["Here:\n* one\n  - two", "- eins\n---\n- zwei\n* * *", "* a\n**bold**\n* b"],
        ["* one", "• one\n• two", "- a\n- b\n- c", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "**My answer is maybe.**"],
        ["my answer is yes", "My answer is yes!", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and **two**", "**one** **two**"],
        ["**one**", "*one\ntwo* *", "** ** *x*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        ["Day 1\nswim\nDay 2\nrest", "**Day 1** **Day2**"],
        ["Day 1", "DAY 1\nDAY 2", "Day one, Day two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": ["é", 1.5, null]}', '```json\n{"a": 1}\n```', '```\n["x"]\n```', " [] ", '{"a": %s}' % ("9" * 5000)],
        ["{'a': 1}", 'Here: {"a": 1}', '{"a": NaN}', '```json\n{"a": 1}\n```\nDone.', "[" * 100_000, "```json\n```"],
    ),
    ("detectable_format:title", {}, ["<<A poem of joy>>\nText", "x <<ода>>"], ["<A poem>", "<<>>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******\none\n******\ntwo\n******"],
        ["one", "one\n******\none", "one\n******", "a******b******c", "a******\n******b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a haiku.\nAbout (sea)"},
        ["write a haiku.\nabout (sea)\n\nWaves", "\n Write a haiku.\r\nAbout (sea) x"],
        ["Sure. Write a haiku.\nAbout (sea)", "Write a haiku. About (sea)"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all? "},
        ["Yes. Is that all?", 'is THAT all?"\n'],
        ["Is that all? Yes.", "Is that all", "```\nIs that all?\n```"],
    ),
    ("startend:quotation", {}, ['"quoted"', ' "a "b" c" \n'], ['"', "'quoted'", '"quoted".', "“quoted”", '```"a"```']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["A well-known NASA fact", "ÉTÉ and TOP-TEN", "DON'T you, U.S."],
        ["NASA", "Nasa Esa"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["STOP now", "123 456"],
        ["STOP THAT now"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper(), "123", ENGLISH.upper() + " now"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.capitalize(), GERMAN.lower(), "123"]),
    ("punctuation:no_comma", {}, ["One and two; three", "eins und zwei ，"], ["One, two", "```\nf(a, b)\n```"]),
]  # fmt: skip


def make_text(text, *instructions, finish_reason=FinishReason.STOP):
    as_json = json.dumps([{"id": name, "kwargs": kwargs} for name, kwargs in instructions]) if instructions else ""
    item = SuiteItem(suite="ifeval", item="1", instructions=as_json)
    return GradedText((ChatMessage(role="user", content="?"),), text, finish_reason=finish_reason, suite_item=item)


def grade(text, *instructions, finish_reason=FinishReason.STOP):
    ((result,),) = InstructionsGrader().grade([make_text(text, *instructions, finish_reason=finish_reason)])
    return result


@pytest.mark.parametrize(("name", "kwargs", "follows", "fails"), CASES, ids=[case[0] for case in CASES])
def test_check(name, kwargs, follows, fails):
    for text in follows:
        assert grade(text, (name, kwargs)).label == FOLLOWS, text
    for text in [*fails, "", " \u200b\n"]:
        result = grade(text, (name, kwargs))
        assert (result.label, result.score, result.outcome) == (FAILS, 0.0, Outcome.OK), text


def test_cases_cover_all_instructions():
    assert {case[0] for case in CASES} == set(INSTRUCTIONS) and len(INSTRUCTIONS) == 25


def test_strict_and_loose_measures():
    no_comma, quotation, title = ("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {})
    result = grade('Sure, here it is:\n"a text"', no_comma, quotation, title)
    assert (result.label, result.score) == (FAILS, 0.0)
    assert result.details == {"strict": 0, "loose": 0, "instructions": 3, "followed_strict": 0, "followed_loose": 2}
    result = grade('Sure, here it is:\n"a text"', no_comma, quotation)
    assert (result.label, result.details["strict"], result.details["loose"]) == (FAILS, 0, 1)
    result = grade('"a text"', no_comma, quotation, title)
    assert (result.label, result.score) == (FAILS, pytest.approx(2 / 3))
    assert result.details == {"strict": 0, "loose": 0, "instructions": 3, "followed_strict": 2, "followed_loose": 2}
    assert grade('"a text"', no_comma, quotation).details["strict"] == 1


def test_loose_variants():
    assert make_loose_variants("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    assert make_loose_variants("a") == ["a", ""]


def test_text_without_instructions_gets_no_grade():
    plain = GradedText((ChatMessage(role="user", content="?"),), "text")
    assert InstructionsGrader().grade([plain, make_text("text")]) == [[], []]


def test_withheld_response_has_no_score():
    result = grade("text", ("punctuation:no_comma", {}), finish_reason=FinishReason.REFUSED)
    assert (result.outcome, result.score, result.label) == (Outcome.WITHHELD, None, "")


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("keywords:unknown", {}, "the instruction 'keywords:unknown' is not known"),
        ("punctuation:no_comma", {"marks": 1}, "marks: Extra inputs are not permitted"),
        ("keywords:existence", {}, "keywords: Field required"),
        ("keywords:existence", {"keywords": None}, "keywords: Field required"),
        ("keywords:existence", {"keywords": []}, "keywords: List should have at least 1 item"),
        ("keywords:existence", {"keywords": "river"}, "keywords: Input should be a valid list"),
        ("keywords:existence", {"keywords": [" "]}, "must not be empty"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "must be a number, not '3'"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "must be a number, not True"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "num_words"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "relation: Input should be 'less than'"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "letter"),
        ("language:response_language", {"language": "xx"}, "must be one of af"),
    ],
)
def test_instruction_that_cannot_be_checked_has_no_score(name, kwargs, reason):
    result = grade("some text", ("punctuation:no_comma", {}), (name, kwargs))
    assert (result.label, result.score, result.outcome, result.details) == ("", None, Outcome.UNPARSEABLE, {})
    assert reason in result.outcome_reason and name in result.outcome_reason


@pytest.mark.parametrize(
    "instructions", ["{", "{}", "[]", "[1]", '[{"kwargs": {}}]', '[{"id": "punctuation:no_comma", "kwargs": [1]}]']
)
def test_instructions_that_are_not_a_list_have_no_score(instructions):
    text = GradedText((), "text", suite_item=SuiteItem(suite="s", item="1", instructions=instructions))
    ((result,),) = InstructionsGrader().grade([text])
    assert (result.outcome, result.score) == (Outcome.UNPARSEABLE, None) and result.outcome_reason


def test_parameters_that_other_copies_of_the_data_write_are_read():
    """Some copies write all parameters of all instructions, as null, and whole numbers as 3.0."""
    kwargs = {"num_words": 3.0, "relation": "at least", "keywords": None, "language": None}
    (instruction,) = parse_instructions(json.dumps([{"id": "length_constraints:number_words", "kwargs": kwargs}]))
    assert instruction.num_words == 3
    assert parse_instructions('[{"id": "punctuation:no_comma", "kwargs": null}]') == parse_instructions(
        '[{"id": "punctuation:no_comma"}]'
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no mark", 1),
        ("Mr. Smith met Dr. Jones at 5 p.m. in the U.S. capital. They talked.", 2),
        ("He arrived at 5 p.m. She left.", 2),
        ("He said “Stop!” Then he left...  maybe. Really?!", 3),
        ("1. First do this.\n2. Then do that.\na) and\nb. this", 3),
        ("See www.example.com or version 1.2.3 now. Yes", 2),
        ("J. R. Miller wrote it. So did I. We know.", 3),
        ("lower case here. still lower case. all of it.", 3),
        ("これは文です。これも文です。", 2),
        ("Really? (Yes.) Fine!", 3),
        ("... !", 0),
    ],
)
def test_count_sentences(text, count):
    assert count_sentences(text) == count


def test_languages_are_those_of_the_detector():
    profiles = {file.name for file in Path(PROFILES_DIRECTORY).iterdir() if not file.name.startswith(".")}
    assert sorted([*profiles, "zh"]) == sorted(LANGUAGES)


def test_language_is_the_same_in_each_call():
    ambiguous = "hotel taxi radio"
    assert len({detect_language(ambiguous) for _ in range(20)}) == 1


def test_stage_grades_only_prompts_with_instructions():
    messages, completion = (
        [ChatMessage(role="user", content="?")],
        Completion(index=0, text="a, b", finish_reason=FinishReason.STOP),
    )
    item = SuiteItem(suite="ifeval", item="1", instructions='[{"id": "punctuation:no_comma"}]')
    record_id = ids.compute_id("a")
    plain, of_suite = (
        Response(
            record_id=record_id, prompt_id=record_id, run_id="r", stage="respond", source="s", messages=messages,
            completions=[completion], suite_item=suite_item,
        )
        for suite_item in (None, item)
    )  # fmt: skip
    stage = GradeStage([InstructionsGrader(), LengthGrader()], [COMPLETION], load_constitution("default"))
    of_plain, of_item = stage([plain, of_suite])
    assert [grade.grader for grade in of_plain] == ["length"]
    assert [(grade.grader, grade.label, grade.score) for grade in of_item] == [
        ("instructions", FAILS, 0.0),
        ("length", "complete", 2.0),
    ]


def test_grader_can_be_named_in_the_settings(monkeypatch):
    settings, _ = load_settings({"grade.graders": '["instructions"]', "models.judge": "scripted"}, None, None)
    stage = make_grade_stage(settings, RoleModels(settings), load_constitution("default"))
    assert [grader.name for grader in stage.graders] == ["instructions"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package langdetect"):
        make_grade_stage(settings, RoleModels(settings), load_constitution("default"))
