"""A trainer that is killed (SIGKILL) at every step of an update goes on with the identical batch; nothing is trained twice."""

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
from schemas.records import BatchManifest, ModelRef, PolicyUpdate
from tests.chaos.crash_points import CRASH_POINTS, FAKE_LEARNERS, NOTES_FILE, make_settings, run_update
from tests.support.records import make_chain_end, make_preference, make_response
from trainer.batches import rebuild_batch
from trainer.loop import Trainer

ROWS = 6


@pytest.fixture(scope="module")
def processes():
    """Processes that fork from one with everything imported, and nothing opened."""
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
    labelled(bus, store, "old")
    trainer.update("sft")
    trainer.update("reward")
    for name in ("oldest", "old"):
        answered(bus, store, name, trainer.read_state())
        trainer.update("ppo")
    answered(bus, store, "new", trainer.read_state())
    labelled(bus, store, "new")
    trainer.close()
    bus.close()
    (folder / NOTES_FILE).unlink()
    return folder


def labelled(bus, store, name):
    chains = [make_chain_end(f"{name} {n}", f"{name} chain {n}") for n in range(ROWS)]
    add(bus, store, *chains, *(make_preference(f"{name} {n}", f"{name} pair {n}", 0.7) for n in range(ROWS)))


def answered(bus, store, name, standing):
    """Answers of the present policy."""
    version = standing.policy_version
    model = ModelRef(id="policy", revision=standing.model_revisions[version])
    sampled = [make_response(f"{name} answer {n}") for n in range(ROWS)]
    add(
        bus,
        store,
        *(
            one.model_copy(
                update={
                    "model": model,
                    "policy_version": version,
                    "completions": [one.completions[0].model_copy(update={"policy_version": version})],
                }
            )
            for one in sampled
        ),
    )


def add(bus, store, *records):
    bus.publish([to_producer_record(record) for record in records])
    sink_all(bus, store)


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


UNDRAWN, DONE = ("before BatchManifest", "committing BatchManifest"), ("after PolicyUpdate", "removing")
TRAINED = ("before Metric", "after Metric", "saved", "flushing")  # begun to train, and no whole checkpoint
OF_REWARD = [point for point in CRASH_POINTS if point != "gate"]  # only policies go through the gate
CASES = [
    *product(("sft", "ppo"), CRASH_POINTS, [1]),
    *product(["reward"], OF_REWARD, [1]),
    *product(["sft"], ("saved", "gate"), [2]),
]


@pytest.mark.parametrize(("phase", "point", "times"), CASES)
def test_a_trainer_killed_at_any_step_resumes_with_the_identical_batch(prepared, processes, tmp_path, phase, point, times):
    """Killed once, or also when it has come so far again."""
    folder = shutil.copytree(prepared, tmp_path / "data")
    settings = make_settings(folder)
    for _ in range(times):
        process = processes.Process(target=run_update, args=(str(folder), phase, point))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, f"the point was not reached: {process.exitcode}"
    bus, store = connect_bus(settings), open_store(settings)
    done = len(updates(bus))
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    finished = trainer.resume()
    # Before the manifest nothing was begun, after the update there is nothing left to do.
    assert (finished is None) == (point in UNDRAWN + DONE)
    if point in UNDRAWN:
        finished = trainer.update(phase)
    assert len(updates(bus)) == done + (finished is not None)
    manifest = manifests(bus, phase)[-1]
    (made,) = [update for update in updates(bus) if update.batch_id == manifest.record_id]
    notes = [json.loads(line) for line in (folder / NOTES_FILE).read_text().splitlines()]
    rows = json.loads(json.dumps(rebuild_batch(store, manifest).rows, default=str))
    assert [note["rows"] for note in notes] == [rows] * len(notes) and len(rows) == ROWS
    assert {(note["batch"], note["hash"]) for note in notes} == {(manifest.record_id, manifest.content_hash)}
    # What was whole on disk is not trained again.
    assert len(notes) == (times + 1 if point in TRAINED else 1)
    assert not list((folder / "checkpoints").glob(".*"))
    assert trainer.get_version_folder(made.kind, made.version).exists()
    sink_all(bus, store)
    assert trainer.select_trainable_rows(phase, trainer.read_state()) == [] and trainer.resume() is None
    trainer.close()
    bus.close()


def manifests(bus, phase):
    return [m for value in read_values(bus, "batches") if (m := decode_record(value, BatchManifest)).phase == phase]


def updates(bus):
    return [decode_record(value, PolicyUpdate) for value in read_values(bus, "policies")]
