"""Constitution files: includes, terms, prose and encodings; arbitrary bytes load or raise ConstitutionError."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constitutions.loader import (
    CONSTITUTIONS_FOLDER,
    PRIORITIZED_PRINCIPLES_TEMPLATE,
    Constitution,
    ConstitutionError,
    list_shipped_constitutions,
    load_constitution,
    parse_constitution,
    render_toml,
    to_toml_values,
)

HEAD = 'name = "mine"\nversion = "1.0.0"\n'
CRITIQUE = (
    '[[critique]]\nid = "{id}"\nname = "N"\ncritique_prompt = "Say whether it is rude."\nrevision_prompt = "Rewrite it."\n'
)
JUDGING = '[[judge]]\nid = "{id}"\nname = "N"\njudge_prompt = "Which answer is kinder?"\n'
PROSE = (
    HEAD
    + '''
[[prose]]
id = "helpful"
name = "Helpfulness"
priority = 2
text = """
The assistant helps.
[[prose]] is not a table here.
"""

[[prose]]
id = "safe"
name = "Safety"
priority = 1
text = "The assistant hurts nobody."
'''
)


def make_entry(template, id):
    return template.replace("{id}", id)


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file


def assert_error(text_or_path, *expected):
    """Assert that loading the file, or parsing the text, fails with an error of three lines that contains these words."""
    with pytest.raises(ConstitutionError) as caught:
        load_constitution(text_or_path) if hasattr(text_or_path, "read_bytes") else parse_constitution(text_or_path, "my.toml")
    assert len(str(caught.value).splitlines()) == 3, str(caught.value)
    assert all(word in str(caught.value) for word in expected), str(caught.value)


# Includes


def test_included_entries_come_first_and_appear_once(write):
    write("base.toml", make_entry(CRITIQUE, "one") + make_entry(JUDGING, "j"))
    write("more.toml", 'include = ["base.toml"]\n' + make_entry(CRITIQUE, "two"))
    mine = load_constitution(
        write("mine.toml", HEAD + 'include = ["more.toml", "base.toml"]\n' + make_entry(CRITIQUE, "three"))
    )
    assert [p.id for p in mine.critique] == ["one", "two", "three"] and [p.id for p in mine.judge] == ["j"]
    location = mine.find_location("critique", "two")
    assert location.origin.endswith("more.toml") and location.find_line() == 2 and location.find_line("revision_prompt") == 6


def test_include_of_a_shipped_constitution_gives_a_self_contained_text(write):
    mine = load_constitution(write("mine.toml", HEAD + 'include = ["customer-service"]\n' + make_entry(CRITIQUE, "mine")))
    assert len(mine.critique) == 6 and "include" not in mine.text
    assert parse_constitution(mine.text, "a topic").hash == mine.hash


def test_circular_include_is_an_error(write):
    write("b.toml", '\ninclude = ["a.toml"]\n')
    assert_error(write("a.toml", HEAD + 'include = ["b.toml"]\n'), "b.toml, line 2", "a.toml -> b.toml -> a.toml")
    assert_error(write("self.toml", HEAD + 'include = ["self.toml"]\n'), "line 3", "self.toml -> self.toml")


def test_deeply_nested_include_is_an_error(write):
    for number in range(30):
        write(f"{number}.toml", f'include = ["{number + 1}.toml"]\n')
    assert_error(write("30.toml", HEAD + 'include = ["0.toml"]\n'), "longer than 16 files")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('include = ["nowhere.toml"]', ["line 3", "nowhere.toml"]),
        ('include = ["red-taem"]', ["did you mean red-team?"]),
        ("include = [1]", ["line 3", "not a list of names"]),
        ('include = "default"', ["include = ["]),
        ('include = ["course", "customer-service", "course.toml"]', ["course.toml"]),
    ],
)
def test_error_for_an_invalid_include_names_the_line(text, expected):
    assert_error(HEAD + text + "\n", "my.toml, line", *expected)


def test_error_for_a_duplicate_id_names_both_locations(write):
    write("base.toml", make_entry(CRITIQUE, "one") + make_entry(JUDGING, "j"))
    mine = write("mine.toml", HEAD + 'include = ["base.toml"]\n' + make_entry(CRITIQUE, "one"))
    assert_error(mine, "mine.toml, line 5", "base.toml, line 2", "one")


def test_error_for_an_unknown_key_names_the_line_of_the_included_file(write):
    write("base.toml", make_entry(CRITIQUE, "one") + "weigth = 2\n" + make_entry(JUDGING, "j"))
    assert_error(write("mine.toml", HEAD + 'include = ["base.toml"]\n'), "base.toml, line 6", "did you mean weight?")
    write("base.toml", "wat = 1\n")
    assert_error(write("mine.toml", HEAD + 'include = ["base.toml"]\n'), "base.toml, line 1: wat")


# Terms


TERMS = HEAD + '[terms]\ncompany = "Acme"\n' + make_entry(CRITIQUE, "c") + make_entry(JUDGING, "j")


def test_placeholders_are_replaced_by_terms_and_doubled_braces_are_kept():
    mine = parse_constitution(TERMS.replace("rude.", "rude to {company}, {{x}} or {1}."), "x")
    assert mine.critique[0].critique_prompt == "Say whether it is rude to Acme, {x} or {1}."
    assert parse_constitution(render_toml(to_toml_values(mine)), "x").critique == mine.critique


def test_including_file_overrides_a_term(write):
    write("base.toml", TERMS.replace(HEAD, "").replace("rude.", "rude to {company}."))
    mine = load_constitution(write("mine.toml", HEAD + 'include = ["base.toml"]\n[terms]\ncompany = "Bolt"\n'))
    assert mine.critique[0].critique_prompt.endswith("rude to Bolt.")


def test_error_for_an_unknown_placeholder_names_the_line_and_the_nearest_term():
    assert_error(
        TERMS.replace("Rewrite it.", "Rewrite it for {compny}."), "line 9", "{compny}", "did you mean company?", "{{compny}}"
    )
    assert_error(TERMS.replace("rude.", "rude to {who}."), "line 8", "{who}", 'who = "..."')
    assert_error(TERMS.replace('"Acme"', "3"), "line 4", "company")
    assert_error(HEAD + "terms = 3\n", "line 3", "is not a table")


# Prose


def test_prose_is_ordered_by_priority():
    mine = parse_constitution(PROSE, "x")
    assert [p.id for p in mine.critique] == [p.id for p in mine.judge] == ["safe", "helpful"] and mine.judge_with == "all"
    assert "comes first" not in mine.critique[0].revision_prompt
    assert mine.critique[1].revision_prompt.endswith("this comes first: Safety.")
    lines = "1. Safety: The assistant hurts nobody.\n2. Helpfulness: The assistant helps.\n[[prose]] is not a table here."
    assert mine.combined_judge_prompt == PRIORITIZED_PRINCIPLES_TEMPLATE.format(lines=lines)
    assert mine.find_location("prose", "safe").find_line() == 13


def test_priority_and_judge_with_change_the_hash():
    mine = parse_constitution(PROSE, "x")
    assert parse_constitution(PROSE.replace("priority = 2", "priority = 3"), "x").hash != mine.hash
    assert parse_constitution(HEAD + 'judge_with = "one"\n' + PROSE.removeprefix(HEAD), "x").hash != mine.hash


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE.replace("priority = 2\n", ""), ["line 4: prose.0.priority", "missing"]),
        (PROSE.replace("priority = 2\n", "priority = 0\n"), ["line 7"]),
        (PROSE.replace('"safe"', '"helpful"'), ["line 14", "helpful", "line 5"]),
        (PROSE + make_entry(JUDGING, "j"), ["line 18", "with prose cannot have a judge list"]),
        (HEAD + "prose = []\n", ["line 3", "empty list"]),
        (HEAD + "critique = []\njudge = []\n", ["line 3", "empty list", "[[critique]]"]),
        (HEAD + "critique = 7\n", ["line 3", "is not a list"]),
        (
            HEAD + make_entry(CRITIQUE, "all") + make_entry(JUDGING, "j"),
            ["line 4: critique.0.id cannot be 'all'", "is reserved"],
        ),
        (
            HEAD + make_entry(CRITIQUE, "c") + 'tags = "angry"\n' + make_entry(JUDGING, "j"),
            ["line 8", "'angry'", "must be a list"],
        ),
        (HEAD + 'text = "x"\n' + make_entry(CRITIQUE, "c") + make_entry(JUDGING, "j"), ["line 3", "text", "unknown"]),
        (HEAD + "critique = [1]\n" + make_entry(JUDGING, "j"), ["line 3"]),
    ],
)
def test_error_for_invalid_prose_or_lists_names_the_line(text, expected):
    assert_error(text, *expected)


# Encodings and arbitrary bytes


def test_wrong_encoding_is_an_error_and_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes((HEAD + 'description = "caf\u00e9"').encode("latin-1"))
    assert_error(path, "line 3", "0xe9", "iconv -f LATIN1")
    path.write_bytes((CONSTITUTIONS_FOLDER / "course.toml").read_text().encode("utf-16"))
    assert_error(path, "UTF-16")
    path.write_bytes(b"\xef\xbb\xbf" + (CONSTITUTIONS_FOLDER / "course.toml").read_bytes())
    assert load_constitution(path).hash == load_constitution("course").hash
    path.write_bytes(b"#" * (1 << 20) + b"#")
    assert_error(path, "longer than")


def parse_or_expect_error(data):
    try:
        assert isinstance(parse_constitution(data, "x"), Constitution)
    except ConstitutionError as error:
        assert error.what and error.fix


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(st.characters(), max_size=200)))
def test_arbitrary_bytes_load_or_raise_constitution_error(data):
    parse_or_expect_error(data)


KEYS = [
    "name",
    "version",
    "critique",
    "judge",
    "prose",
    "examples",
    "include",
    "terms",
    "id",
    "text",
    "weight",
    "priority",
    "tags",
]
VALUES = st.recursive(
    st.one_of(
        st.integers(-5, 5),
        st.booleans(),
        st.floats(),
        st.text("a{}-{b}\n", max_size=6),
        st.sampled_from(["mine", "1.0.0", "course"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=8,
)


def to_inline_toml(value):
    """Render a value as TOML with inline tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {to_inline_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_inline_toml, value))}]"
    if isinstance(value, str):
        return '"' + value.replace("\n", "\\n") + '"'
    return str(value).lower()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_arbitrary_values_load_or_raise_constitution_error(values):
    parse_or_expect_error("".join(f"{key} = {to_inline_toml(value)}\n" for key, value in values.items()))


