"""A trainer killed (SIGKILL) at any step of an update resumes with the identical batch; nothing is trained twice."""

import json
import multiprocessing
import shutil
import signal
from itertools import product

import pytest

from charter.connect import connect_bus, open_store
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.worker import to_producer_record
from schemas.codec import decode_record
from schemas.records import BatchManifest, Grade, ModelRef, PolicyUpdate
from tests.chaos.crash_points import CRASH_POINTS, FAKE_LEARNERS, NOTES_FILE, make_settings, run_update
from tests.support.groups import make_group, make_group_grades
from tests.support.records import make_chain_end, make_preference, make_response
from tests.support.waiting import HANG_S
from trainer.batches import rebuild_batch
from trainer.loop import Trainer

ROWS = 6


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.crash_points"])
    return context


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder after an update of each phase, with new rows for each."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    (folder / "base").mkdir(parents=True)
    settings = make_settings(folder)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    add_labels(bus, store, "old")
    trainer.update("sft")
    trainer.update("reward")
    for name in ("oldest", "old"):
        add_responses(bus, store, name, trainer.read_state())
        trainer.update("ppo")
    add_responses(bus, store, "new", trainer.read_state())
    add_labels(bus, store, "new")
    trainer.close()
    bus.close()
    (folder / NOTES_FILE).unlink()
    return folder


def add_labels(bus, store, name):
    chains = [make_chain_end(f"{name} {n}", f"{name} chain {n}") for n in range(ROWS)]
    add_records(bus, store, *chains, *(make_preference(f"{name} {n}", f"{name} pair {n}", 0.7) for n in range(ROWS)))


def add_responses(bus, store, name, state):
    """Add responses of the current policy."""
    version = state.policy_version
    model = ModelRef(id="policy", revision=state.model_revisions[version])
    sampled = [make_response(f"{name} answer {n}") for n in range(ROWS)]
    add_records(
        bus,
        store,
        *(
            response.model_copy(
                update={
                    "model": model,
                    "policy_version": version,
                    "completions": [response.completions[0].model_copy(update={"policy_version": version})],
                }
            )
            for response in sampled
        ),
    )


def add_records(bus, store, *records):
    bus.publish([to_producer_record(record) for record in records])
    sink_all(bus, store)


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


BEFORE_MANIFEST, AFTER_UPDATE = ("before BatchManifest", "committing BatchManifest"), ("after PolicyUpdate", "removing")
# Training has started, but there is no complete checkpoint.
BEFORE_CHECKPOINT = ("before Metric", "after Metric", "saved", "flushing")
REWARD_CRASH_POINTS = [point for point in CRASH_POINTS if point != "gate"]  # only policies pass the promotion gate
CASES = [
    *product(("sft", "ppo"), CRASH_POINTS, [1]),
    *product(["reward"], REWARD_CRASH_POINTS, [1]),
    *product(["sft"], ("saved", "gate"), [2]),
    *product(["distill"], ("after BatchManifest", "saved", "renamed"), [1]),
]
NUM_NEW_ROWS = {"distill": 3 * ROWS}  # no batch of this phase has used any of the three groups of responses


