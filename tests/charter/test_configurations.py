"""Configurations of a run: what belongs to them, who publishes them, and which start is refused."""

import threading
import typing
import uuid
from contextlib import closing

import pytest

from charter.configurations import claim_configuration, describe_stages, find_differences
from charter.connect import connect_bus
from charter.manifests import make_run_manifest, read_run_manifests
from charter.models import RoleModels
from charter.pipeline import make_stage
from charter.stages import STAGES
from constitutions.loader import CONSTITUTIONS_FOLDER, load_constitution
from consumers.judge import make_constitution_ref
from engine.bus.embedded import LogConnection
from engine.errors import UsageError
from engine.models.scripted import ScriptedModel
from engine.settings import Settings, load_settings
from schemas.records import ContrastCompletion
from tests.support.deployment import Deployment
from tests.support.records import make_prompt

SECTIONS = ("respond", "critique", "revise", "judge", "contrast", "worker", "sink", "budget", "telemetry")
BASELINES = {
    "defaults": {},
    "written": {"judge.answer_mode": "letter", "critique.early_stop": "phrases", "critique.rounds": "2"},
    "one principle": {"judge.principles": "all"},
    "contrast": {"judge.pairing": "contrast"},
}


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def any_bus(request, tmp_path):
    if request.param == "embedded":
        return Deployment(tmp_path / "data")
    return Deployment(tmp_path / "data", request.getfixturevalue("kafka_address"), f"c{uuid.uuid4().hex[:8]}.")


@pytest.fixture
def deployment(tmp_path):
    return Deployment(tmp_path / "data")


def make_settings(**flags):
    names = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings({"models.policy": "scripted"} | names, environment={})[0]


def run_until_done(deployment, *arguments, **options):
    return deployment.call("run", "--until-done", *arguments, **options)


# What belongs to the configuration


def list_other_values(field):
    """Return values of a setting that differ from its default."""
    kind, default = field.annotation, field.default
    if typing.get_origin(kind) is typing.Literal:
        return [value for value in typing.get_args(kind) if value != default]
    if typing.get_origin(kind) is list:
        return [["MODEL=1/2"]]
    if kind is float:
        return [value for value in (0.3, 0.55, 0.9) if is_valid(field, value) and value != default][:1]
    return [not default if kind is bool else default + 1 if kind is int else "another"]


def is_valid(field, value):
    limits = {type(limit).__name__: limit for limit in field.metadata}
    low, high = getattr(limits.get("Ge"), "ge", 0), getattr(limits.get("Le"), "le", 1)
    return low <= value <= high


def list_changes():
    for section in SECTIONS:
        for key, field in Settings.model_fields[section].annotation.model_fields.items():
            yield from ((f"{section}.{key}", value) for value in list_other_values(field))


def compute_ids(settings, constitution, records):
    """Return the ids of the records that each stage makes from fixed inputs."""
    models = RoleModels(settings)
    made = {}
    for stage, inputs in records.items():
        outputs = make_stage(stage, settings, models, constitution, None, pinned_version=0, labels_all=True).process(inputs)
        made[stage] = [record.record_id for group in outputs for record in group]
    return made, describe_stages(settings, constitution, models)


@pytest.fixture(scope="module")
def inputs():
    """Return fixed inputs of each stage, which the stages of the default settings have made."""
    settings, constitution = make_settings(critique__early_stop="none"), load_constitution("default")
    models = RoleModels(settings)

    def process(stage, records):
        groups = make_stage(stage, settings, models, constitution, None, pinned_version=0, labels_all=True).process(records)
        return [record for group in groups for record in group]

    responses = process("respond", [make_prompt("How do I bake bread?")])
    critiques = process("critique", responses)
    contrast = {"contrast_completion": ContrastCompletion(text="With it."), "constitution": make_constitution_ref(constitution)}
    judged = [response.model_copy(update=contrast) for response in responses]
    return {"respond": [make_prompt("How do I bake bread?")], "critique": responses, "revise": critiques, "judge": judged}


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_configuration_differs_exactly_if_the_record_ids_differ(baseline, inputs):
    flags = {name.replace(".", "__"): value for name, value in BASELINES[baseline].items()}
    constitution = load_constitution("default")
    ids, stages = compute_ids(make_settings(**flags), constitution, inputs)
    assert all(ids.values())
    num_changes = 0
    for name, value in list_changes():
        if name == "judge.pairing":
            continue  # the inputs of the judge are then other records
        if name == "judge.max_thinking_tokens" and make_settings(**flags).judge.answer_mode == "logprobs":
            continue  # refused, because this judge writes no reply
        changed_ids, changed_stages = compute_ids(
            make_settings(**flags | {name.replace(".", "__"): value}), constitution, inputs
        )
        for stage in inputs:
            differences = find_differences(stages[stage], changed_stages[stage])
            assert bool(differences) == (ids[stage] != changed_ids[stage]), (stage, name, value, differences)
            num_changes += bool(differences)
    assert num_changes > 20