def test_huge_number_and_deep_nesting_raise_constitution_error():
    assert_error(f"weight = {'9' * 5000}", "is not valid TOML")
    with pytest.raises(ConstitutionError, match="not valid TOML"):
        parse_constitution("a = " + "[" * 5000, "x")


# Rendering


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.floats(0.01, 100)), min_size=1, max_size=3))
def test_rendered_constitution_parses_to_the_same_content(texts):
    values = {
        "name": "mine",
        "version": "1.0.0",
        "description": texts[0][0],
        "critique": [
            {"id": f"c-{n}", "name": a, "weight": w, "critique_prompt": a, "revision_prompt": "R"}
            for n, (a, _, w) in enumerate(texts)
        ],
        "judge": [{"id": "j", "name": "N", "tags": ["x", "y"], "judge_prompt": texts[0][1]}],
    }
    mine = parse_constitution(render_toml(values), "x")
    assert mine.description == texts[0][0] and mine.judge[0].judge_prompt.strip() == texts[0][1].strip()
    assert parse_constitution(render_toml(to_toml_values(mine)), "x").hash == mine.hash


@pytest.mark.parametrize("name", list_shipped_constitutions())
def test_rendered_shipped_constitution_has_the_same_hash(name):
    constitution = load_constitution(name)
    assert parse_constitution(render_toml(to_toml_values(constitution)), "x").hash == constitution.hash


