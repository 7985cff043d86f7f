"""How many completions a training loop asks for: by hand, for each phase that can be due, and in a loop with FAKE learners."""

import threading

import pytest

from engine.pacing import TRAINER_GROUP, is_training_loop_running
from engine.settings import load_settings
from schemas.records import Allowance, LabelSource, Purpose
from tests.support.records import make_preference, make_prompt, make_response
from tests.support.waiting import wait_until
from tests.support.workspace import Workspace
from trainer.methods import RL_METHODS, get_rl_fraction
from trainer.pacing import Demand, Pacer, RolloutStock, compute_demand


@pytest.fixture
def make_workspace(tmp_path):
    opened = []

    def make(**settings):
        opened.append(Workspace(tmp_path / f"data{len(opened)}", **settings))
        return opened[-1]

    yield make
    for workspace in opened:
        workspace.close()


@pytest.fixture
def workspace(make_workspace):
    return make_workspace()


@pytest.mark.parametrize(
    ("stock", "options", "wanted"),
    [
        (RolloutStock(0, 64), {}, 64),
        (RolloutStock(40, 64), {}, 24),
        (RolloutStock(64, 64), {}, 0),
        (RolloutStock(90, 64), {}, 0),
        (RolloutStock(64, 64), {"rollouts_ahead": 2.5}, 96),
        (RolloutStock(0, 64), {"rollouts_ahead": 0.1}, 64),  # RL could never start with fewer
        (RolloutStock(10, 64, num_waiting=50), {}, 4),  # the graders will bring these, and new prompts would not
        # SFT is due: RL gets what one update needs, and then none until SFT has trained.
        (RolloutStock(40, 64), {"sft_is_due": True, "rollouts_ahead": 3}, 24),
        (RolloutStock(3, 64), {"sft_is_due": True, "is_drained": True}, 0),
        (RolloutStock(3, 64), {"is_drained": True}, 61),
        # RL needs no rollouts now, or cannot use them: there is no limit, so that labels and chains still arrive.
        (RolloutStock(64, 64, unneeded_because="ppo waits for the first reward model"), {}, None),
        (RolloutStock(0, 64, unneeded_because="ppo is paused"), {"sft_is_due": True, "is_drained": True}, None),
        (RolloutStock(0, 64), {"futile_because": "RL can use none of them"}, None),
    ],
)
def test_demand(stock, options, wanted):
    demand = compute_demand(stock, **({"rollouts_ahead": 1.0} | options))
    assert demand.num_rollouts == wanted and demand.reason


@pytest.mark.parametrize("usable", range(0, 12))
@pytest.mark.parametrize("waiting", (0, 5))
@pytest.mark.parametrize("sft_is_due", (False, True))
def test_responders_hold_only_if_an_update_can_start(usable, waiting, sft_is_due):
    stock = RolloutStock(usable, 8, waiting)
    demand = compute_demand(stock, rollouts_ahead=1.0, sft_is_due=sft_is_due)
    if demand.num_rollouts == 0:
        assert usable + waiting >= 8  # RL can start, now or when the rewards are complete
    else:
        assert usable + waiting + demand.num_rollouts == 8


@pytest.mark.parametrize(
    ("flags", "fraction"),
    [
        ({}, 0.8),
        ({"prompts.rl_fraction": "0"}, 0),
        ({"train.rl_method": "dpo"}, 0),  # DPO needs the labels of all prompts
        ({"train.rl_method": "grpo"}, 0.8),
        ({"train.rl_method": "rloo", "train.rewards": "refusal.refuses=-1"}, 0),
        ({"train.rl_method": "grpo", "train.rewards": "reward_model=1,judge=1"}, 0),  # win rates need labels of all groups
    ],
)
def test_prompts_are_divided_only_where_a_reward_model_alone_needs_labels(flags, fraction):
    assert get_rl_fraction(load_settings(flags, environment={})[0]) == fraction


def start_pacing(workspace):
    """Make the trainer of a workspace plan as in a loop."""
    trainer = workspace.trainer
    trainer.pacer = trainer.updater.pacer = Pacer(workspace.settings, workspace.bus)
    return trainer