def test_constitution_belongs_to_responses_only_with_contrast_completions():
    settings = make_settings(judge__pairing="contrast")
    before, after = (
        describe_stages(settings, load_constitution(name), RoleModels(settings)) for name in ("default", "red-team")
    )
    assert set(find_differences(before["respond"], after["respond"])) == {"run.constitution"}
    unasked = make_settings(judge__pairing="contrast", contrast__ask_judge=False)
    assert describe_stages(unasked, load_constitution("default"), RoleModels(unasked))["judge"] == {
        "judge.pairing": "contrast", "contrast.ask_judge": False
    }  # fmt: skip


def test_pairing_constitution_and_model_belong_to_the_configuration():
    settings, models = make_settings(), RoleModels(make_settings(), {"scripted": ScriptedModel()})
    before = describe_stages(settings, load_constitution("default"), models)

    def list_changed(after):
        return {stage: set(changes) for stage in STAGES if (changes := find_differences(before[stage], after[stage]))}

    other = describe_stages(make_settings(judge__pairing="revision"), load_constitution("default"), models)
    assert list_changed(other) == {"judge": {"judge.pairing"}}
    other = describe_stages(settings, load_constitution("red-team"), models)
    assert {stage: "run.constitution" in names for stage, names in list_changed(other).items()} == {
        "critique": True, "revise": True, "judge": True
    }  # fmt: skip
    retrained = RoleModels(settings, {"scripted": ScriptedModel(revision="retrained")})
    other = describe_stages(settings, load_constitution("default"), retrained)
    assert list_changed(other) == {
        stage: {f"weights of models.{role}"}
        for stage, role in (("respond", "policy"), ("critique", "critic"), ("revise", "critic"), ("judge", "judge"))
    }


def test_the_address_of_a_model_server_does_not_belong_to_the_configuration():
    def describe(judge):
        settings = make_settings(models__judge=judge)
        return describe_stages(settings, load_constitution("default"), RoleModels(settings))["judge"]

    first = describe("http://one:8000/v1#gpt")
    assert find_differences(first, describe("https://two:9000/v1#gpt")) == {}
    assert find_differences(first, describe("http://one:8000/v1#other")) == {"models.judge": ("gpt", "other")}


# Starts


def test_a_changed_setting_is_refused_and_accepted_with_the_option(any_bus):
    any_bus.publish("One?", "Two?")
    run_until_done(any_bus)
    changed = ("--set", "respond.temperature=0.5", "--set", "judge.clamp=0.1")
    with pytest.raises(UsageError) as caught:
        run_until_done(any_bus, *changed)
    what, why, fix = str(caught.value).splitlines()
    assert "respond.temperature was 1.0 and is now 0.5" in what and "judge.clamp was 0.0 and is now 0.1" in what
    assert "respond, judge" in why and "--accept-configuration" in fix and "--run NAME" in fix
    run_until_done(any_bus, *changed, "--stage", "critique", "--stage", "sink")  # critique does not use these settings
    any_bus.publish("Three?", "Four?", "Five?")
    run_until_done(any_bus, *changed, "--accept-configuration")
    run_until_done(any_bus, *changed)  # an accepted configuration needs no option
    any_bus.fails(UsageError, "configuration 2 of run live differs", "run", "--until-done")
    first, second = any_bus.rows("runs")
    topics = ("run", "configuration", "prompts", "responses", "preferences", "changes")
    assert [first[name] for name in topics] == ["live", 1, 5, 2, 2, ""]
    assert [second[name] for name in topics] == [
        *("live", 2, 5, 3, 3), "respond.temperature: 1.0 -> 0.5; judge.clamp: 0.0 -> 0.1"
    ]  # fmt: skip
    assert any_bus.call("runs", "--csv").count("\nlive,") == 2 and "configuration 2: respond.temp" in any_bus.call("runs")
    assert any_bus.sql("SELECT count(*), count(DISTINCT record_id) FROM raw.runs") == [(2, 2)]


def test_ports_limits_and_batch_sizes_are_no_configuration(deployment):
    deployment.publish("One?")
    run_until_done(deployment)
    options = ("worker.max_in_flight=7", "budget.max_tokens=1000000", "models.max_batch_size=2", "sink.max_rows=5")
    run_until_done(deployment, *(word for option in options for word in ("--set", option)), "--instance", "another")
    assert deployment.sql("SELECT count(*) FROM raw.runs") == [(1,)]


