"""Confluent's framing: its bytes by hand, a registry on the loopback, and whatever may be wrong with either."""

import contextlib
import io
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fastavro
import pytest
from fastavro.schema import parse_schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas import avro, codec
from schemas.confluent import MAX_RESPONSE_BYTES, RegistryUnreachable, SchemaRegistryClient, SchemaRejected
from schemas.ids import compute_id
from schemas.records import RECORDS, ChatMessage, Completion, Preference, Prompt, Response
from tests.support.schema_registry import FIRST_SCHEMA_ID, REGISTRY_CONTENT_TYPE, FakeSchemaRegistry

ID = compute_id("x")
LOGIN = "charter:s3cret"
# The examples of one property share a registry, which remembers; that is what a process's registry does too.
one_registry = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def server():
    found = FakeSchemaRegistry()
    yield found
    found.close()


@pytest.fixture
def registry(server):
    """A registry that the codec reads with; what it writes is still single-object."""
    client = SchemaRegistryClient(server.url, timeout_s=5)
    codec.configure_framing("single-object", client)
    yield client
    codec.configure_framing()
    client.close()


@pytest.fixture
def confluent(registry):
    codec.configure_framing("confluent", registry)
    return registry


def prompt(content="hello", **more):
    return Prompt(
        record_id=ID,
        prompt_id=ID,
        run_id="r",
        stage="s",
        messages=[ChatMessage(role="user", content=content)],
        source="x",
        **more,
    )


def response():
    candidate = Completion(index=0, text="hi", token_ids=[1, 2], logprobs=[-0.5, -1.5])
    return Response(record_id=ID, run_id="r", stage="respond", messages=[], source="x", completions=[candidate])


def framed(schema_id, record):
    """A message in Confluent's framing, written by hand: the body is that of single-object encoding."""
    return b"\x00" + schema_id.to_bytes(4, "big") + body_of(record)


def body_of(record):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, parse_schema(avro.get_schema(type(record)), {}), record.model_dump())
    return buffer.getvalue()


# The format


def test_the_wire_bytes_are_confluents(server, confluent):
    record = response()
    place = RECORDS.index(Response)
    assert codec.encode_record(record) == bytes([0, 0, 0, 1, 2 + place]) + body_of(record)  # 258 is 01 02
    assert json.loads(server.schemas[FIRST_SCHEMA_ID + place]) == avro.get_schema(Response)


@one_registry
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])), epoch=st.integers(0, 2**31))
def test_any_prompt_round_trips(confluent, text, epoch):
    record = prompt(text, epoch=epoch)
    assert codec.decode_record(codec.encode_record(record), Prompt) == record


def test_schemas_are_registered_once_under_the_topics_real_name(server):
    client = SchemaRegistryClient(server.url + "/", prefix="team/a.")
    codec.configure_framing("confluent", client)
    try:
        for _ in range(3):
            codec.decode_record(codec.encode_record(prompt()), Prompt)
    finally:
        codec.configure_framing()
    assert [(method, path) for method, path, _ in server.requests] == [
        ("POST", f"/subjects/team%2Fa.{model.topic}-value/versions") for model in RECORDS
    ]
    assert server.content_type == REGISTRY_CONTENT_TYPE


def test_an_id_is_asked_for_once(server, registry):
    schema_id = server.register_schema(avro.get_schema(Prompt))
    for _ in range(3):
        assert codec.decode_record(framed(schema_id, prompt()), Prompt).source == "x"
    assert [path for _, path, _ in server.requests] == [f"/schemas/ids/{schema_id}"]


