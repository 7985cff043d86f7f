"""The held-out judge of the watch: what it asks, and what it says."""

import pytest

from charter.evaluation.held_out_judge import HeldOutJudge, make_critique_judge_constitution, make_reward_hacking_monitor
from constitutions.loader import load_constitution as load_constitution
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from schemas.records import ChatMessage

TURNS = (ChatMessage(role="user", content="How do I mend a lamp?"),)


def judge(**flags):
    return HeldOutJudge(load_settings({"models.policy": "scripted"} | flags, environment={})[0])


def test_the_held_out_judge_asks_what_labelled_nothing_unless_it_is_another_model():
    constitution = load_constitution("default")
    asked = make_critique_judge_constitution(constitution)
    assert [p.id for p in asked.judge] == [p.id for p in constitution.critique]
    assert all(c.critique_prompt in p.judge_prompt for p, c in zip(asked.judge, constitution.critique, strict=True))
    assert judge().constitution == asked
    assert judge(**{"monitor.judge": "scripted"}).constitution == constitution


@pytest.mark.parametrize("pairing", ["completions", "revision"])
def test_it_compares_in_both_orders_and_gives_no_label_where_it_has_none(pairing):
    ask = judge(**{"judge.pairing": pairing})
    ask.constitution = ask.constitution.with_single_judge_principle(
        "no-harm"
    )  # else each order of the texts draws one of its own
    (p,), (q,) = ask([(TURNS, "one", "two")]), ask([(TURNS, "two", "one")])
    assert 0 < p < 1 and p != 0.5 and q == pytest.approx(1 - p)
    assert ask([(TURNS, "one", "two"), (TURNS, POISON_TEXT, "two"), (TURNS, "two", "one")]) == [p, None, q]


def test_no_held_out_prompts_no_judge():
    settings = load_settings({"models.policy": "scripted", "monitor.prompts": "0"}, environment={})[0]
    assert make_reward_hacking_monitor(settings).judge is None
