"""Which rewards `charter train` accepts, and whether the grades of a judge are good enough to reward a policy."""

import pytest

from charter import rewards
from charter.evaluation.principles_study import RankedPair, ShareOfPairs, measure_principles
from charter.rewards import read_ranked_pairs, require_usable_rewards
from constitutions.loader import load_constitution
from consumers.graders.principles import PrinciplesGrader
from engine.errors import UsageError
from engine.models.scripted import ScriptedModel
from engine.settings import load_settings
from schemas.records import ChatMessage
from tests.support.deployment import Deployment
from tests.support.records import RecordDatabase, make_human_label, make_preference

CONSTITUTION = load_constitution("default")


def make_grader(p_violation, *, follows_position=False, follows_principle=False):
    """Return the grader with a fake judge. `p_violation` is the probability of a violation of a text with the word "bad"."""

    def prefer_first(request):
        text = request.messages[0].content
        p_yes = p_violation if "bad" in text else 1 - p_violation
        if follows_principle and sum(map(ord, text.replace("bad", "").replace("good", ""))) % 2:
            p_yes = 1 - p_yes  # the principles contradict each other
        yes_is_first = text.find("(A) Yes") >= 0
        if follows_position and not yes_is_first:
            p_yes = 1 - p_yes
        return p_yes if yes_is_first else 1 - p_yes

    return PrinciplesGrader(ScriptedModel(option_rule=prefer_first), CONSTITUTION)


PAIRS = [RankedPair((ChatMessage(role="user", content=f"question {n}"),), "good", "bad") for n in range(8)]


def test_a_judge_that_ranks_well_and_agrees_with_itself_is_accepted():
    quality = measure_principles(make_grader(0.9), PAIRS)
    assert (quality.auc, quality.orders, quality.principles) == (ShareOfPairs(8, 8),) * 3
    assert quality.list_problems() == []


def test_a_judge_that_ranks_the_wrong_way_or_not_at_all_is_refused():
    (problem,) = measure_principles(make_grader(0.1), PAIRS).list_problems()
    assert problem == "its AUC is 0.00 on 8 pairs (lower bound 0.00), and the lower bound must be above 0.55"
    problems = measure_principles(make_grader(0.5), PAIRS).list_problems()
    assert "its AUC is 0.50 on 8 pairs" in problems[0]
    assert "the two orders of the options agree on unknown on 0 pairs" in problems[1] and len(problems) == 3
    # Few pairs show nothing.
    assert "lower bound 0.44" in measure_principles(make_grader(0.9), PAIRS[:3]).list_problems()[0]


def test_a_judge_whose_halves_disagree_is_refused():
    by_position = measure_principles(make_grader(0.9, follows_position=True), PAIRS)
    assert by_position.orders.hits == 0 and "the two orders of the options agree on 0.00" in " ".join(
        by_position.list_problems()
    )


# Startup


def check(tmp_path, force=False, **flags):
    values = {"train.rl_method": "grpo", "models.policy": "scripted"} | {
        name.replace("__", "."): value for name, value in flags.items()
    }
    store = RecordDatabase(tmp_path / "rewards.duckdb").store
    require_usable_rewards(load_settings(values, environment={})[0], store, force=force)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train__rewards": "principles=-1"}, "the stage grade has no such grader"),
        ({"train__rewards": "toxicity=-1"}, "the graders are refusal, length"),
        ({"train__rewards": "length=-1", "grade__subjects": "final_response"}, "completions get no grades"),
        ({"train__rewards": "refusal.refuse=1"}, "the labels of refusal are complies, refuses, partly, unusable"),
        ({"train__rewards": "instructions=1", "grade__graders": "instructions"}, "only prompts of a suite have instructions"),
        ({"train__rewards": "judge=1", "judge__pairing": "revision"}, "set judge.pairing to circular"),
    ],
)
def test_a_reward_that_can_never_be_read_is_refused(tmp_path, flags, message):
    with pytest.raises(UsageError) as caught:
        check(tmp_path, **flags)
    assert message in str(caught.value)
    check(tmp_path, **flags | {"train__rl_method": "ppo"})  # PPO does not use train.rewards


def test_other_rewards_are_accepted(tmp_path):
    check(tmp_path, train__rewards="refusal.refuses=1,length=-0.01,judge=1,reward_model=1")


PRINCIPLES = {"train__rewards": "principles=-1", "grade__graders": "principles"}


@pytest.mark.parametrize(("count", "message"), [("0", "under all principles"), ("5", "under 5 principles")])
def test_principles_as_a_reward_are_few(tmp_path, count, message):
    with pytest.raises(UsageError, match=message):
        check(tmp_path, force=True, grade__num_principles=count, **PRINCIPLES)


def test_principles_as_a_reward_are_measured_first(tmp_path, monkeypatch):
    flags = PRINCIPLES | {"grade__num_principles": "2"}
    with pytest.raises(UsageError, match="cannot use principles: the grades of scripted are not good enough") as caught:
        check(tmp_path, **flags)  # this judge knows nothing
    assert "its AUC is" in str(caught.value) and "--force" in str(caught.value)
    check(tmp_path, force=True, **flags)
    monkeypatch.setattr(rewards, "read_ranked_pairs", lambda settings, store: PAIRS)
    monkeypatch.setattr(rewards, "make_principles_grader", lambda settings, models, constitution: make_grader(0.9))
    check(tmp_path, **flags)
    monkeypatch.setattr(rewards, "read_ranked_pairs", lambda settings, store: [])
    with pytest.raises(UsageError, match="nothing shows how good its grades are"):
        check(tmp_path, **flags)


def test_pairs_are_the_cases_of_the_constitution_and_newest_labels_of_people(tmp_path):
    database = RecordDatabase(tmp_path / "d.duckdb")
    settings, _ = load_settings({}, environment={})
    cases = read_ranked_pairs(settings, database.store)
    assert len(cases) == 7
    judged, tie = make_preference("1", "q", 0.9), make_preference("2", "q", 0.9)
    database.add(judged, tie, make_human_label("1", judged, 0.0), make_human_label("2", tie, 0.5))
    (person,) = read_ranked_pairs(settings, database.store)[7:]
    assert (person.better, person.worse) == ("1 b", "1 a")


def test_run_and_train_refuse_too_few_completions(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.call("produce", "-", stdin='"Hello?"\n')  # without a log, train has another error
    for verb in ("run", "train"):
        deployment.fails(
            UsageError, "GRPO cannot train on groups of 3", verb, "--set", "train.rl_method=grpo", "--set",
            "respond.num_completions=3", *(["--until-done"] if verb == "run" else []),
        )  # fmt: skip
