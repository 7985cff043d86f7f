"""The checks of the soak test find every fault that is planted, and its generator of prompts passes the gates."""

import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta

import duckdb
import pyarrow.parquet as parquet
import pytest

from benchmarks.soak.checks import compare_with_lake, compare_with_log, count_index_faults, count_prompt_faults
from benchmarks.soak.processes import make_setting_flags
from benchmarks.soak.questions import QuestionModel
from benchmarks.soak.results import compute_limits, count_starved_updates
from benchmarks.soak.supervision import EXPORT, SERVICES, plan_kills
from charter.connect import connect_bus, open_store
from engine.bus.read import read_values
from producers.generate import GeneratorOptions, PromptGenerator
from producers.recipe import load_recipe
from schemas import ids
from schemas.codec import decode_record
from schemas.records import BatchManifest, Pause, PolicyKind, PolicyUpdate, ProducerOffset, Prompt, Response
from tests.support.lake import LakeSource
from tests.support.records import RecordDatabase, make_chain_end, make_preference, make_response
from trainer.scores import make_score

OPTIONS = GeneratorOptions(batch_size=1, eval_fraction=0.0)


def make_generator(bus):
    recipe = load_recipe(make_setting_flags(bus.folder)["generate.recipe"])
    return PromptGenerator(bus, recipe, QuestionModel(), "live", OPTIONS)


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    """Return a folder with two generated indexes whose prompts are finished, and with their lake."""
    source = LakeSource(tmp_path_factory.mktemp("soak") / "data")
    bus = connect_bus(source.settings())
    generator = make_generator(bus)
    for _ in range(2):
        generator.step()
    generator.close()
    texts = [decode_record(value, Prompt).messages[0].content for value in read_values(bus, Prompt.topic)]
    bus.close()
    source.add(*(make(text) for text in texts for make in (make_response, make_end, make_judgment)))
    source.export(source.folder.parent / "lake")
    return source.folder.parent


def make_end(text):
    return make_chain_end(text, text)


def make_judgment(text):
    return make_preference(text, text, 0.9)


@pytest.fixture
def source(finished_folder, tmp_path):
    shutil.copytree(finished_folder, tmp_path, dirs_exist_ok=True)
    return LakeSource(tmp_path / "data")


def count_faults(source):
    """Return the counts that are not 0."""
    bus = connect_bus(source.settings())
    with duckdb.connect(str(open_store(source.settings()).path), read_only=True) as connection:
        faults = count_index_faults(connection) | count_prompt_faults(connection) | compare_with_log(connection, bus)[0]
        faults |= compare_with_lake(connection, source.folder.parent / "lake")[0]
    bus.close()
    return {name: count for name, count in faults.items() if count}


def read_records(source, record_class):
    bus = connect_bus(source.settings())
    records = [decode_record(value, record_class) for value in read_values(bus, record_class.topic)]
    bus.close()
    return records


def test_nothing_is_found_without_a_fault(source):
    assert count_faults(source) == {}


def select_first(table):
    return f"record_id = (SELECT min(record_id) FROM raw.{table})"


@pytest.mark.parametrize(
    ("statements", "faults"),
    [
        (
            [
                f"DELETE FROM raw.responses WHERE {select_first('responses')}",
                "DELETE FROM raw.producer_offsets WHERE next_line = 1",
            ],
            {
                "prompts_without_response": 1,
                "indexes_lost": 1,
                "indexes_with_other_prompts": 2,
                "records_missing_in_database": 2,
                "lake_rows_not_in_database": 2,
            },
        ),
        (
            [f"INSERT INTO raw.preferences SELECT * FROM raw.preferences WHERE {select_first('preferences')}"],
            {
                "prompts_with_several_judgments": 1,
                "record_ids_doubled_in_tables": 1,
                "rows_not_on_the_log": 1,
                "rows_missing_in_lake": 1,
            },
        ),
        (
            [
                f"UPDATE raw.preferences SET messages = [{{role: 'user', content: 'x'}}] WHERE {select_first('preferences')}",
                f"UPDATE raw.critiques SET final = false WHERE {select_first('critiques')}",
            ],
            {"prompts_without_chain_end": 1, "rows_missing_in_lake": 2, "lake_rows_not_in_database": 2},
        ),
    ],
    ids=["lost", "doubled", "changed"],
)
def test_a_fault_in_the_database_is_found(source, statements, faults):
    with duckdb.connect(str(open_store(source.settings()).path)) as connection:
        for sql in statements:
            connection.execute(sql)
    assert count_faults(source) == faults


