"""Confluent framing: hand-written bytes, a registry on loopback, and the faults of both."""

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
from tests.support.waiting import HANG_S

ID = compute_id("x")
LOGIN = "charter:s3cret"
# The examples of one property share a registry with its cache, as the records of one process do.
shared_registry = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def server():
    server = FakeSchemaRegistry()
    yield server
    server.close()


@pytest.fixture
def registry(server):
    """Configure the codec to read with a registry; it still writes single-object encoding."""
    client = SchemaRegistryClient(server.url, timeout_s=HANG_S)
    codec.configure_framing("single-object", client)
    yield client
    codec.configure_framing()
    client.close()


@pytest.fixture
def confluent(registry):
    codec.configure_framing("confluent", registry)
    return registry


def make_prompt(content="hello", **more):
    return Prompt(
        record_id=ID,
        prompt_id=ID,
        run_id="r",
        stage="s",
        messages=[ChatMessage(role="user", content=content)],
        source="x",
        **more,
    )


def make_response():
    completion = Completion(index=0, text="hi", token_ids=[1, 2], logprobs=[-0.5, -1.5])
    return Response(record_id=ID, run_id="r", stage="respond", messages=[], source="x", completions=[completion])


def frame_record(schema_id, record):
    """Frame a record by hand in Confluent's format; the body is the same as in single-object encoding."""
    return b"\x00" + schema_id.to_bytes(4, "big") + encode_body(record)


def encode_body(record):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, parse_schema(avro.get_schema(type(record)), {}), record.model_dump())
    return buffer.getvalue()


# The format


def test_encoded_bytes_have_the_confluent_framing(server, confluent):
    record = make_response()
    index = RECORDS.index(Response)
    assert codec.encode_record(record) == bytes([0, 0, 0, 1, 2 + index]) + encode_body(record)  # 258 is 01 02
    assert json.loads(server.schemas[FIRST_SCHEMA_ID + index]) == avro.get_schema(Response)


@shared_registry
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])), epoch=st.integers(0, 2**31))
def test_any_prompt_round_trips(confluent, text, epoch):
    record = make_prompt(text, epoch=epoch)
    assert codec.decode_record(codec.encode_record(record), Prompt) == record


def test_schemas_are_registered_once_under_the_topic_name_with_prefix(server):
    client = SchemaRegistryClient(server.url + "/", prefix="team/a.")
    codec.configure_framing("confluent", client)
    try:
        for _ in range(3):
            codec.decode_record(codec.encode_record(make_prompt()), Prompt)
    finally:
        codec.configure_framing()
    assert [(method, path) for method, path, _ in server.requests] == [
        ("POST", f"/subjects/team%2Fa.{model.topic}-value/versions") for model in RECORDS
    ]
    assert server.content_type == REGISTRY_CONTENT_TYPE


def test_schema_id_is_requested_once(server, registry):
    schema_id = server.register_schema(avro.get_schema(Prompt))
    for _ in range(3):
        assert codec.decode_record(frame_record(schema_id, make_prompt()), Prompt).source == "x"
    assert [path for _, path, _ in server.requests] == [f"/schemas/ids/{schema_id}"]