# Excluding principles


def test_without_principles_removes_them_from_both_lists_and_renames_the_constitution():
    course = load_constitution("course")
    reduced = course.without_principles(["honesty"])
    assert [p.id for p in reduced.critique] == [p.id for p in reduced.judge] == ["harmlessness", "helpfulness"]
    assert reduced.name == "course-without-honesty" and reduced.hash != course.hash
    assert "honesty" not in re.findall(r'id = "(.*)"', reduced.text)
    assert parse_constitution(reduced.text, "a topic").hash == reduced.hash
    with pytest.raises(ConstitutionError, match="did you mean honesty"):
        course.without_principles(["honestly"])
    with pytest.raises(ConstitutionError, match="no critique principle left"):
        course.without_principles(["harmlessness", "helpfulness", "honesty"])
    assert [p.id for p in parse_constitution(PROSE, "x").without_principles(["safe"]).judge] == ["helpful"]


def test_without_principles_changes_only_samples_of_the_excluded_ones():
    complete = load_constitution("default")
    reduced = complete.without_principles(["more-truth", "privacy"])
    for seed in range(300):
        before, after = complete.sample_judge_principle(seed).id, reduced.sample_judge_principle(seed).id
        assert after == before or before == "more-truth"
        before, after = complete.select_critique_principle(seed, 0).id, reduced.select_critique_principle(seed, 0).id
        assert after == before or before == "privacy"