def read_last_allowance(workspace):
    allowances = workspace.read_records(Allowance)
    return (allowances[-1].num_completions, allowances[-1].reason) if allowances else None


def test_there_is_no_limit_until_the_first_reward_model(workspace):
    trainer = start_pacing(workspace)
    workspace.add_responses("a", 4)
    assert not trainer.run_tick()
    assert read_last_allowance(workspace) == (None, "ppo waits for the first reward model")
    workspace.add_labels("a")
    assert trainer.run_tick()  # the reward model
    trainer.run_tick()  # PPO, because four rollouts are there
    assert workspace.list_policies() == [(1, "ppo", None)]
    num_completions = workspace.settings.respond.num_completions
    assert read_last_allowance(workspace)[0] == workspace.settings.train.ppo_rows * num_completions
    assert not trainer.run_tick() and not trainer.run_tick()
    count = len(workspace.read_records(Allowance))
    assert not trainer.run_tick() and len(workspace.read_records(Allowance)) == count  # nothing has changed


def test_sft_waits_until_rl_has_trained_on_its_rollouts_and_holds_the_responders(workspace):
    trainer = start_pacing(workspace)
    workspace.add_labels("a")
    assert trainer.run_tick()  # the reward model
    workspace.add(*(make_prompt(f"open {n}") for n in range(4)))
    workspace.add_responses("a", 2)
    workspace.add_chains("a")
    assert not trainer.run_tick() and workspace.list_policies() == []  # SFT is due, and PPO has two of four rollouts
    num_completions = workspace.settings.respond.num_completions
    assert read_last_allowance(workspace)[0] == 2 * num_completions
    workspace.add_responses("b", 2)
    assert trainer.run_tick() and workspace.list_policies() == [(1, "ppo", None)]
    assert read_last_allowance(workspace)[0] == 0  # published with the manifest of PPO
    workspace.add_responses("late", 1)
    assert trainer.run_tick() and workspace.list_policies()[-1] == (2, "sft", None)
    assert read_last_allowance(workspace) == (0, "an SFT update is in progress, and makes earlier completions unusable for RL")
    workspace.add_chains("b")
    assert not trainer.run_tick()  # SFT is due again, and RL has not trained on completions of the new policy
    assert read_last_allowance(workspace)[0] == 4 * num_completions  # the new policy samples again


def test_sft_does_not_wait_if_no_rollouts_can_arrive(workspace):
    trainer = start_pacing(workspace)
    workspace.add_labels("a")
    assert trainer.run_tick()  # the reward model
    workspace.add_responses("a", 2)
    workspace.add_chains("a")
    assert trainer.run_tick() and workspace.list_policies() == [(1, "sft", None)]  # no prompt waits for a response


def test_failed_sft_update_releases_the_responders(make_workspace):
    from engine.errors import CharterError
    from tests.chaos.crash_points import FAKE_LEARNERS

    workspace = make_workspace()

    def fail(context, batch):
        raise CharterError("the test fails", "because it wants to", "nothing")

    workspace.reopen(learners=dict(FAKE_LEARNERS) | {"sft": fail})
    trainer = start_pacing(workspace)
    workspace.add_labels("a")
    assert trainer.run_tick()
    workspace.add_chains("a")
    with pytest.raises(CharterError, match="the test fails"):
        trainer.run_tick()
    assert read_last_allowance(workspace)[0] == 0
    assert not trainer.run_tick()
    assert read_last_allowance(workspace)[0] == 4 * workspace.settings.respond.num_completions


def test_resumed_sft_update_holds_the_responders_again(workspace):
    from engine.errors import BusUnreachable

    def fail(context, batch):
        raise BusUnreachable("the log is unreachable", "the test", "nothing")

    workspace.add_labels("a")
    assert start_pacing(workspace).run_tick()
    workspace.add_chains("a")
    workspace.trainer.updater.learners = dict(workspace.trainer.updater.learners) | {"sft": fail}
    with pytest.raises(BusUnreachable):
        workspace.trainer.run_tick()
    workspace.reopen()
    trainer, count = start_pacing(workspace), len(workspace.read_records(Allowance))
    assert trainer.run_tick() and workspace.list_policies() == [(1, "sft", None)]
    allowances = workspace.read_records(Allowance)[count:]
    assert [allowance.num_completions for allowance in allowances] == [0]