def test_concurrent_threads_register_a_new_schema_once(server, registry):
    threads = [threading.Thread(target=registry.get_header, args=(Prompt,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_codec_reads_both_framings_in_either_configuration(confluent):
    confluent_data = codec.encode_record(make_prompt())
    codec.configure_framing("single-object", confluent)
    single_object_data = codec.encode_record(make_prompt())
    assert single_object_data[:2] == b"\xc3\x01" and confluent_data[:1] == b"\x00"
    for framing in codec.FRAMINGS:
        codec.configure_framing(framing, confluent)
        for data in (single_object_data, confluent_data):
            assert codec.decode_record(data, Prompt).messages == make_prompt().messages


# Other versions of a schema, identified by the record name


def change_schema(model, change):
    schema = json.loads(json.dumps(avro.get_schema(model)))
    change(schema["fields"])
    return schema


def test_older_and_newer_schema_versions_decode_to_the_record_class(server, registry):
    older = change_schema(Prompt, lambda fields: fields.remove(next(f for f in fields if f["name"] == "origin")))
    newer = change_schema(Prompt, lambda fields: fields.insert(0, {"name": "new", "type": "string", "default": ""}))
    for schema, new_fields in ((older, {}), (newer, {"new": "n"})):
        buffer = io.BytesIO()
        fastavro.schemaless_writer(buffer, parse_schema(schema, {}), make_prompt("hej").model_dump() | new_fields)
        data = b"\x00" + server.register_schema(schema).to_bytes(4, "big") + buffer.getvalue()
        record = codec.decode_record(data, Prompt)
        assert (record.messages[0].content, record.origin) == ("hej", "")


def test_valid_record_of_another_type_raises_wrong_record(confluent):
    with pytest.raises(codec.WrongRecord, match="expected a Preference, found a Prompt"):
        codec.decode_record(codec.encode_record(make_prompt()), Preference)


# Faults of the record


def test_unknown_schema_id_is_requested_once_per_minute(server, registry, monkeypatch):
    for _ in range(3):
        with pytest.raises(codec.UnknownSchemaId, match="no schema 4294967295"):
            codec.decode_record(b"\x00\xff\xff\xff\xff" + encode_body(make_prompt()), Prompt)
    assert len(server.requests) == 1
    later = time.monotonic() + 61
    monkeypatch.setattr("schemas.confluent.time.monotonic", lambda: later)
    server.put_schema(2**32 - 1, json.dumps(avro.get_schema(Prompt)))
    assert codec.decode_record(frame_record(2**32 - 1, make_prompt()), Prompt).messages == make_prompt().messages


def test_cache_of_unknown_schema_ids_is_bounded(server, registry, monkeypatch):
    monkeypatch.setattr("schemas.confluent.REJECTION_CACHE_SIZE", 3)
    for schema_id in range(10):
        with pytest.raises(codec.UnknownSchemaId):
            registry.get_writer_schema(schema_id)
    assert len(registry._rejections) <= 3


def test_error_without_a_registry_names_the_setting():
    with pytest.raises(codec.NotARecord, match=r"schema id 258") as caught:
        codec.decode_record(frame_record(258, make_prompt()), Prompt)
    assert "bus.schema_registry" in caught.value.fix


@pytest.mark.parametrize("length", [1, 2, 4, 5, 20, -1])
def test_truncated_message_raises_truncated_or_malformed(confluent, length):
    with pytest.raises((codec.Truncated, codec.Malformed)):
        codec.decode_record(codec.encode_record(make_prompt())[:length], Prompt)


def make_record_schema(*types, name="charter.Prompt"):
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
    "another program's": make_record_schema("string", name="acme.Order"),
    "our name in no namespace": make_record_schema("string", name="Prompt"),
    "no fields": make_record_schema(),
    "fields that are a number": '{"type":"record","name":"charter.Prompt","fields":5}',
    "a name that is a list": '{"type":"record","name":["charter.Prompt"],"fields":[]}',
    "a name that is a number": '{"type":"record","name":5,"fields":[]}',
    "no name": '{"type":"record","fields":[{"name":"a","type":"int"}]}',
    "an unknown type": make_record_schema("flowt"),
    "a type that is a number": make_record_schema('{"type": 5}'),
    "said to be parsed": json.dumps(avro.get_schema(Prompt) | PARSED),
    "itself inside": make_record_schema("charter.Prompt"),
    "itself inside, or null": make_record_schema('["null","charter.Prompt"]'),
    "an array of nothing": make_record_schema('{"type":"array","items":"null"}'),
    "an array of empty records": make_record_schema(f'{{"type":"array","items":{EMPTY}}}'),
    "an array of a fixed of no bytes": make_record_schema(f'{{"type":"array","items":{NOTHING}}}'),
    "a map of empty records": make_record_schema(f'{{"type":"map","values":{EMPTY}}}'),
    "a record that is called null": make_record_schema(NULL, '{"type":"array","items":"null"}'),
    "a record of nothing": make_record_schema(EMPTY, "int"),
    "too deep": '{"type":"record","name":"charter.Prompt","fields":' + DEEP + "}",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_schema_of_another_program_raises_foreign_schema(server, registry, text):
    server.put_schema(7, text)
    for _ in range(2):  # first from the registry, then from the cache
        with pytest.raises(codec.ForeignSchema, match="schema 7"):
            codec.decode_record(b"\x00\x00\x00\x00\x07" + bytes(100), Prompt)
    assert len(server.requests) == 1


def test_schema_with_another_type_or_with_references_raises_foreign_schema(server, registry):
    schema_text = json.dumps(avro.get_schema(Prompt))
    server.answer = (200, {"schema": schema_text, "schemaType": None, "references": []})
    assert registry.get_writer_schema(0)[0] is Prompt
    for schema_id, extra in ((1, {"schemaType": "PROTOBUF"}), (2, {"references": [{"name": "x"}]}), (3, {"schemaType": 5})):
        server.answer = (200, {"schema": schema_text} | extra)
        with pytest.raises(codec.ForeignSchema):
            registry.get_writer_schema(schema_id)


def change_first_field(kind):
    """Return the schema of Prompt with another type of record_id."""
    return json.dumps(change_schema(Prompt, lambda fields: fields[0].update(type=kind)))


@pytest.mark.parametrize("text", [
    make_record_schema("int"),  # has none of the required fields
    change_first_field({"type": "bytes", "logicalType": "decimal", "precision": 10**30, "scale": 10**30}),
    change_first_field({"type": "int", "logicalType": "date"}),
    change_first_field("long"),
    change_first_field(["null", "string"]),
    json.dumps(avro.get_schema(Preference) | {"name": "Prompt"}),
], ids=["other fields", "decimal", "date", "long", "union", "another's fields"])  # fmt: skip
@pytest.mark.parametrize(
    "body", [b"", bytes(300), b"\xff" * 300, encode_body(make_prompt())], ids=["empty", "00", "ff", "a prompt"]
)
def test_schema_that_cannot_be_resolved_raises_malformed(server, registry, text, body):
    server.put_schema(7, text)
    with pytest.raises((codec.Malformed, codec.Truncated)):
        codec.decode_record(b"\x00\x00\x00\x00\x07" + body, Prompt)


# Faults of the registry: never a RecordError, because an outage must not cause dead letters


def find_free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_unreachable_registry_does_not_raise_record_error():
    client = SchemaRegistryClient(f"http://127.0.0.1:{find_free_port()}", timeout_s=1)
    codec.configure_framing("single-object", client)
    try:
        with pytest.raises(RegistryUnreachable, match="is unreachable") as caught:
            codec.decode_record(frame_record(1, make_prompt()), Prompt)
        assert not isinstance(caught.value, codec.RecordError | ValueError)
        with pytest.raises(RegistryUnreachable):
            codec.configure_framing("confluent", client)
        assert codec.encode_record(make_prompt())[:2] == codec.SINGLE_OBJECT_MARKER  # the framing is unchanged
    finally:
        codec.configure_framing()


def test_cached_schemas_work_during_a_registry_outage(server, confluent):
    data = codec.encode_record(make_prompt())
    schema_id = server.register_schema(
        change_schema(Prompt, lambda fields: fields.append({"name": "n", "type": "int", "default": 0}))
    )
    server.answer = (503, {"error_code": 50003})
    assert codec.decode_record(data, Prompt).source == "x" and codec.encode_record(make_prompt("more"))
    with pytest.raises(RegistryUnreachable, match="503"):
        codec.decode_record(frame_record(schema_id, make_prompt()) + b"\x00", Prompt)
    server.answer = None
    assert codec.decode_record(frame_record(schema_id, make_prompt()) + b"\x00", Prompt).source == "x"


INVALID_REPLIES = {
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


@pytest.mark.parametrize("reply", INVALID_REPLIES.values(), ids=INVALID_REPLIES)
def test_invalid_registry_reply_raises_registry_unreachable(server, registry, reply):
    server.answer = reply
    with pytest.raises(RegistryUnreachable):
        codec.decode_record(frame_record(1, make_prompt()), Prompt)
    with pytest.raises(RegistryUnreachable):
        codec.configure_framing("confluent", registry)
    server.answer = None
    server.put_schema(1, json.dumps(avro.get_schema(Prompt)))
    assert codec.decode_record(frame_record(1, make_prompt()), Prompt).source == "x"


def test_one_id_for_two_schemas_raises_registry_unreachable(server, registry):
    server.answer = (200, {"id": 1})
    with pytest.raises(RegistryUnreachable, match="two record classes"):
        codec.configure_framing("confluent", registry)


def serve_slowly(listener, stop):
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                connection.sendall(b" ")


def test_slow_registry_reply_ends_at_the_timeout():
    stop, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_slowly, args=(listener, stop), daemon=True).start()
    started = time.monotonic()
    try:
        with pytest.raises(RegistryUnreachable, match="TimeoutError"):
            SchemaRegistryClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5).get_writer_schema(1)
    finally:
        stop.set()
        listener.close()
    assert time.monotonic() - started < HANG_S  # the whole response would take more than an hour


def test_endless_registry_reply_is_aborted(server):
    num_sent = Counter()

    def serve(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                num_sent["bytes"] += 65536
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pytest.raises(RegistryUnreachable, match="more than"):
            SchemaRegistryClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=HANG_S).get_writer_schema(1)
    assert num_sent["bytes"] < 100 * MAX_RESPONSE_BYTES


def test_error_for_a_rejected_schema_has_the_subject_and_the_reason(server, registry):
    server.answer = (409, {"error_code": 409, "message": "incompatible\x1b[2J with version 3"})
    with pytest.raises(SchemaRejected, match=r"incompatible \[2J with version 3") as caught:
        codec.configure_framing("confluent", registry)
    assert "prompts-value" in caught.value.fix and "\x1b" not in str(caught.value)


def test_caller_can_set_the_error_class_for_an_unreachable_registry():
    class CustomUnreachable(Exception):
        pass

    with pytest.raises(CustomUnreachable):
        SchemaRegistryClient(
            f"http://127.0.0.1:{find_free_port()}", make_unreachable_error=CustomUnreachable
        ).get_writer_schema(1)


# Credentials


def test_credentials_are_sent_but_never_logged_or_shown(server, caplog):
    caplog.set_level(logging.DEBUG)
    client = SchemaRegistryClient(server.url, credentials=LOGIN)
    client.get_header(Prompt)
    assert server.authorization == "Basic Y2hhcnRlcjpzM2NyZXQ="
    server.answer = (401, {"message": server.authorization})
    with pytest.raises(RegistryUnreachable, match="rejects the credentials") as caught:
        client.get_header(Response)
    unreachable = SchemaRegistryClient(f"http://127.0.0.1:{find_free_port()}", credentials=LOGIN)
    with pytest.raises(RegistryUnreachable) as caught_unreachable:
        unreachable.get_writer_schema(1)
    assert caught_unreachable.value.__cause__ is None  # httpx's error contains the request and thus the credentials
    output = caplog.text + str(caught.value) + repr(client) + repr(vars(client)) + repr(caught_unreachable.value)
    assert "s3cret" not in output and "Y2hhcnRlcjpzM2NyZXQ=" not in output


@pytest.mark.parametrize("login", ["nocolon", "user:\udcff", "user:pass\nword"])
def test_error_for_invalid_credentials_does_not_contain_them(login):
    with pytest.raises(ValueError, match="must be USER:PASSWORD") as caught:
        SchemaRegistryClient("http://registry", credentials=login)
    assert login not in str(caught.value)


@pytest.mark.parametrize("url", [
    "", "registry:8081", "ftp://registry", "http://", "http://u:s3cret@registry", "http://[::1", "http://x:99999", "http://x?q=1",
])  # fmt: skip
def test_error_for_an_invalid_url_does_not_contain_its_credentials(url):
    with pytest.raises(ValueError, match="URL of the schema registry must") as caught:
        SchemaRegistryClient(url)
    assert "s3cret" not in str(caught.value)


def test_configure_framing_rejects_invalid_arguments(registry):
    with pytest.raises(ValueError, match="not one of single-object, confluent"):
        codec.configure_framing("protobuf", registry)
    with pytest.raises(ValueError, match="requires a schema registry"):
        codec.configure_framing("confluent")


def test_codec_does_not_import_httpx():
    code = "import sys, schemas.codec, schemas.confluent; sys.exit('httpx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(avro.SCHEMA_FOLDER).parent)


# Fuzz


@settings(shared_registry, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x00", b"\x00\x00\x00\x01", b"\x00\x00\x00\x01\x03"]))
def test_arbitrary_bytes_raise_a_record_error(confluent, data, start):
    with pytest.raises(codec.RecordError):
        codec.decode_record(start + data, Prompt)


@settings(shared_registry, max_examples=300)
@given(st.data())
def test_damaged_record_decodes_or_raises_a_record_error(confluent, data):
    encoded = bytearray(codec.encode_record(make_response()))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(codec.RecordError):
        codec.decode_any_record(bytes(encoded))


TYPES = ["record", "array", "map", "enum", "fixed", "string", "null", "long", "bytes", "charter.Prompt", "charter.ChatMessage"]
KEYS = ["type", "items", "values", "name", "fields", "symbols", "size", "default", "logicalType", "namespace"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


def list_paths(value, path=()):
    """Yield the path of every part of a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from list_paths(part, (*path, key))


SCHEMA_PATHS = [path for path in list_paths(avro.get_schema(Response)) if path]


@settings(shared_registry, max_examples=400)
@given(st.sampled_from(SCHEMA_PATHS), json_values, st.binary(max_size=60), st.booleans())
def test_damaged_schema_decodes_or_raises_a_record_error(server, confluent, path, value, junk, has_valid_body):
    """The registry's schema has an arbitrary value at one path; the body is valid or arbitrary."""
    schema = json.loads(json.dumps(avro.get_schema(Response)))
    parent = schema
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    schema_id = server.register_schema(schema)
    with contextlib.suppress(codec.RecordError):
        codec.decode_any_record(
            b"\x00" + schema_id.to_bytes(4, "big") + (encode_body(make_response()) if has_valid_body else junk)
        )


@settings(shared_registry, max_examples=300)
@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps({"schema": json.dumps(value)}).encode()),
       st.sampled_from([200, 201, 204, 404, 422, 500]), st.integers(10**6, 2**32 - 1))  # fmt: skip
def test_any_registry_reply_raises_record_error_or_registry_unreachable(server, confluent, reply, status, schema_id):
    server.answer = (status, b"" if status == 204 else reply)
    try:
        with pytest.raises((codec.RecordError, RegistryUnreachable)):
            codec.decode_any_record(b"\x00" + schema_id.to_bytes(4, "big") + encode_body(make_prompt()))
    finally:
        server.answer = None
