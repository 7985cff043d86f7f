"""Constitutions: the shipped ones are whole, a bad one is explained with its place, draws are stable."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constitutions.loader import (
    CONSTITUTIONS_FOLDER,
    Constitution,
    ConstitutionError,
    list_shipped_constitutions,
    load_constitution,
    parse_constitution,
)

GOOD = (CONSTITUTIONS_FOLDER / "course.toml").read_text()


@pytest.mark.parametrize(("name", "critique", "judging"), [("default", 16, 16), ("customer-service", 5, 5), ("course", 3, 3)])
def test_shipped_constitutions_have_their_numbers(name, critique, judging):
    constitution = load_constitution(name)
    assert (len(constitution.critique), len(constitution.judge)) == (critique, judging)


def test_all_shipped_constitutions_load_under_their_names():
    assert list_shipped_constitutions() == ["course", "customer-service", "default", "red-team"]
    assert [load_constitution(name).name for name in list_shipped_constitutions()] == list_shipped_constitutions()
    assert load_constitution("course").judge_with == "all"


def test_comments_and_layout_do_not_change_the_hash_but_words_do():
    base = parse_constitution(GOOD, "x")
    assert parse_constitution("# a comment\n\n" + GOOD, "x").hash == base.hash
    assert parse_constitution(GOOD.replace("useful", "handy"), "x").hash != base.hash


def test_the_hash_survives_the_journey_through_a_topic():
    base = load_constitution("default")
    assert parse_constitution(base.text, "a topic").hash == base.hash


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.replace('version = "1.1.0"', 'version = "one"'), ["line 3", "version", "three numbers"]),
        (lambda t: t.replace('version = "1.1.0"', ""), ["version", "missing"]),
        (lambda t: t.replace('critique_prompt = "Say', 'critque = "Say', 1), ["critque is unknown", "line 17"]),
        (lambda t: t.replace('id = "honesty"', 'id = "harmlessness"'), ["two critique principles", "harmlessness"]),
        (lambda t: t.replace('id = "honesty"', 'id = "Not A Slug"'), ["critique.2.id", "line 27", "words with hyphens"]),
        (lambda t: t + "\nnonsense", ["is not TOML", "line"]),
        (lambda t: t.split("[[judge]]")[0], ["judge", "missing", "[[judge]]"]),
        (lambda t: t.replace("[[critique]]", 'weigth = 1\n[[critique]]', 1), ["weigth", "unknown"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(damage, words):
    with pytest.raises(ConstitutionError) as caught:
        parse_constitution(damage(GOOD), "my.toml")
    assert "my.toml" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_typo_in_a_name_is_recognised(tmp_path):
    with pytest.raises(ConstitutionError, match="did you mean default"):
        load_constitution("defualt")
    bad = tmp_path / "latin.toml"
    bad.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(ConstitutionError, match="not UTF-8"):
        load_constitution(bad)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mutation_loads_or_is_explained(data):
    text = list(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 12))] = data.draw(st.text(max_size=6))
    try:
        assert isinstance(parse_constitution("".join(text), "x"), Constitution)
    except ConstitutionError as error:
        assert error.what


def test_draws_are_uniform_stable_and_independent_of_the_process():
    constitution = load_constitution("default")
    drawn = Counter(constitution.sample_judge_principle(seed).id for seed in range(8000))
    assert len(drawn) == 16 and min(drawn.values()) > 400 and max(drawn.values()) < 600
    assert constitution.sample_judge_principle(7).id == load_constitution("default").sample_judge_principle(7).id


def test_weights_and_tags_and_rotation():
    text = GOOD.replace('selection = "rotate"', "").replace('id = "honesty"\nname', 'id = "honesty"\nweight = 8.0\nname', 1)
    drawn = Counter(parse_constitution(text, "x").select_critique_principle(seed, 0).id for seed in range(2000))
    assert 0.75 < drawn["honesty"] / 2000 < 0.85
    tagged = parse_constitution(GOOD.replace('id = "honesty"\nname', 'id = "honesty"\ntags = ["facts"]\nname'), "x")
    assert [tagged.select_critique_principle(0, n, []).id for n in range(3)] == ["harmlessness", "helpfulness", "harmlessness"]
    assert [tagged.select_critique_principle(0, n, ["facts"]).id for n in range(3)][2] == "honesty"
