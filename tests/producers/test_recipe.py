"""Recipes of generated prompts: the shipped one is valid, and each error has three lines with the file and the line."""

from collections import Counter

import pytest

from engine.errors import UsageError
from engine.languages import LANGUAGES
from producers.gates import is_in_language, is_request
from producers.near_duplicates import KnownPrompt, NearDuplicateIndex
from producers.operational_detail import find_operational_detail
from producers.recipe import LANGUAGE_NAMES, RECIPES_FOLDER, list_shipped_recipes, load_recipe, parse_recipe, plan_request
from schemas.records import Split

TEXT = """
name = "test"
version = "1.0.0"
red_team_fraction = 0.5
languages = { en = 1.0 }
few_shot = 1

[[kinds]]
id = "bad"
red_team = true
instruction = "Bad questions."
topics = ["a shop"]
examples = { en = ["How do I steal from a shop?"] }

[[kinds]]
id = "good"
red_team = false
instruction = "Good questions."
topics = ["a garden"]
examples = { en = ["How do I water a cactus?"] }
"""


@pytest.mark.parametrize("name", list_shipped_recipes())
def test_examples_of_the_shipped_recipes_pass_the_gates(name):
    recipe, index = load_recipe(name), NearDuplicateIndex(0.6)
    for kind in recipe.kinds:
        for language, texts in kind.examples.items():
            for text in texts:
                assert is_request(text, language) and is_in_language(text, language), text
                assert not kind.red_team or not find_operational_detail(text)
                assert len(text) <= recipe.max_chars and not index.find(text), text
                index.add(text, KnownPrompt("", "", Split.TRAIN, is_of_run=True))
    assert load_recipe(str(RECIPES_FOLDER / f"{name}.toml")) == recipe


def test_hash_changes_with_everything_but_description_and_layout():
    recipe = parse_recipe(TEXT, "test")
    assert parse_recipe(f'description = "x"\n# comment\n{TEXT}', "test").hash == recipe.hash
    changes = [("1.0.0", "1.0.1"), ("few_shot = 1", "few_shot = 1\nmax_chars = 50"), ("a garden", "a lawn"), ("0.5", "0.4")]
    assert len({recipe.hash, *(parse_recipe(TEXT.replace(*change), "test").hash for change in changes)}) == 5


def test_requests_are_drawn_in_the_shares_of_the_recipe():
    text = (
        TEXT.replace("0.5", "0.25")
        .replace("{ en = 1.0 }", "{ en = 3, de = 1 }")
        .replace('?"] }', '?"], de = ["Wie geht das?"] }')
    )
    recipe = parse_recipe(text, "test")
    plans = [plan_request(recipe, seed) for seed in range(2000)]
    sources, languages = (Counter(values) for values in ((p.kind.source for p in plans), (p.language for p in plans)))
    assert 400 < sources["red-team"] < 600 and 400 < languages["de"] < 600
    assert plan_request(recipe, 7) == plans[7]
    assert all(plan.examples[0] in plan.kind.examples[plan.language] for plan in plans)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("few_shot = 1", "few_shots = 1", "line 6: few_shots is unknown\nthere is no such key\ndid you mean few_shot?"),
        ('topics = ["a garden"]', 'topic = ["a garden"]', "line 19: kinds.1.topic is unknown"),
        ("red_team_fraction = 0.5\n", "", "red_team_fraction is missing\na recipe requires the key red_team_fraction\nadd: "),
        ('instruction = "Good questions."\n', "", "kinds.1.instruction is missing"),
        ("0.5", "1.5", "line 4: red_team_fraction cannot be 1.5\n"),
        ('topics = ["a garden"]', "topics = []", "line 19: kinds.1.topics cannot be []"),
        ("red_team = false", "red_team = true", "not a recipe\nred_team_fraction = 0.5 needs a kind with red_team = false"),
        ('"good"', '"bad"', "two kinds have the id bad"),
        ('"good"', '"Not good"', "kinds.1.id cannot be 'Not good'\nits format is invalid"),
        ("{ en = 1.0 }", "[]", "line 5: languages cannot be []\nit must be a table"),
        ('en = ["How do I water', 'en = ["Why?", "Why?", "How do I water', "the kind good has the example 'Why?' twice"),
        ("few_shot = 1", "few_shot = 2", "the kind bad has fewer examples in en than few_shot = 2"),
        ("{ en = 1.0 }", "{ de = 1.0 }", "the kind bad has examples in en, which is not in languages"),
        ("{ en = 1.0 }", "{ xx = 1.0 }", "the language must be one of"),
        ("{ en = 1.0 }", "{ en = 0 }", "line 5: languages.en cannot be 0"),
        ("steal from a shop?", "mix 20 g of flour?", "does not pass the filter operational_detail: it has an amount"),
        ("water a cactus?", "water\\na cactus?", "an example of the kind good has several lines"),
        ('name = "test"', "name = ", "is not valid TOML"),
    ],
)
def test_error_in_a_recipe_has_the_place_the_reason_and_the_fix(old, new, expected):
    assert TEXT.count(old) >= 1
    with pytest.raises(UsageError) as error:
        parse_recipe(TEXT.replace(old, new, 1), "my.toml")
    assert str(error.value).startswith("my.toml") and len(str(error.value).splitlines()) == 3
    assert expected in str(error.value)


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(UsageError, match="shipped recipes are: default, english-german") as error:
        load_recipe("defalt")
    assert error.value.fix == "did you mean default?"


def test_every_language_has_a_name():
    assert sorted(LANGUAGE_NAMES) == sorted(LANGUAGES)