def test_an_index_and_a_record_that_are_on_the_log_twice_are_found(source):
    bus = connect_bus(source.settings())
    generator = make_generator(bus)
    generator.read_log()
    again = generator.sample(0).prompts  # another process writes other texts
    bus.close()
    finished = [make(prompt.messages[0].content) for prompt in again for make in (make_response, make_end, make_judgment)]
    source.add(*again, read_records(source, ProducerOffset)[0], *finished, read_records(source, Response)[0])
    source.export(source.folder.parent / "lake")
    assert count_faults(source) == {
        "indexes_doubled": 1,
        "indexes_with_other_prompts": 1,
        "record_ids_doubled_on_the_log": 1,
        "prompts_with_several_responses": 1,
    }


def test_scores_of_a_resumed_batch_are_no_fault_if_their_content_is_the_same(source):
    response = read_records(source, Response)[0]
    row = {"response_id": response.record_id, "completion_index": 0, "prompt_id": response.prompt_id, "policy_version": 0}
    source.add(*(make_score(row, "live", 1, 0.5, 0.1) for _ in range(2)))
    source.export(source.folder.parent / "lake")
    assert count_faults(source) == {}
    source.add(make_score(row, "live", 1, 0.6, 0.1))
    source.export(source.folder.parent / "lake")
    assert count_faults(source) == {"repeated_records_with_other_content": 1}


def test_faults_in_the_files_of_the_lake_are_found(source):
    prompts, preferences, critiques = (
        next((source.folder.parent / "lake" / table).rglob("*.parquet")) for table in ("prompts", "preferences", "critiques")
    )
    shutil.copyfile(prompts, prompts.with_name("copy.parquet"))
    preferences.unlink()
    parquet.write_table(parquet.read_table(critiques, partitioning=None).drop_columns(["source"]), critiques)
    num_prompts = len(read_records(source, Prompt))
    assert count_faults(source) == {
        "lake_rows_not_in_database": num_prompts,
        "rows_missing_in_lake": num_prompts,
        "lake_columns_that_differ": 1,
    }


def test_prompts_of_the_generator_are_rejected_only_for_planned_reasons(bus):
    generator = make_generator(bus)
    generator.read_log()
    sampled = [generator.sample(index) for index in range(40)]
    rejected = sum((Counter(one.count_rejected()) for one in sampled), Counter())
    assert set(rejected) == {"duplicate", "not_a_request"}
    assert sum(len(one.prompts) for one in sampled) > 4 * rejected.total()
    assert {prompt.source for one in sampled for prompt in one.prompts} == {"benign", "red-team"}


def test_kills_are_spread_over_the_processes_and_the_time():
    kills = plan_kills(10, 60, 600)
    assert Counter(name for _, name in kills) == {"stream": 3, "trainer": 3, "generator": 2, EXPORT: 2}
    assert [at for at, _ in kills] == sorted(at for at, _ in kills if 60 <= at <= 600)
    assert {name for _, name in kills} == {*SERVICES, EXPORT}


@pytest.mark.parametrize(
    ("dropped", "trained", "num_starved", "held"),
    [
        (0.1, 0.75, 0, [True, True, True]),
        (0.11, 0.75, 0, [False, True, True]),
        (0.0, 0.74, 0, [True, False, True]),
        (0.0, 0.8, 1, [True, True, False]),
    ],
)
def test_each_limit_is_checked(dropped, trained, num_starved, held):
    limits = compute_limits({"dropped": dropped, "trained": trained}, num_starved, 12.0)
    assert [limit["holds"] for limit in limits.values()] == held


def make_training_record(record_class, at_s, **values):
    """Return a record of the trainer that was made some seconds after a fixed time."""
    fields = {"record_id": ids.compute_id(record_class.topic, at_s), "run_id": "r", "stage": "train", "phase": "ppo"}
    return record_class(**fields, created_at=datetime(2026, 11, 28, tzinfo=UTC) + timedelta(seconds=at_s), **values)


def make_batch(at_s):
    values = {"record_ids": [], "content_hash": "", "commit_seq_from": 0, "commit_seq_to": 0, "base_policy_version": 0}
    return make_training_record(BatchManifest, at_s, batch_number=at_s, **values)


def make_reward_model(at_s):
    values = {"version": 1, "uri": "", "content_hash": "", "base_version": 0, "batch_id": ids.compute_id("batch")}
    return make_training_record(PolicyUpdate, at_s, kind=PolicyKind.REWARD, **values)


@pytest.mark.parametrize(
    ("times", "pauses", "expected"),
    [
        ([0, 500, 600], [], (0, 100.0)),  # before the first reward model, RL cannot train
        ([450, 600, 1000], [], (1, 400.0)),
        ([450, 600, 1000], [(True, 700), (False, 800)], (0, 150.0)),
        ([450, 600, 1000], [(True, 500), (False, 550)], (1, 400.0)),
    ],
)
def test_starved_updates_are_counted(tmp_path, times, pauses, expected):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(make_reward_model(400), *map(make_batch, times))
    database.add(*(make_training_record(Pause, at_s, paused=paused) for paused, at_s in pauses))
    assert count_starved_updates(database.store) == expected
