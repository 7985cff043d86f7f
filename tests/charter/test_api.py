"""The Python API: its records equal those of the pipeline, a missing label stays missing, and the documented examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from charter.api import Charter, load_constitution
from charter.connect import connect_bus
from charter.pipeline import STAGES, make_host
from engine.bus.read import read_values
from engine.errors import PermanentRecordError, UsageError
from engine.models.scripted import POISON_TEXT, ScriptedModel
from engine.settings import load_settings
from producers.files import FileProducer
from schemas.codec import decode_record, encode_record
from schemas.records import ChatMessage, Critique, EndReason, Outcome, Preference, Prompt, Response, Revision
from tests.support.waiting import wait_until

PROMPTS = [f"prompt number {n}" for n in range(6)]


def content(record):
    """Return the fields of a record without times, latencies and the input file."""
    return decode_record(encode_record(record), type(record)).model_dump_json(
        exclude={"created_at", "latency_ms", "origin", "configuration"}
    )


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"critique.preset": "bai2022", "judge.preset": "ensemble-k", "judge.num_principles": "2"},
        {"judge.pairing": "revision"},
    ],
    ids=["default", "ensemble", "revision"],
)
def test_records_equal_those_of_the_pipeline(tmp_path, chosen):
    flags = {"data.folder": str(tmp_path), "models.policy": "scripted", **chosen}
    settings, _ = load_settings(flags, environment={})
    bus = connect_bus(settings)
    (tmp_path / "prompts.txt").write_text("\n".join(f'"{text}"' for text in PROMPTS))
    FileProducer(bus, settings.run.id).publish(str(tmp_path / "prompts.txt"))
    api = Charter(settings=flags)
    pairs = api.generate_preference_pairs(PROMPTS)
    chains = [pair.chain or api.self_critique_loop(pair.response) for pair in pairs]
    created = {
        record.record_id: record
        for pair, chain in zip(pairs, chains, strict=True)
        for record in (*chain.records, *pair.records)
    }

    def read_records():
        classes = (Response, Critique, Revision, Preference)
        records = [decode_record(value, k) for k in classes for value in read_values(bus, k.topic)]
        return {record.record_id: record for record in records}

    with make_host(settings, bus, STAGES, sink=False) as host:
        wait_until(lambda: read_records().keys() >= created.keys(), host)
    expected = read_records()
    assert {key: content(record) for key, record in created.items()} == {
        key: content(record) for key, record in expected.items()
    }
    bus.close()


def better(text):
    """Return a fake model that finds initial responses flawed, revises them to `text` and prefers the revision."""

    def options(ask):
        content = ask.messages[0].content
        if "Two possible answers" in content:
            return 0.9 if f"Answer (A):\n> {text}" in content else 0.1
        return 0.1 if (f"Assistant:\n> {text}" in content) == ("(A) Yes" in content) else 0.9

    return ScriptedModel(
        option_rule=options, text_rule=lambda ask, n: text if "new answer" in ask.messages[0].content else f"first {n}"
    )


def test_chain_contains_its_critiques_and_revisions():
    chain = Charter(model=better("better text")).self_critique_loop("hello")
    assert (chain.initial_response, chain.final_response, chain.end_reason) == ("first 0", "better text", EndReason.SATISFIED)
    assert len(chain.critiques) == 2 and len(chain.revisions) == 1 and chain.critiques[-1].p_better == pytest.approx(0.9)
    assert [type(record) for record in chain.records] == [Response, Critique, Revision, Critique]
    copies = ScriptedModel(
        option_rule=lambda ask: 0.9 if "(A) Yes" in ask.messages[0].content else 0.1, text_rule=lambda ask, n: "so"
    )
    unusable = Charter(model=copies).self_critique_loop("hello")
    assert (unusable.final_response, unusable.end_reason) == (None, EndReason.UNUSABLE)


def test_pair_has_a_preferred_response_only_with_a_label():
    pair = Charter(model=better("first 1")).generate_preference_pair("hello")
    assert (pair.chosen, pair.rejected) == ("first 1", "first 0") and pair.p_a == pytest.approx(0.1)
    unread = Charter(model=ScriptedModel(option_mass=0.1)).generate_preference_pair("hello")
    assert unread.preference.outcome is Outcome.LOW_MASS and (unread.p_a, unread.chosen, unread.rejected) == (None,) * 3
    flips = {"judge.reject_position_flips": True}
    position_flip = Charter(model=ScriptedModel(option_rule=lambda ask: 0.9), settings=flips).generate_preference_pair("hello")
    assert position_flip.preference.outcome is Outcome.POSITION_FLIP and (position_flip.p_a, position_flip.chosen) == (
        None,
        None,
    )


def test_revision_is_compared_with_the_initial_response():
    revision = {"judge.pairing": "revision"}
    pair = Charter(model=better("better text"), settings=revision).generate_preference_pair("hello")
    assert (pair.chosen, pair.rejected) == ("better text", "first 0")
    assert [type(record) for record in pair.records] == [Response, Critique, Revision, Critique, Preference]
    clean = ScriptedModel(option_rule=lambda ask: 0.1 if "(A) Yes" in ask.messages[0].content else 0.9)
    nothing = Charter(model=clean, settings=revision).generate_preference_pair("hello")
    assert nothing.preference is None and (nothing.p_a, nothing.chosen, nothing.chain.end_reason) == (
        None,
        None,
        EndReason.SATISFIED,
    )


def test_each_role_uses_its_model():
    policy, critic, judge = (ScriptedModel(id=name) for name in ("policy", "critic", "judge"))
    charter = Charter(model=policy, critic=critic, judge=judge)
    chain, pair = charter.self_critique_loop("hello"), charter.generate_preference_pair("hello")
    assert [record.model.id for record in (chain.response, chain.last_step, pair.preference)] == ["policy", "critic", "judge"]
    assert policy.num_scored == 0 and critic.num_scored > 0 and judge.num_scored == 2


def test_prompts_are_accepted_in_every_form_and_others_rejected():
    charter = Charter(model=ScriptedModel())
    text, messages = charter.respond("hello"), charter.respond([ChatMessage(role="user", content="hello")])
    assert (
        text.record_id
        == messages.record_id
        == charter.respond(charter.to_prompt([{"role": "user", "content": "hello"}])).record_id
    )
    assert charter.generate_responses([text, "other"])[0] is text and isinstance(charter.to_prompt("hello"), Prompt)
    for wrong in ("", [], [{"role": "assistant", "content": "hello"}], [{"role": "user"}], ["hello"], 7, None):
        with pytest.raises(UsageError, match="the prompt is invalid"):
            charter.respond(wrong)
    with pytest.raises(UsageError, match="a response with 1 completions cannot be judged"):
        Charter(model=ScriptedModel(), settings={"respond.num_completions": 1}).generate_preference_pair("hello")
    with pytest.raises(UsageError, match=r"nearest name is respond\.num_completions"):
        Charter(settings={"respond.num_completion": 1})
    with pytest.raises(PermanentRecordError):
        charter.respond(POISON_TEXT)


def test_constitution_is_a_name_a_path_or_an_object(tmp_path):
    course = load_constitution("course")
    (tmp_path / "mine.toml").write_text(course.text, encoding="utf-8")
    hashes = [
        Charter(constitution, model=ScriptedModel()).constitution.hash
        for constitution in ("course", tmp_path / "mine.toml", course)
    ]
    assert hashes == [course.hash] * 3
    assert Charter(model=ScriptedModel(), settings={"run.constitution": "course"}).constitution.hash == course.hash


def test_documented_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARTER_MODELS__POLICY", "scripted")
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    blocks, names = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL), {}
    assert len(blocks) >= 7
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert "preferences {" in capsys.readouterr().out and names["counting"].num_requests == 1 + 2


def test_import_does_not_load_heavy_libraries():
    heavy = ("torch", "transformers", "trl", "kafka", "click")
    code = f"import charter.api, sys; charter.api.Charter(model='smollm2'); assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