def test_completions_that_rl_cannot_use_end_the_limit(workspace):
    trainer = start_pacing(workspace)
    workspace.add_labels("a")
    assert trainer.run_tick() and not trainer.run_tick()
    wanted, _ = read_last_allowance(workspace)
    assert wanted
    unusable = [make_response(f"unusable {n}") for n in range(wanted)]
    workspace.add(
        *(
            r.model_copy(update={"policy_version": 0, "sampling": r.sampling.model_copy(update={"top_p": 0.5})})
            for r in unusable
        )
    )
    assert not trainer.run_tick() and read_last_allowance(workspace) == (None, "RL can use none of the last completions")
    assert not trainer.run_tick() and read_last_allowance(workspace)[0] is None  # until RL can use one


def test_loop_shows_that_it_runs_and_says_that_it_sets_no_limit(make_workspace):
    workspace, stop = make_workspace(rollouts_ahead=0.0), threading.Event()
    workspace.add_responses("a", 1)
    thread = threading.Thread(target=workspace.trainer.run_loop, args=(stop,))
    thread.start()
    wait_until(lambda: is_training_loop_running(workspace.bus) and read_last_allowance(workspace))
    assert read_last_allowance(workspace) == (None, "train.rollouts_ahead is 0")
    stop.set()
    thread.join()
    assert not is_training_loop_running(workspace.bus) and TRAINER_GROUP not in workspace.bus.list_members([""])


def test_purposes_decide_what_trains_from_the_first_training_loop_on(workspace):
    def add_labels(name, purpose, **more):
        workspace.add(*(make_preference(f"{name}{n}", f"{name} {n}", 0.7, purpose=purpose, **more) for n in range(2)))

    def select(phase):
        return len(trainer.updater.select_rows(phase, trainer.read_state()))

    trainer = workspace.trainer
    add_labels("reward", Purpose.REWARD)
    add_labels("rl", Purpose.RL)  # judged before the loop began
    add_labels("person", Purpose.RL, label_source=LabelSource.HUMAN)
    workspace.add_responses("any", 2)
    for response in list(workspace.read_records(type(make_response("x")))):
        copies = {Purpose.REWARD: "reward 0", Purpose.RL: "rl 0"}
        workspace.add(
            *(
                make_response(text, purpose=purpose).model_copy(
                    update={"model": response.model, "policy_version": 0, "purpose": purpose}
                )
                for purpose, text in copies.items()
            )
        )
    assert (select("reward"), select("ppo")) == (6, 4)
    start_pacing(workspace)
    trainer.run_tick()
    assert trainer.read_state().has_training_loop
    assert select("ppo") == 3  # the rollout of the prompt for the reward model is not for RL


def test_limit_ends_if_rewards_do_not_arrive_and_returns_when_they_do(monkeypatch):
    pacer = Pacer(load_settings({"train.rl_method": "grpo"}, environment={})[0], bus=None)
    pacer.check_progress(RolloutStock(3, 8, 5), 0, is_used_up=True)
    assert pacer.compute_demand(RolloutStock(3, 8, 5)).num_rollouts == 0
    monkeypatch.setattr("trainer.pacing._MAX_SILENCE_S", -1.0)
    pacer.check_progress(RolloutStock(3, 8, 5), 0, is_used_up=True)
    monkeypatch.undo()
    pacer.check_progress(RolloutStock(3, 8, 9), 0, is_used_up=True)  # more groups wait, and none is complete
    assert pacer.compute_demand(RolloutStock(3, 8, 9)).num_rollouts is None
    pacer.check_progress(RolloutStock(4, 8, 8), 0, is_used_up=True)
    assert pacer.compute_demand(RolloutStock(4, 8, 8)).num_rollouts == 0


def test_every_method_that_uses_rollouts_can_be_paced():
    for method in RL_METHODS.values():
        if method.uses_rollouts:
            settings = load_settings({"train.rl_method": method.phase}, environment={})[0]
            pacer = Pacer(settings, bus=None)
            assert pacer.compute_demand(RolloutStock(0, 8)) == Demand(8, "RL has 0 unused rollouts; an update needs 8")