def test_a_changed_constitution_file_is_refused_for_the_stages_that_use_it(deployment, tmp_path):
    file = tmp_path / "mine.toml"
    text = (CONSTITUTIONS_FOLDER / "default.toml").read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    deployment.flags["run.constitution"] = str(file)
    deployment.publish("One?")
    run_until_done(deployment)
    file.write_text(text.replace("?", "??"), encoding="utf-8")
    deployment.fails(UsageError, r"run.constitution was .* and is now", "run", "--until-done")
    run_until_done(deployment, "--stage", "respond", "--stage", "sink")


def test_a_stage_that_has_not_started_accepts_other_settings(deployment):
    deployment.publish("One?")
    run_until_done(deployment, "--stage", "respond", "--stage", "sink")
    run_until_done(deployment, "--stage", "judge", "--stage", "sink", "--set", "judge.clamp=0.1")
    run_until_done(deployment, "--stage", "judge", "--stage", "sink", "--set", "judge.clamp=0.1")
    assert [(row["configuration"], row["preferences"]) for row in deployment.rows("runs")] == [(1, 1)]
    deployment.fails(UsageError, "judge.clamp was 0.1 and is now 0.0", "run", "--until-done", "--stage", "judge")


def test_outputs_show_that_a_stage_has_started_after_its_offsets_expired(deployment):
    deployment.publish("One?")
    run_until_done(deployment, "--stage", "respond", "--stage", "sink")
    run_until_done(deployment, "--stage", "judge", "--stage", "sink")  # publishes nothing: the settings are the same
    connection = LogConnection(deployment.folder / "log.sqlite")
    with connection.transaction() as db:
        db.execute("DELETE FROM offsets")
    connection.close()
    deployment.fails(UsageError, "judge.clamp", "run", "--until-done", "--stage", "judge", "--set", "judge.clamp=0.1")


def test_of_concurrent_starts_the_first_on_the_log_decides(any_bus):
    """Six processes start at once, with two configurations: one manifest is published, and the others are refused."""
    settings = {value: any_bus.settings(judge__clamp=value) for value in ("0.1", "0.2")}
    connect_bus(settings["0.1"]).close()  # creates the topics
    claimed, refused, barrier = [], [], threading.Barrier(6)

    def start(value):
        constitution = load_constitution("default")
        stages = describe_stages(settings[value], constitution, RoleModels(settings[value]))
        with closing(connect_bus(settings[value])) as bus:
            barrier.wait()
            try:
                claim_configuration(
                    bus, "live", stages, stages,
                    lambda target: make_run_manifest(settings[value], constitution, None, target.to_manifest_fields()),
                )  # fmt: skip
                claimed.append(value)
            except UsageError as error:
                refused.append((value, error.what))

    threads = [threading.Thread(target=start, args=[value]) for value in ("0.1", "0.2") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(refused) == 3
    assert len(set(claimed)) == 1 and {value for value, _ in refused} == {"0.1", "0.2"} - set(claimed)
    assert all(f"judge.clamp was {claimed[0]} and is now" in what for _, what in refused)
    with closing(connect_bus(settings["0.1"])) as bus:
        assert len(read_run_manifests(bus)) == 1


def test_a_replay_that_is_started_again_follows_the_same_rule(deployment):
    deployment.publish("One?", "Two?")
    run_until_done(deployment)
    replay = ("replay", "--stage", "judge", "--as", "again")
    deployment.call(*replay, "--set", "judge.clamp=0.1")
    deployment.fails(UsageError, r"configuration 1 of run again .*\n.*\n.*--as NAME", *replay, "--set", "judge.clamp=0.2")
    deployment.call(*replay, "--set", "judge.clamp=0.2", "--accept-configuration")
    deployment.fails(UsageError, "only was False and is now True", *replay, "--set", "judge.clamp=0.2", "--only")
    deployment.fails(UsageError, "stage was judge and is now respond", "replay", "--stage", "respond", "--as", "again")
    rows = [(row["run"], row["configuration"], row["changes"]) for row in deployment.rows("runs")]
    assert rows == [("live", 1, ""), ("again", 1, ""), ("again", 2, "judge.clamp: 0.1 -> 0.2")]


def test_the_default_name_of_a_replay_does_not_depend_on_limits(deployment):
    deployment.publish("One?")
    run_until_done(deployment)
    dry_run = ("replay", "--stage", "judge", "--dry-run")
    names = {
        option: next(line for line in deployment.call(*dry_run, *option.split()).splitlines() if line.startswith("as run "))
        for option in ("", "--set sink.max_rows=7", "--set telemetry.metrics_port=9999", "--set judge.clamp=0.1")
    }
    assert len(set(names.values())) == 2 and names[""] != names["--set judge.clamp=0.1"]