@pytest.mark.parametrize(("phase", "point", "num_kills"), CASES)
def test_trainer_killed_at_any_step_resumes_with_the_identical_batch(prepared, processes, tmp_path, phase, point, num_kills):
    """Kill it once, or again at the same point of the resumed update."""
    folder = shutil.copytree(prepared, tmp_path / "data")
    settings = make_settings(folder)
    for _ in range(num_kills):
        process = processes.Process(target=run_update, args=(str(folder), phase, point))
        process.start()
        process.join(HANG_S)
        assert process.exitcode == -signal.SIGKILL, f"the point was not reached: {process.exitcode}"
    bus, store = connect_bus(settings), open_store(settings)
    num_updates = len(read_updates(bus))
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    resumed = trainer.resume()
    # Before the manifest there is nothing to resume; after the update nothing is left to do.
    assert (resumed is None) == (point in BEFORE_MANIFEST + AFTER_UPDATE)
    if point in BEFORE_MANIFEST:
        resumed = trainer.update(phase)
    assert len(read_updates(bus)) == num_updates + (resumed is not None)
    manifest = read_manifests(bus, phase)[-1]
    (update,) = [update for update in read_updates(bus) if update.batch_id == manifest.record_id]
    notes = [json.loads(line) for line in (folder / NOTES_FILE).read_text().splitlines()]
    rows = json.loads(json.dumps(rebuild_batch(store, manifest).rows, default=str))
    assert [note["rows"] for note in notes] == [rows] * len(notes) and len(rows) == NUM_NEW_ROWS.get(phase, ROWS)
    assert {(note["batch"], note["hash"]) for note in notes} == {(manifest.record_id, manifest.content_hash)}
    # A complete checkpoint is not trained again.
    assert len(notes) == (num_kills + 1 if point in BEFORE_CHECKPOINT else 1)
    assert not list((folder / "checkpoints").glob(".*"))
    assert trainer.updater.get_folders(trainer.read_state()).get_version_folder(update.kind, update.version).exists()
    sink_all(bus, store)
    assert trainer.updater.select_rows(phase, trainer.read_state()) == [] and trainer.resume() is None
    trainer.close()
    bus.close()


@pytest.fixture(scope="module")
def prepared_groups(tmp_path_factory):
    """A data folder with an update of GRPO and new groups. One of them has a completion whose grade cannot be read."""
    folder = tmp_path_factory.mktemp("prepared groups") / "data"
    (folder / "base").mkdir(parents=True)
    settings = make_settings(folder, **GROUP_SETTINGS)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    for name in ("old", "new"):
        for n in range(ROWS):
            group = make_group(f"{name} {n}", trainer.read_state())
            scores = (1.0, 2.0, None if n == 0 else 3.0, 4.0)
            add_records(bus, store, group, *make_group_grades(group, scores))
        if name == "old":
            trainer.update("grpo")
    trainer.close()
    bus.close()
    (folder / NOTES_FILE).unlink()
    return folder


GROUP_SETTINGS = {"rl_method": "grpo", "rewards": "length=-1"}


@pytest.mark.parametrize("point", ["after BatchManifest", "after Metric", "saved", "renamed", "committing PolicyUpdate"])
def test_trainer_killed_in_an_update_on_groups_resumes_with_the_same_rewards(prepared_groups, processes, tmp_path, point):
    """Other grades of the same completions arrive between the kill and the restart."""
    folder = shutil.copytree(prepared_groups, tmp_path / "data")
    process = processes.Process(target=run_update, args=(str(folder), "grpo", point), kwargs=GROUP_SETTINGS)
    process.start()
    process.join(HANG_S)
    assert process.exitcode == -signal.SIGKILL, f"the point was not reached: {process.exitcode}"
    settings = make_settings(folder, **GROUP_SETTINGS)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    manifest = read_manifests(bus, "grpo")[-1]
    grades = [decode_record(value, Grade) for value in read_values(bus, "grades")]
    (grade,) = (grade for grade in grades if grade.record_id == manifest.reward_record_ids[0])
    later = {"record_id": manifest.record_id, "score": 99.0, "grader_version": "2"}
    add_records(bus, store, grade.model_copy(update=later))
    assert trainer.resume() is not None
    rows = json.loads(json.dumps(rebuild_batch(store, manifest).rows, default=str))
    notes = [json.loads(line) for line in (folder / NOTES_FILE).read_text().splitlines()]
    assert len(rows) == 4 * ROWS - 1 and "99.0" not in json.dumps(rows)
    assert [note["rows"] for note in notes] == [rows] * len(notes) and len(manifest.record_ids) == ROWS
    assert {(note["batch"], note["hash"]) for note in notes} == {(manifest.record_id, manifest.content_hash)}
    sink_all(bus, store)
    assert trainer.updater.select_rows("grpo", trainer.read_state()) == [] and trainer.resume() is None
    trainer.close()
    bus.close()


def read_manifests(bus, phase):
    return [m for value in read_values(bus, "batches") if (m := decode_record(value, BatchManifest)).phase == phase]


def read_updates(bus):
    return [decode_record(value, PolicyUpdate) for value in read_values(bus, "policies")]
