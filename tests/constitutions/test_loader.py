"""Loading constitutions: the shipped ones, errors with their location, and stable sampling of principles."""

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

VALID = (CONSTITUTIONS_FOLDER / "course.toml").read_text()


@pytest.mark.parametrize(
    ("name", "num_critique", "num_judge"), [("default", 16, 16), ("customer-service", 5, 5), ("course", 3, 3)]
)
def test_shipped_constitution_has_its_number_of_principles(name, num_critique, num_judge):
    constitution = load_constitution(name)
    assert (len(constitution.critique), len(constitution.judge)) == (num_critique, num_judge)


def test_shipped_constitutions_load_by_name():
    assert list_shipped_constitutions() == ["course", "customer-service", "default", "one-sentence", "red-team"]
    assert [load_constitution(name).name for name in list_shipped_constitutions()] == list_shipped_constitutions()
    assert load_constitution("course").judge_with == "all"


def test_hash_depends_on_content_and_not_on_comments():
    base = parse_constitution(VALID, "x")
    assert parse_constitution("# a comment\n\n" + VALID, "x").hash == base.hash
    assert parse_constitution(VALID.replace("useful", "handy"), "x").hash != base.hash


def test_hash_of_the_rendered_text_is_the_same():
    base = load_constitution("default")
    assert parse_constitution(base.text, "a topic").hash == base.hash


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda t: t.replace('version = "1.1.0"', 'version = "one"'), ["line 3", "version", "three numbers"]),
        (lambda t: t.replace('version = "1.1.0"', ""), ["version", "missing"]),
        (lambda t: t.replace('critique_prompt = "Say', 'critque = "Say', 1), ["critque is unknown", "line 17"]),
        (lambda t: t.replace('id = "honesty"', 'id = "harmlessness"'), ["two critique principles", "harmlessness"]),
        (lambda t: t.replace('id = "honesty"', 'id = "Not A Slug"'), ["critique.2.id", "line 27", "words with hyphens"]),
        (lambda t: t + "\nnonsense", ["is not valid TOML", "line"]),
        (lambda t: t.split("[[judge]]")[0], ["judge", "missing", "[[judge]]"]),
        (lambda t: t.replace("[[critique]]", 'weigth = 1\n[[critique]]', 1), ["weigth", "unknown"]),
    ],
)  # fmt: skip
def test_error_names_the_line_and_the_key(damage, expected):
    with pytest.raises(ConstitutionError) as caught:
        parse_constitution(damage(VALID), "my.toml")
    assert "my.toml" in str(caught.value)
    assert all(word in str(caught.value) for word in expected), str(caught.value)


def test_load_constitution_suggests_a_name_and_rejects_a_wrong_encoding(tmp_path):
    with pytest.raises(ConstitutionError, match="did you mean default"):
        load_constitution("defualt")
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(ConstitutionError, match="not UTF-8"):
        load_constitution(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_constitution_loads_or_raises_constitution_error(data):
    text = list(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 12))] = data.draw(st.text(max_size=6))
    try:
        assert isinstance(parse_constitution("".join(text), "x"), Constitution)
    except ConstitutionError as error:
        assert error.what


def test_sampling_of_principles_is_uniform_and_reproducible():
    constitution = load_constitution("default")
    counts = Counter(constitution.sample_judge_principle(seed).id for seed in range(8000))
    assert len(counts) == 16 and min(counts.values()) > 400 and max(counts.values()) < 600
    assert constitution.sample_judge_principle(7).id == load_constitution("default").sample_judge_principle(7).id


def test_selection_follows_weights_tags_and_rotation():
    text = VALID.replace('selection = "rotate"', "").replace('id = "honesty"\nname', 'id = "honesty"\nweight = 8.0\nname', 1)
    counts = Counter(parse_constitution(text, "x").select_critique_principle(seed, 0).id for seed in range(2000))
    assert 0.75 < counts["honesty"] / 2000 < 0.85
    tagged = parse_constitution(VALID.replace('id = "honesty"\nname', 'id = "honesty"\ntags = ["facts"]\nname'), "x")
    assert [tagged.select_critique_principle(0, n, []).id for n in range(3)] == ["harmlessness", "helpfulness", "harmlessness"]
    assert [tagged.select_critique_principle(0, n, ["facts"]).id for n in range(3)][2] == "honesty"
