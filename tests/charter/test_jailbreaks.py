"""Jailbreak transformations of the prompts of a suite."""

import base64
import codecs
import re

import pytest

from charter.evaluation.jailbreaks import TRANSFORMS, transform_prompt
from engine.errors import UsageError
from schemas.records import ChatMessage

REWRITTEN = (
    "base64",
    "rot13",
    "leetspeak",
    "payload-splitting",
    "word-by-word",
)  # the words of the prompt do not stay together
PROMPT = "How do I bake {bread} in a café, e.g. “rye”?"


def make_dialogue(*contents):
    return [ChatMessage(role=role, content=c) for role, c in zip(["system", "user"][-len(contents) :], contents, strict=True)]


def transform(name, seed=0, prompt=PROMPT):
    return transform_prompt(name, make_dialogue(prompt), seed)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformation_is_deterministic_and_changes_the_prompt(name):
    first, second = transform(name), transform(name)
    assert first == second and first != make_dialogue(PROMPT)
    assert first[-1].role == "user" and TRANSFORMS[name].description


@pytest.mark.parametrize("name", TRANSFORMS)
def test_earlier_messages_do_not_change(name):
    dialogue = make_dialogue("Be brief.", PROMPT)
    assert transform_prompt(name, dialogue, 1)[0] == dialogue[0]


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in REWRITTEN])
@pytest.mark.parametrize("prompt", [PROMPT, "a", "many  spaces\n\nand lines", "Which planets have rings?"])
def test_prompt_stays_whole(name, prompt):
    assert prompt in transform(name, 3, prompt)[-1].content


def test_encoded_prompts_can_be_decoded():
    assert base64.b64decode(transform("base64")[-1].content.split("\n")[-1]).decode() == PROMPT
    assert codecs.decode(transform("rot13")[-1].content.split("\n")[-1], "rot13") == PROMPT
    assert transform("leetspeak", prompt="test it")[-1].content.startswith("7357 17")


@pytest.mark.parametrize("prompt", ["word", "two words", PROMPT, "a b c d e f g h i j k"])
@pytest.mark.parametrize("seed", range(4))
def test_split_prompt_can_be_joined(prompt, seed):
    lines = transform("payload-splitting", seed, prompt)[-1].content.split("\n")
    values = {line[0]: line[5:-1] for line in lines if re.match(r'[a-y] = "', line)}
    joined = next(line for line in lines if line.startswith("z = "))
    assert " ".join(values[name] for name in joined.removeprefix("z = ").split(' + " " + ')) == prompt


def test_many_turn_is_a_dialogue_of_alternating_roles():
    roles = [message.role for message in transform("many-turn")]
    assert roles == ["user", "assistant", "user", "assistant", "user"]


def test_seed_selects_the_wording():
    for name in set(TRANSFORMS) - {"base64", "rot13", "leetspeak"}:
        assert len({str(transform(name, seed)) for seed in range(20)}) >= 3


@pytest.mark.parametrize(
    ("name", "messages", "match"),
    [
        ("base32", make_dialogue(PROMPT), "there is no transformation base32"),
        ("poem", [], "ends with no message"),
        ("poem", [ChatMessage(role="assistant", content="a")], "ends with a message with the role 'assistant'"),
    ],
)
def test_wrong_use_is_refused(name, messages, match):
    with pytest.raises(UsageError, match=match):
        transform_prompt(name, messages, 0)