def test_threads_that_meet_at_a_new_schema_register_it_once(server, registry):
    threads = [threading.Thread(target=registry.get_header, args=(Prompt,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_single_object_messages_are_read_in_either_framing(confluent):
    confluents = codec.encode_record(prompt())
    codec.configure_framing("single-object", confluent)
    ours = codec.encode_record(prompt())
    assert ours[:2] == b"\xc3\x01" and confluents[:1] == b"\x00"
    for framing in codec.FRAMINGS:
        codec.configure_framing(framing, confluent)
        assert (
            codec.decode_record(ours, Prompt).messages == codec.decode_record(confluents, Prompt).messages == prompt().messages
        )


# Other versions of a schema, by the name of their record


def version(model, change):
    schema = json.loads(json.dumps(avro.get_schema(model)))
    change(schema["fields"])
    return schema


def test_an_older_and_a_newer_version_are_read_as_the_record_of_their_name(server, registry):
    older = version(Prompt, lambda fields: fields.remove(next(f for f in fields if f["name"] == "origin")))
    newer = version(Prompt, lambda fields: fields.insert(0, {"name": "new", "type": "string", "default": ""}))
    for schema, more in ((older, {}), (newer, {"new": "n"})):
        buffer = io.BytesIO()
        fastavro.schemaless_writer(buffer, parse_schema(schema, {}), prompt("hej").model_dump() | more)
        data = b"\x00" + server.register_schema(schema).to_bytes(4, "big") + buffer.getvalue()
        read = codec.decode_record(data, Prompt)
        assert (read.messages[0].content, read.origin) == ("hej", "")


def test_a_good_record_of_another_type_is_a_wrong_record(confluent):
    with pytest.raises(codec.WrongRecord, match="expected a Preference, found a Prompt"):
        codec.decode_record(codec.encode_record(prompt()), Preference)


# The record's fault


def test_an_unknown_id_is_named_and_asked_for_once_a_minute(server, registry, monkeypatch):
    for _ in range(3):
        with pytest.raises(codec.UnknownSchemaId, match="no schema 4294967295"):
            codec.decode_record(b"\x00\xff\xff\xff\xff" + body_of(prompt()), Prompt)
    assert len(server.requests) == 1
    later = time.monotonic() + 61
    monkeypatch.setattr("schemas.confluent.time.monotonic", lambda: later)
    server.put_schema(2**32 - 1, json.dumps(avro.get_schema(Prompt)))
    assert codec.decode_record(framed(2**32 - 1, prompt()), Prompt).messages == prompt().messages


def test_what_is_remembered_of_unknown_ids_is_bounded(server, registry, monkeypatch):
    monkeypatch.setattr("schemas.confluent.REJECTION_CACHE_SIZE", 3)
    for schema_id in range(10):
        with pytest.raises(codec.UnknownSchemaId):
            registry.get_writer_schema(schema_id)
    assert len(registry._rejections) <= 3


def test_without_a_registry_the_error_says_what_to_set():
    with pytest.raises(codec.NotARecord, match=r"schema id 258") as caught:
        codec.decode_record(framed(258, prompt()), Prompt)
    assert "bus.schema_registry" in caught.value.fix


@pytest.mark.parametrize("cut", [1, 2, 4, 5, 20, -1])
def test_a_cut_message_is_truncated(confluent, cut):
    with pytest.raises((codec.Truncated, codec.Malformed)):
        codec.decode_record(codec.encode_record(prompt())[:cut], Prompt)


def record(*types, name="charter.Prompt"):
    fields = [{"name": f"f{n}", "type": json.loads(t) if t[0] in "[{" else t} for n, t in enumerate(types)]
    return json.dumps({"type": "record", "name": name, "fields": fields})


EMPTY = '{"type":"record","name":"E","fields":[]}'
DEEP = '{"type":"array","items":' * 5000 + '"int"' + "}" * 5000
PARSED = {"name": "charter.Prompt", "__fastavro_parsed": True, "__named_schemas": {}}
NULL = '{"type":"record","name":"null","namespace":"","fields":[{"name":"a","type":"int"}]}'
NOTHING = '{"type":"fixed","name":"N","size":0}'
HOSTILE = {
    "no JSON": "{",
    "a number": "5",
    "a list": '["null"]',
    "null": "null",
    "an enum": '{"type":"enum","name":"charter.Prompt","symbols":["A"]}',
    "another program's": record("string", name="acme.Order"),
    "our name in no namespace": record("string", name="Prompt"),
    "no fields": record(),
    "fields that are a number": '{"type":"record","name":"charter.Prompt","fields":5}',
    "a name that is a list": '{"type":"record","name":["charter.Prompt"],"fields":[]}',
    "a name that is a number": '{"type":"record","name":5,"fields":[]}',
    "no name": '{"type":"record","fields":[{"name":"a","type":"int"}]}',
    "an unknown type": record("flowt"),
    "a type that is a number": record('{"type": 5}'),
    "said to be parsed": json.dumps(avro.get_schema(Prompt) | PARSED),
    "itself inside": record("charter.Prompt"),
    "itself inside, or null": record('["null","charter.Prompt"]'),
    "an array of nothing": record('{"type":"array","items":"null"}'),
    "an array of empty records": record(f'{{"type":"array","items":{EMPTY}}}'),
    "an array of a fixed of no bytes": record(f'{{"type":"array","items":{NOTHING}}}'),
    "a map of empty records": record(f'{{"type":"map","values":{EMPTY}}}'),
    "a record that is called null": record(NULL, '{"type":"array","items":"null"}'),
    "a record of nothing": record(EMPTY, "int"),
    "too deep": '{"type":"record","name":"charter.Prompt","fields":' + DEEP + "}",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_that_is_none_of_ours_is_foreign(server, registry, text):
    server.put_schema(7, text)
    for _ in range(2):  # from the registry, and from memory
        with pytest.raises(codec.ForeignSchema, match="schema 7"):
            codec.decode_record(b"\x00\x00\x00\x00\x07" + bytes(100), Prompt)
    assert len(server.requests) == 1


def test_another_type_of_schema_and_one_with_references_are_foreign(server, registry):
    good = json.dumps(avro.get_schema(Prompt))
    server.answer = (200, {"schema": good, "schemaType": None, "references": []})
    assert registry.get_writer_schema(0)[0] is Prompt
    for schema_id, more in ((1, {"schemaType": "PROTOBUF"}), (2, {"references": [{"name": "x"}]}), (3, {"schemaType": 5})):
        server.answer = (200, {"schema": good} | more)
        with pytest.raises(codec.ForeignSchema):
            registry.get_writer_schema(schema_id)


def first_field(kind):
    """Our schema of a prompt, its record_id of another type."""
    return json.dumps(version(Prompt, lambda fields: fields[0].update(type=kind)))


@pytest.mark.parametrize("text", [
    record("int"),  # nothing that our fields could be read from
    first_field({"type": "bytes", "logicalType": "decimal", "precision": 10**30, "scale": 10**30}),
    first_field({"type": "int", "logicalType": "date"}),
    first_field("long"),
    first_field(["null", "string"]),
    json.dumps(avro.get_schema(Preference) | {"name": "Prompt"}),
], ids=["other fields", "decimal", "date", "long", "union", "another's fields"])  # fmt: skip
@pytest.mark.parametrize("body", [b"", bytes(300), b"\xff" * 300, body_of(prompt())], ids=["empty", "00", "ff", "a prompt"])
def test_a_schema_of_our_name_that_we_cannot_resolve_is_malformed(server, registry, text, body):
    server.put_schema(7, text)
    with pytest.raises((codec.Malformed, codec.Truncated)):
        codec.decode_record(b"\x00\x00\x00\x00\x07" + body, Prompt)


# The registry's fault: never a RecordError, which would make a dead letter of an outage


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_registry_that_is_away_is_no_record_error():
    client = SchemaRegistryClient(f"http://127.0.0.1:{free_port()}", timeout_s=1)
    codec.configure_framing("single-object", client)
    try:
        with pytest.raises(RegistryUnreachable, match="does not answer") as caught:
            codec.decode_record(framed(1, prompt()), Prompt)
        assert not isinstance(caught.value, codec.RecordError | ValueError)
        with pytest.raises(RegistryUnreachable):
            codec.configure_framing("confluent", client)
        assert codec.encode_record(prompt())[:2] == codec.SINGLE_OBJECT_MARKER  # the choice was not made
    finally:
        codec.configure_framing()


def test_what_was_learnt_outlives_the_registry_and_the_rest_comes_back_with_it(server, confluent):
    data = codec.encode_record(prompt())
    schema_id = server.register_schema(
        version(Prompt, lambda fields: fields.append({"name": "n", "type": "int", "default": 0}))
    )
    server.answer = (503, {"error_code": 50003})
    assert codec.decode_record(data, Prompt).source == "x" and codec.encode_record(prompt("more"))
    with pytest.raises(RegistryUnreachable, match="503"):
        codec.decode_record(framed(schema_id, prompt()) + b"\x00", Prompt)
    server.answer = None
    assert codec.decode_record(framed(schema_id, prompt()) + b"\x00", Prompt).source == "x"


ANSWERS = {
    "no JSON": (200, b"<html>hello</html>"),
    "nothing": (200, b""),
    "not UTF-8": (200, b"\xff\xfe\xff"),
    "a list": (200, []),
    "no schema": (200, {}),
    "a schema that is no text": (200, {"schema": {"type": "int"}, "id": "1"}),
    "an id that is no number": (200, {"id": True}),
    "an id that is too large": (200, {"id": 2**32}),
    "an id below zero": (200, {"id": -1}),
    "too deep": (200, b"[" * 100_000),
    "too large": (200, b" " * (MAX_RESPONSE_BYTES + 1)),
    "another server's 404": (404, {"detail": "Not Found"}),
    "another server's 404 with a code": (404, {"error_code": 404, "message": "HTTP 404 Not Found"}),
    "a redirect": (302, {"id": 1, "schema": "{}"}),
    "an error": (500, {"error_code": 50001}),
    "too many requests": (429, {"error_code": 42900}),
    "no login": (401, b"who are you?"),
    "no permission": (403, {"error_code": 40301}),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_no_registrys_is_no_record_error(server, registry, answer):
    server.answer = answer
    with pytest.raises(RegistryUnreachable):
        codec.decode_record(framed(1, prompt()), Prompt)
    with pytest.raises(RegistryUnreachable):
        codec.configure_framing("confluent", registry)
    server.answer = None
    server.put_schema(1, json.dumps(avro.get_schema(Prompt)))
    assert codec.decode_record(framed(1, prompt()), Prompt).source == "x"


def test_one_id_for_two_schemas_is_no_registrys_answer(server, registry):
    server.answer = (200, {"id": 1})
    with pytest.raises(RegistryUnreachable, match="two records"):
        codec.configure_framing("confluent", registry)


def serve_slowly(listener, stop):
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                connection.sendall(b" ")


def test_an_answer_that_drips_in_ends_at_the_timeout():
    stop, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_slowly, args=(listener, stop), daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(RegistryUnreachable, match="TimeoutError"):
            SchemaRegistryClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5).get_writer_schema(1)
    finally:
        stop.set()
        listener.close()
    assert time.monotonic() - began < 5


def test_an_endless_answer_is_cut(server):
    sent = Counter()

    def serve(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                sent["bytes"] += 65536
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pytest.raises(RegistryUnreachable, match="more than"):
            SchemaRegistryClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=30).get_writer_schema(1)
    assert sent["bytes"] < 100 * MAX_RESPONSE_BYTES


def test_a_refused_schema_names_its_subject_and_the_registrys_reason(server, registry):
    server.answer = (409, {"error_code": 409, "message": "incompatible\x1b[2J with version 3"})
    with pytest.raises(SchemaRejected, match=r"incompatible \[2J with version 3") as caught:
        codec.configure_framing("confluent", registry)
    assert "prompts-value" in caught.value.fix and "\x1b" not in str(caught.value)


def test_the_caller_may_name_the_error_of_an_absent_registry():
    class Away(Exception):
        pass

    with pytest.raises(Away):
        SchemaRegistryClient(f"http://127.0.0.1:{free_port()}", make_unreachable_error=Away).get_writer_schema(1)


# The login


def test_the_login_is_sent_and_appears_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    client = SchemaRegistryClient(server.url, credentials=LOGIN)
    client.get_header(Prompt)
    assert server.authorization == "Basic Y2hhcnRlcjpzM2NyZXQ="
    server.answer = (401, {"message": server.authorization})
    with pytest.raises(RegistryUnreachable, match="refuses the login") as caught:
        client.get_header(Response)
    away = SchemaRegistryClient(f"http://127.0.0.1:{free_port()}", credentials=LOGIN)
    with pytest.raises(RegistryUnreachable) as caught_away:
        away.get_writer_schema(1)
    assert caught_away.value.__cause__ is None  # httpx's error holds the request, and that the login
    told = caplog.text + str(caught.value) + repr(client) + repr(vars(client)) + repr(caught_away.value)
    assert "s3cret" not in told and "Y2hhcnRlcjpzM2NyZXQ=" not in told


@pytest.mark.parametrize("login", ["nocolon", "user:\udcff", "user:pass\nword"])
def test_a_login_of_another_form_is_refused_without_saying_it(login):
    with pytest.raises(ValueError, match="must be USER:PASSWORD") as caught:
        SchemaRegistryClient("http://registry", credentials=login)
    assert login not in str(caught.value)


@pytest.mark.parametrize("url", [
    "", "registry:8081", "ftp://registry", "http://", "http://u:s3cret@registry", "http://[::1", "http://x:99999", "http://x?q=1",
])  # fmt: skip
def test_an_address_of_another_form_is_refused_without_its_login(url):
    with pytest.raises(ValueError, match="URL must") as caught:
        SchemaRegistryClient(url)
    assert "s3cret" not in str(caught.value)


def test_the_choice_is_checked(registry):
    with pytest.raises(ValueError, match="none of single-object, confluent"):
        codec.configure_framing("protobuf", registry)
    with pytest.raises(ValueError, match="needs a schema registry"):
        codec.configure_framing("confluent")


def test_httpx_is_imported_only_by_who_asks_a_registry():
    code = "import sys, schemas.codec, schemas.confluent; sys.exit('httpx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(avro.SCHEMA_FOLDER).parent)


# Fuzz


@settings(one_registry, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x00", b"\x00\x00\x00\x01", b"\x00\x00\x00\x01\x03"]))
def test_arbitrary_bytes_are_a_record_error(confluent, data, start):
    with pytest.raises(codec.RecordError):
        codec.decode_record(start + data, Prompt)


@settings(one_registry, max_examples=300)
@given(st.data())
def test_damaged_records_decode_or_are_a_record_error(confluent, data):
    good = bytearray(codec.encode_record(response()))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(codec.RecordError):
        codec.decode_any_record(bytes(good))


TYPES = ["record", "array", "map", "enum", "fixed", "string", "null", "long", "bytes", "charter.Prompt", "charter.ChatMessage"]
KEYS = ["type", "items", "values", "name", "fields", "symbols", "size", "default", "logicalType", "namespace"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


def paths(value, path=()):
    """Every place inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from paths(part, (*path, key))


PLACES = [path for path in paths(avro.get_schema(Response)) if path]


@settings(one_registry, max_examples=400)
@given(st.sampled_from(PLACES), json_values, st.binary(max_size=60), st.booleans())
def test_a_damaged_schema_reads_or_is_a_record_error(server, confluent, path, value, junk, whole):
    """A registry's schema of our name with anything in any one place, and a body for it or none."""
    schema = json.loads(json.dumps(avro.get_schema(Response)))
    inside = schema
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    schema_id = server.register_schema(schema)
    with contextlib.suppress(codec.RecordError):
        codec.decode_any_record(b"\x00" + schema_id.to_bytes(4, "big") + (body_of(response()) if whole else junk))


@settings(one_registry, max_examples=300)
@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps({"schema": json.dumps(value)}).encode()),
       st.sampled_from([200, 201, 204, 404, 422, 500]), st.integers(10**6, 2**32 - 1))  # fmt: skip
def test_any_answer_is_a_record_error_or_an_unreachable_registry(server, confluent, answer, status, schema_id):
    server.answer = (status, b"" if status == 204 else answer)
    try:
        with pytest.raises((codec.RecordError, RegistryUnreachable)):
            codec.decode_any_record(b"\x00" + schema_id.to_bytes(4, "big") + body_of(prompt()))
    finally:
        server.answer = None
