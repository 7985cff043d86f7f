"""Files of a constitution: includes, terms, prose, encodings; any bytes are a constitution or explained."""

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


def entry(template, id):
    return template.replace("{id}", id)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def fails(text_or_path, *words):
    """The error of loading a file, or of parsing a text, has three lines and these words."""
    with pytest.raises(ConstitutionError) as caught:
        load_constitution(text_or_path) if hasattr(text_or_path, "read_bytes") else parse_constitution(text_or_path, "my.toml")
    assert len(str(caught.value).splitlines()) == 3, str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Includes


def test_included_entries_come_first_and_only_once(write):
    write("base.toml", entry(CRITIQUE, "one") + entry(JUDGING, "j"))
    write("more.toml", 'include = ["base.toml"]\n' + entry(CRITIQUE, "two"))
    mine = load_constitution(write("mine.toml", HEAD + 'include = ["more.toml", "base.toml"]\n' + entry(CRITIQUE, "three")))
    assert [p.id for p in mine.critique] == ["one", "two", "three"] and [p.id for p in mine.judge] == ["j"]
    place = mine.find_location("critique", "two")
    assert place.origin.endswith("more.toml") and place.find_line() == 2 and place.find_line("revision_prompt") == 6


def test_a_shipped_constitution_is_included_by_name_and_the_text_needs_no_other_file(write):
    mine = load_constitution(write("mine.toml", HEAD + 'include = ["customer-service"]\n' + entry(CRITIQUE, "mine")))
    assert len(mine.critique) == 6 and "include" not in mine.text
    assert parse_constitution(mine.text, "a topic").hash == mine.hash


def test_an_include_that_goes_round_in_a_circle_is_an_error(write):
    write("b.toml", '\ninclude = ["a.toml"]\n')
    fails(write("a.toml", HEAD + 'include = ["b.toml"]\n'), "b.toml, line 2", "a.toml -> b.toml -> a.toml")
    fails(write("self.toml", HEAD + 'include = ["self.toml"]\n'), "line 3", "self.toml -> self.toml")


def test_includes_that_nest_too_deep_are_an_error(write):
    for number in range(30):
        write(f"{number}.toml", f'include = ["{number + 1}.toml"]\n')
    fails(write("30.toml", HEAD + 'include = ["0.toml"]\n'), "more than 16 files")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('include = ["nowhere.toml"]', ["line 3", "nowhere.toml"]),
        ('include = ["red-taem"]', ["did you mean red-team?"]),
        ("include = [1]", ["line 3", "no list of names"]),
        ('include = "default"', ["include = ["]),
        ('include = ["course", "customer-service", "course.toml"]', ["course.toml"]),
    ],
)
def test_what_is_wrong_with_an_include_is_said(text, words):
    fails(HEAD + text + "\n", "my.toml, line", *words)


def test_a_duplicate_id_names_both_places(write):
    write("base.toml", entry(CRITIQUE, "one") + entry(JUDGING, "j"))
    mine = write("mine.toml", HEAD + 'include = ["base.toml"]\n' + entry(CRITIQUE, "one"))
    fails(mine, "mine.toml, line 5", "base.toml, line 2", "one")


def test_an_unknown_key_of_an_included_file_is_found_in_its_place(write):
    write("base.toml", entry(CRITIQUE, "one") + "weigth = 2\n" + entry(JUDGING, "j"))
    fails(write("mine.toml", HEAD + 'include = ["base.toml"]\n'), "base.toml, line 6", "did you mean weight?")
    write("base.toml", "wat = 1\n")
    fails(write("mine.toml", HEAD + 'include = ["base.toml"]\n'), "base.toml, line 1: wat")


# Terms


TERMS = HEAD + '[terms]\ncompany = "Acme"\n' + entry(CRITIQUE, "c") + entry(JUDGING, "j")


def test_placeholders_stand_for_terms_and_doubled_braces_for_themselves():
    mine = parse_constitution(TERMS.replace("rude.", "rude to {company}, {{x}} or {1}."), "x")
    assert mine.critique[0].critique_prompt == "Say whether it is rude to Acme, {x} or {1}."
    assert parse_constitution(render_toml(to_toml_values(mine)), "x").critique == mine.critique


def test_the_including_file_says_what_a_term_means(write):
    write("base.toml", TERMS.replace(HEAD, "").replace("rude.", "rude to {company}."))
    mine = load_constitution(write("mine.toml", HEAD + 'include = ["base.toml"]\n[terms]\ncompany = "Bolt"\n'))
    assert mine.critique[0].critique_prompt.endswith("rude to Bolt.")


def test_an_unknown_placeholder_is_an_error_with_its_line_and_the_nearest():
    fails(TERMS.replace("Rewrite it.", "Rewrite it for {compny}."), "line 9", "{compny}", "did you mean company?", "{{compny}}")
    fails(TERMS.replace("rude.", "rude to {who}."), "line 8", "{who}", 'who = "..."')
    fails(TERMS.replace('"Acme"', "3"), "line 4", "company")
    fails(HEAD + "terms = 3\n", "line 3", "no table")


# Prose


