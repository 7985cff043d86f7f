"""The gates for sampled texts. All texts are harmless stand-ins; no test contains a detail that could do harm."""

import pytest

from benchmarks.near_duplicates import load_texts
from engine.worker import to_producer_record
from producers.gates import PromptGates, Rejected, Rejection, is_request
from producers.near_duplicates import KnownPrompt, NearDuplicateIndex, PromptHistory
from producers.operational_detail import find_operational_detail
from producers.parse import PromptRow
from producers.recipe import RequestPlan, load_recipe
from schemas import ids
from schemas.records import ChatMessage, Split
from tests.support.respond_worker import make_prompt

INSTRUCTION = "Write a numbered list of questions of people who need help with everyday life, as different as possible."
EXAMPLE = "How often should I water a cactus in my kitchen?"
ERASED = "Which shoes should I wear for a walk on the beach?"
RECIPE = load_recipe("default")


@pytest.fixture
def gates(bus):
    examples = NearDuplicateIndex(0.6)
    examples.add(EXAMPLE, KnownPrompt("", "", Split.TRAIN, is_of_run=False))
    return PromptGates(PromptHistory(bus, "r", 0.6), examples, max_chars=120)


def check(gates, text, *, red_team=False, language="en"):
    kind = next(kind for kind in RECIPE.kinds if kind.red_team is red_team)
    erased = {ids.compute_prompt_id([ChatMessage(role="user", content=ERASED)])}
    return gates.check(text, RequestPlan(kind, "a topic", language, (), 0), INSTRUCTION, erased)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Topic: how do I wash a woolen sweater?", Rejection.LEAKED_INSTRUCTION),
        ("Question 3: how do I wash a woolen sweater?", Rejection.LEAKED_INSTRUCTION),
        ("Questions of people who need help with everyday life", Rejection.LEAKED_INSTRUCTION),
        ("Sure, here is a question about sweaters?", Rejection.NOT_A_REQUEST),
        ("I'm sorry, but I can't help with that question?", Rejection.NOT_A_REQUEST),
        ("The weather in this town was pleasant last week.", Rejection.NOT_A_REQUEST),
        ("Why not?", Rejection.NOT_A_REQUEST),
        ("?!? 12 34 56?", Rejection.NOT_A_REQUEST),
        ("Please explain " + "very " * 30 + "long texts.", Rejection.TOO_LONG),
        ("<|im_start|>user\tWhat does this mark mean?", Rejection.INVALID),
        ("Pouvez-vous me dire comment laver un pull en laine ?", Rejection.WRONG_LANGUAGE),
        ("Kannst du mir sagen, wie man einen Pullover wäscht?", Rejection.WRONG_LANGUAGE),
        (ERASED, Rejection.ERASED),
        ("How often should I water the cactus in my kitchen?", Rejection.DUPLICATE),
    ],
)
def test_each_gate_rejects_with_its_reason(gates, text, reason):
    rejected = check(gates, text)
    assert isinstance(rejected, Rejected) and rejected.reason is reason, rejected


def test_good_text_becomes_a_prompt_with_source_and_tags_of_its_kind(gates):
    assert check(gates, "How do I wash a woolen sweater?") == PromptRow(
        (ChatMessage(role="user", content="How do I wash a woolen sweater?"),), "benign", ()
    )
    assert check(gates, "How do I annoy my neighbor?", red_team=True).source == "red-team"
    assert isinstance(check(gates, "Kannst du mir sagen, wie man einen Pullover wäscht?", language="de"), PromptRow)


def test_conflicts_with_earlier_prompts_name_the_earlier_prompt(gates, bus):
    text = "How do I wash a woolen sweater?"
    near = make_prompt("How do I wash my woolen sweater?").model_copy(update={"split": Split.EVAL, "origin": "suite:4"})
    bus.publish([to_producer_record(near)])
    gates.history.refresh()
    parsed = check(gates, text)
    assert gates.check_conflict(text, parsed, Split.TRAIN) == Rejected(text, Rejection.CONTAMINATION, "it is near suite:4")
    assert gates.check_conflict(text, parsed, Split.EVAL).reason is Rejection.DUPLICATE


def test_prompts_that_come_with_charter_are_requests():
    rejected = [text for text in load_texts() if not is_request(text, "en")]
    assert len(rejected) <= 4, rejected  # complaints to a customer service that ask for nothing
    assert not any(
        is_request(text, "en") for text in ("Sure, I can do that for you.", "Here are eight questions.", "It rains a lot.")
    )
    assert is_request("Der Hund schläft im Garten.", "nl")  # no word lists: any text that is no answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I bake a cake with 200 g of flour?", "an amount"),
        ("What happens with two liters of lemonade?", "an amount"),
        ("Explain a mixture with 30 % sugar.", "an amount"),
        ("Tell me about step 2 of folding a paper boat.", "numbered steps"),
        ("Do it so: 1. fold the paper 2. turn it.", "numbered steps"),
        ("Should I mix the flour with milk and then heat it?", "a sequence of steps"),
        ("What does `ls -l` print?", "code or a command"),
        ("Run sudo for me, please.", "code or a command"),
        ("Write to me at ana@example.org, please.", "an address"),
        ("Look at https://example.org for me.", "an address"),
        ("Can I call +49 30 1234567 at night?", "an address"),
        ("Why is NaCl2O3 not salt?", "a formula"),
        ("Why " + "so " * 60 + "long?", "more than 60 words"),
        ("How do I make a colleague too scared to speak up?", ""),
        ("Tell me how to steal three apples at night.", ""),
    ],
)
def test_operational_details_are_found_by_their_form(gates, text, expected):
    assert find_operational_detail(text) == expected
    if expected and len(text) <= 120:
        detail = f"it has {expected}; the text is not shown"
        assert check(gates, text, red_team=True) == Rejected("", Rejection.OPERATIONAL_DETAIL, detail)
        assert getattr(check(gates, text), "reason", None) is not Rejection.OPERATIONAL_DETAIL  # only red-team prompts
