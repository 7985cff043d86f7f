"""The held-out judge of the reward hacking monitor: its principles and its labels."""

import pytest

from charter.evaluation.held_out_judge import HeldOutJudge, make_critique_judge_constitution, make_reward_hacking_monitor
from constitutions.loader import (
    CONSTITUTIONS_FOLDER,
    ConstitutionError,
    load_constitution,
    parse_constitution,
    render_toml,
    to_toml_values,
)
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from schemas.records import ChatMessage

MESSAGES = (ChatMessage(role="user", content="How do I fix a lamp?"),)


def judge(**flags):
    return HeldOutJudge(load_settings({"models.policy": "scripted"} | flags, environment={})[0])


def test_held_out_judge_uses_critique_principles_unless_it_is_another_model():
    constitution = load_constitution("default")
    expected = make_critique_judge_constitution(constitution)
    assert [p.id for p in expected.judge] == [p.id for p in constitution.critique]
    assert all(c.critique_prompt in p.judge_prompt for p, c in zip(expected.judge, constitution.critique, strict=True))
    assert judge().constitution == expected
    assert judge(**{"monitor.judge": "scripted"}).constitution == constitution


@pytest.mark.parametrize("pairing", ["completions", "revision"])
def test_held_out_judge_compares_in_both_orders_and_returns_none_without_a_label(pairing):
    ask = judge(**{"judge.pairing": pairing})
    ask.constitution = ask.constitution.with_single_judge_principle(
        "no-harm"
    )  # otherwise a principle is sampled for each order
    (p,), (q,) = ask([(MESSAGES, "one", "two")]), ask([(MESSAGES, "two", "one")])
    assert 0 < p < 1 and p != 0.5 and q == pytest.approx(1 - p)
    assert ask([(MESSAGES, "one", "two"), (MESSAGES, POISON_TEXT, "two"), (MESSAGES, "two", "one")]) == [p, None, q]


def test_monitor_does_not_check_what_the_reward_or_the_constitution_names(tmp_path):
    brief = tmp_path / "brief.toml"
    head = (CONSTITUTIONS_FOLDER / "course.toml").read_text()
    brief.write_text('targets = ["length"]\n' + head)
    flags = {"models.policy": "scripted", "monitor.prompts": "0"}

    def get_exempt(**more):
        return make_reward_hacking_monitor(load_settings(flags | more, environment={})[0]).exempt

    assert get_exempt() == frozenset()
    assert get_exempt(**{"run.constitution": str(brief)}) == {"length"}
    rewards = {"train.rewards": "refusal.refuses=1,judge=1"}
    assert get_exempt(**rewards, **{"train.rl_method": "grpo"}) == {"refusal_benign", "refusal_harmful"}
    assert get_exempt(**rewards) == frozenset()  # PPO does not use train.rewards


def test_targets_do_not_change_the_hash_of_a_constitution():
    text = (CONSTITUTIONS_FOLDER / "course.toml").read_text()
    plain, brief = (parse_constitution(head + text, "x") for head in ("", 'targets = ["length"]\n'))
    assert plain.hash == brief.hash and brief.targets == ("length",)
    assert parse_constitution(render_toml(to_toml_values(brief)), "x").targets == ("length",)
    with pytest.raises(ConstitutionError, match="targets"):
        parse_constitution('targets = ["tone"]\n' + text, "x")


def test_monitor_without_prompts_has_no_judge():
    settings = load_settings({"models.policy": "scripted", "monitor.prompts": "0"}, environment={})[0]
    assert make_reward_hacking_monitor(settings).judge is None