def test_prose_is_read_in_the_order_of_its_priorities():
    mine = parse_constitution(PROSE, "x")
    assert [p.id for p in mine.critique] == [p.id for p in mine.judge] == ["safe", "helpful"] and mine.judge_with == "all"
    assert "comes first" not in mine.critique[0].revision_prompt
    assert mine.critique[1].revision_prompt.endswith("this comes first: Safety.")
    lines = "1. Safety: The assistant hurts nobody.\n2. Helpfulness: The assistant helps.\n[[prose]] is not a table here."
    assert mine.combined_judge_prompt == PRIORITIZED_PRINCIPLES_TEMPLATE.format(lines=lines)
    assert mine.find_location("prose", "safe").find_line() == 13


def test_a_priority_changes_the_hash_and_the_other_way_of_judging_too():
    mine = parse_constitution(PROSE, "x")
    assert parse_constitution(PROSE.replace("priority = 2", "priority = 3"), "x").hash != mine.hash
    assert parse_constitution(HEAD + 'judge_with = "one"\n' + PROSE.removeprefix(HEAD), "x").hash != mine.hash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PROSE.replace("priority = 2\n", ""), ["line 4: prose.0.priority", "missing"]),
        (PROSE.replace("priority = 2\n", "priority = 0\n"), ["line 7"]),
        (PROSE.replace('"safe"', '"helpful"'), ["line 14", "helpful", "line 5"]),
        (PROSE + entry(JUDGING, "j"), ["line 18", "prose and a judge list"]),
        (HEAD + "prose = []\n", ["line 3", "empty list"]),
        (HEAD + "critique = []\njudge = []\n", ["line 3", "empty list", "[[critique]]"]),
        (HEAD + "critique = 7\n", ["line 3", "no list"]),
        (HEAD + entry(CRITIQUE, "all") + entry(JUDGING, "j"), ["line 4: critique.0.id cannot be 'all'", "records say `all`"]),
        (HEAD + entry(CRITIQUE, "c") + 'tags = "angry"\n' + entry(JUDGING, "j"), ["line 8", "'angry'", "must be a list"]),
        (HEAD + 'text = "x"\n' + entry(CRITIQUE, "c") + entry(JUDGING, "j"), ["line 3", "text", "unknown"]),
        (HEAD + "critique = [1]\n" + entry(JUDGING, "j"), ["line 3"]),
    ],
)
def test_what_is_wrong_with_prose_and_lists_is_said(text, words):
    fails(text, *words)


# Encodings and any bytes


def test_a_wrong_encoding_is_said_with_its_line_and_a_byte_order_mark_is_no_harm(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes((HEAD + 'description = "caf\u00e9"').encode("latin-1"))
    fails(path, "line 3", "0xe9", "iconv -f LATIN1")
    path.write_bytes((CONSTITUTIONS_FOLDER / "course.toml").read_text().encode("utf-16"))
    fails(path, "UTF-16")
    path.write_bytes(b"\xef\xbb\xbf" + (CONSTITUTIONS_FOLDER / "course.toml").read_bytes())
    assert load_constitution(path).hash == load_constitution("course").hash
    path.write_bytes(b"#" * (1 << 20) + b"#")
    fails(path, "longer than")


def constitution_or_error(data):
    try:
        assert isinstance(parse_constitution(data, "x"), Constitution)
    except ConstitutionError as error:
        assert error.what and error.fix


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(st.characters(), max_size=200)))
def test_any_bytes_are_a_constitution_or_explained(data):
    constitution_or_error(data)


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


def inline(value):
    """Any value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, str):
        return '"' + value.replace("\n", "\\n") + '"'
    return str(value).lower()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_any_values_are_a_constitution_or_explained(values):
    constitution_or_error("".join(f"{key} = {inline(value)}\n" for key, value in values.items()))


def test_a_number_of_thousands_of_digits_and_deep_nesting_are_explained():
    fails(f"weight = {'9' * 5000}", "is not TOML")
    with pytest.raises(ConstitutionError, match="not TOML"):
        parse_constitution("a = " + "[" * 5000, "x")


# Writing


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.floats(0.01, 100)), min_size=1, max_size=3))
def test_what_is_written_reads_as_the_same(texts):
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
def test_shipped_constitutions_survive_being_written(name):
    constitution = load_constitution(name)
    assert parse_constitution(render_toml(to_toml_values(constitution)), "x").hash == constitution.hash


# Leaving out


def test_leaving_out_takes_a_principle_from_both_lists_and_is_a_constitution_of_its_own():
    course = load_constitution("course")
    less = course.without_principles(["honesty"])
    assert [p.id for p in less.critique] == [p.id for p in less.judge] == ["harmlessness", "helpfulness"]
    assert (
        less.name == "course-without-honesty"
        and less.hash != course.hash
        and "honesty" not in re.findall(r'id = "(.*)"', less.text)
    )
    assert parse_constitution(less.text, "a topic").hash == less.hash
    with pytest.raises(ConstitutionError, match="did you mean honesty"):
        course.without_principles(["honestly"])
    with pytest.raises(ConstitutionError, match="no critique principle left"):
        course.without_principles(["harmlessness", "helpfulness", "honesty"])
    assert [p.id for p in parse_constitution(PROSE, "x").without_principles(["safe"]).judge] == ["helpful"]


def test_leaving_out_moves_no_draw_but_its_own():
    whole = load_constitution("default")
    less = whole.without_principles(["more-truth", "privacy"])
    for seed in range(300):
        before, after = whole.sample_judge_principle(seed).id, less.sample_judge_principle(seed).id
        assert after == before or before == "more-truth"
        before, after = whole.select_critique_principle(seed, 0).id, less.select_critique_principle(seed, 0).id
        assert after == before or before == "privacy"
