"""`charter produce --generate` and `--drop-near-duplicates`, as commands in this process."""

import json
import os
import signal
import threading
from contextlib import closing

import pytest

from charter import models
from charter.connect import connect_bus, open_store
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.errors import TooFewPrompts, UsageError
from engine.instances import list_running_services
from engine.notices import NOTICES
from producers.recipe import load_recipe
from tests.support.deployment import Deployment
from tests.support.list_model import ListModel, write_request
from tests.support.records import copy_empty_database
from tests.support.waiting import wait_until


@pytest.fixture
def deployment(tmp_path):
    NOTICES.clear()
    found = Deployment(tmp_path / "data")
    found.flags |= {"generate.batch_size": "2", "prompts.eval_fraction": "0"}
    return found


@pytest.fixture
def lists(monkeypatch):
    """Use a model that writes lists of requests as every model that is opened."""
    model = ListModel()
    monkeypatch.setattr(models, "open_model", lambda spec, **options: model)
    return model


def count_prompts(deployment):
    with closing(connect_bus(deployment.settings())) as bus:
        return len(read_values(bus, "prompts"))


def test_generated_prompts_and_their_yield_are_in_the_database(deployment, lists):
    lists.texts = [write_request(1), "This is a statement about lamps.", *map(write_request, range(2, 9))]
    output = deployment.call("produce", "--generate", "--limit", "6")
    assert output == "6 prompts published, yield 86% of 7 texts; rejected: not_a_request 1, over_limit 1\n"
    copy_empty_database(deployment.folder / "charter.duckdb")
    with closing(connect_bus(deployment.settings())) as bus:
        sink = Sink(bus, open_store(deployment.settings()), max_wait_s=0.05)
        while sink.step():
            pass
        sink.close()
    sql = "SELECT recipe_item.recipe, model.id, count(*), count(DISTINCT seed) FROM prompts GROUP BY ALL"
    assert deployment.sql(sql) == [("default", "lists", 6, 4)]
    sql = "SELECT records, duplicates, content_mismatches FROM pipeline_status WHERE topic = 'producer-offsets'"
    assert deployment.sql(sql) == [(1, 0, 0)]  # a later position is no duplicate
    sql = "SELECT recipe, next_index, published, texts, yield, rejected['not_a_request'], recipe_hash FROM generation_stats"
    assert deployment.sql(sql) == [("default", 2, 6, 7, pytest.approx(6 / 7), 1, load_recipe("default").hash)]
    assert deployment.call("produce", "--generate", "--limit", "6") == "0 prompts published\n"


def test_fruitless_generator_fails_with_three_lines(deployment):
    """The scripted model writes words without meaning."""
    with pytest.raises(TooFewPrompts, match="the last 2 indexes before index 2 gave no new prompt") as error:
        deployment.call("produce", "--generate", "--set", "generate.max_fruitless=2")
    assert len(str(error.value).splitlines()) == 3 and "not_a_request 4" in str(error.value)
    assert count_prompts(deployment) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_generator_that_waits(deployment, lists, number):
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def send_signal():
        wait_until(lambda: any(list_running_services(deployment.folder)["generator"]) and count_prompts(deployment) >= 4)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send_signal)
    thread.start()
    try:
        output = deployment.call("produce", "--generate", "--set", "generate.max_waiting=4")
    finally:
        thread.join()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert output.startswith("4 prompts published") and count_prompts(deployment) == 4
    assert list_running_services(deployment.folder)["generator"] == []


def test_dry_run_shows_prompts_and_rejected_texts_and_publishes_nothing(deployment, lists):
    lists.texts = [write_request(1), "This is a statement about lamps.", write_request(2), write_request(1)]
    output = deployment.call("produce", "--generate", "--dry-run")
    assert f"{write_request(1)}\n" in output and "rejected, not_a_request: This is a statement about lamps." in output
    assert "rejected, duplicate (it is near default:0):" in output
    assert output.endswith(
        "dry run of index 0: 2 prompts accepted, yield 50% of 4 texts; rejected: not_a_request 1, duplicate 1\n"
    )
    assert not deployment.folder.exists()
    deployment.call("produce", "--generate", "--limit", "1")
    again = deployment.call("produce", "--generate", "--dry-run")
    assert "dry run of index 1" in again and count_prompts(deployment) == 1


def test_suites_that_are_not_on_the_log_are_avoided(deployment, lists, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": write_request(1)}))
    output = deployment.call("produce", "--generate", "--limit", "3", "--avoid-suite", tmp_path / "mine.jsonl")
    assert output == "3 prompts published, yield 75% of 4 texts; rejected: contamination 1\n"
    deployment.fails(UsageError, "--avoid-suite xstest names no file", "produce", "--generate", "--avoid-suite", "xstest")


def test_recipe_file_and_its_errors(deployment, lists, tmp_path):
    recipe = tmp_path / "my.toml"
    recipe.write_text('name = "my"\nversion = "1.0.0"\nred_team_fraction = 0\nlanguages = { en = 1 }\nkind = []\n')
    deployment.fails(UsageError, "line 5: kind is unknown", "produce", "--generate", "--recipe", recipe)
    deployment.fails(UsageError, "there is no recipe 'other'", "produce", "--generate", "--recipe", "other")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--generate", "file.jsonl"], "--generate reads no file, so it cannot be used with FILE"),
        (["--generate", "--shipped"], "cannot be used with --shipped"),
        (["--generate", "--epoch", "1"], "cannot be used with --epoch"),
        (["--generate", "--as", "preferences"], "cannot be used with --as"),
        (["--shipped", "--limit", "3"], "--recipe and --limit need --generate"),
        (["--shipped", "--avoid-suite", "x"], "--avoid-suite needs --drop-near-duplicates or --generate"),
        (["--drop-near-duplicates", "--as", "preferences", "x"], "cannot be used with --as preferences"),
        ([], "give FILE, - for standard input, --shipped or --generate"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(deployment, options, expected):
    assert expected in deployment.call("produce", *options, code=2, stream="output")


def test_near_duplicates_of_a_file_are_dropped_and_shown_by_a_dry_run(deployment, tmp_path):
    file, suite = tmp_path / "a.jsonl", tmp_path / "suite.jsonl"
    texts = [write_request(1), write_request(1).replace("its", "the"), write_request(2), write_request(3)]
    file.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    suite.write_text(json.dumps(write_request(2)))
    command = ("produce", "--drop-near-duplicates", "--avoid-suite", suite, file)
    dry = deployment.call(*command, "--dry-run")
    dropped = "1 dropped because they are near a prompt of an evaluation suite or of the other split, 1 near-duplicate dropped"
    assert f"would publish 2 prompts, {dropped}\n" in dry and not deployment.folder.exists()
    NOTICES.clear()
    assert deployment.call(*command) == f"2 prompts published from {file}, {dropped}\n"
    assert NOTICES.get_counts() == {("dropped_row", "duplicate"): 1, ("dropped_row", "contamination"): 1}
    assert "would publish 0 prompts, 2 duplicates skipped" in deployment.call(*command, "--dry-run")
    assert count_prompts(deployment) == 2
