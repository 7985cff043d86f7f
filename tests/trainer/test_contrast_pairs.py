"""Contrast pairs train only the phases in train.contrast_pairs, within the bounds of staleness."""

import pytest

from charter.rewards import require_usable_rewards
from engine.errors import UsageError
from engine.settings import load_settings
from schemas.records import LabelSource
from tests.support.records import make_preference, make_response
from tests.support.workspace import Workspace
from trainer.batches import rebuild_batch
from trainer.methods import list_ignored_settings, list_unlabeled_phases
from trainer.phases import _make_preference_example


@pytest.fixture
def make_workspace(tmp_path):
    opened = []

    def open_workspace(method="dpo", **train):
        opened.append(Workspace(tmp_path / f"data{len(opened)}", rl_method=method, **train))
        return opened[-1]

    yield open_workspace
    for workspace in opened:
        workspace.close()


def make_contrast_pair(name, text=None, **more):
    return make_preference(
        name, text or f"pair {name}", 1.0, pairing="contrast", label_source=LabelSource.CONTRAST, policy_version=0, **more
    )


def select(workspace, phase):
    rows = workspace.trainer.updater.select_rows(phase, workspace.trainer.read_state())
    return {row.row_id for row in rows}


@pytest.mark.parametrize("asked", [[], ["dpo"], ["reward"], ["reward", "dpo"]])
def test_only_the_named_phases_train_on_contrast_pairs(make_workspace, asked):
    workspace = make_workspace(contrast_pairs=asked)
    label, pair = make_preference("judged", "judged", 0.7), make_contrast_pair("contrast")
    held_out = make_contrast_pair("eval", split="EVAL")
    workspace.add(label, pair, held_out)
    for phase in ("dpo", "reward"):
        assert select(workspace, phase) == {label.record_id, *([pair.record_id] if phase in asked else [])}
    sets = {
        view: workspace.store.query(f"SELECT record_id::VARCHAR FROM {view}").rows
        for view in ("preference_pairs", "contrast_pairs")
    }
    assert sets == {"preference_pairs": [(label.record_id,)], "contrast_pairs": [(pair.record_id,)]}
    assert workspace.store.query("SELECT labels FROM label_quality").rows == [(1,)]
    assert workspace.store.query("SELECT count(*) FROM held_out_pairs").rows == [(0,)]


def test_dpo_batch_of_contrast_pairs_is_resumed_with_the_same_rows(make_workspace):
    """The manifest names its rows, so they are the same with another setting after a restart."""
    workspace = make_workspace(contrast_pairs=["dpo"])
    workspace.add(*(make_contrast_pair(str(n)) for n in range(4)))
    updater, state = workspace.trainer.updater, workspace.trainer.read_state()
    batch = updater.sample_batch("dpo", updater.select_rows("dpo", state), state)
    workspace.add()
    workspace.settings = workspace.settings.model_copy(
        update={"train": workspace.settings.train.model_copy(update={"contrast_pairs": []})}
    )
    workspace.reopen()
    assert rebuild_batch(workspace.store, batch.manifest).rows == batch.rows and len(batch.rows) == 4
    examples = [_make_preference_example(row) for row in batch.rows]
    assert {(e.p_a, e.exchangeable) for e in examples} == {(1.0, False)}  # A is always better, which is no bias of a judge
    update = workspace.trainer.resume()
    assert (update.phase, update.batch_id) == ("dpo", batch.manifest.record_id)
    assert select(workspace, "dpo") == set()


def test_bounds_of_staleness_hold_for_contrast_pairs(make_workspace):
    workspace = make_workspace(contrast_pairs=["dpo"], max_staleness=0)
    pair = make_contrast_pair("old")
    workspace.add(pair)
    assert select(workspace, "dpo") == {pair.record_id}
    workspace.add_chains("a")
    workspace.trainer.update("sft")
    workspace.add()
    assert select(workspace, "dpo") == set()
    workspace.add()
    assert workspace.store.query("SELECT dropped_id::VARCHAR, reason FROM dropped_rollouts").rows == [
        (pair.record_id, "older than 0 policy versions")
    ]


@pytest.mark.parametrize("asked", [[], ["reward"]])
def test_rollouts_overlap_with_a_contrast_pair_only_if_it_trained_the_reward_model(make_workspace, asked):
    """The cursor of the reward model also passes the contrast pairs that it did not train on."""
    workspace = make_workspace("ppo", contrast_pairs=asked, allow_overlap=False)
    workspace.add(make_contrast_pair("first", "answer a 0"))
    workspace.add_labels("judged", 4)
    workspace.trainer.update("reward")
    workspace.add()
    workspace.add_responses("a", 2)
    overlap = make_response("answer a 0")
    rest = make_response("answer a 1")
    usable = {rest.record_id, *([] if asked else [overlap.record_id])}
    assert select(workspace, "ppo") == usable


def load(**flags):
    return load_settings({name.replace("__", "."): value for name, value in flags.items()}, environment={})[0]


def test_settings_that_leave_a_phase_without_labels_are_told(make_workspace):
    contrast = {"judge__pairing": "contrast"}
    (sentence,) = list_unlabeled_phases(load(train__rl_method="dpo", **contrast))
    assert "dpo gets no labels except those by people" in sentence and "add dpo to train.contrast_pairs" in sentence
    assert list_unlabeled_phases(load(train__rl_method="dpo", train__contrast_pairs="dpo", **contrast)) == []
    assert len(list_unlabeled_phases(load(**contrast))) == 1 and list_unlabeled_phases(load()) == []
    assert list_unlabeled_phases(load(train__rl_method="distill", **contrast)) == []
    assert list_ignored_settings(load(train__contrast_pairs="reward,dpo")) == [
        "train.contrast_pairs = dpo has no effect with train.rl_method = ppo"
    ]
    assert make_workspace("ppo", contrast_pairs=["dpo"]).messages == [
        "train.contrast_pairs = dpo has no effect with train.rl_method = ppo"
    ]


@pytest.mark.parametrize("pairing", ["contrast", "revision"])
def test_judge_is_no_reward_without_pairs_of_completions(make_workspace, pairing):
    settings = load(train__rl_method="grpo", train__rewards="judge=1", judge__pairing=pairing)
    with pytest.raises(UsageError, match=f"cannot use judge with judge.pairing = {pairing}"):
        require_usable_rewards(settings, make_workspace().store, force=False)
