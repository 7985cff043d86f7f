"""Schema evolution: old and new versions of every record on one topic are read by old and new code, in any upgrade order.

The first half derives older and newer schemas of each record and reads across versions in this process. The second half runs
old and new code: copies of `schemas/`, edited and released like a real change, each in a separate process, which write to and
read from one embedded log.
"""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import fastavro
import pytest
from fastavro.schema import parse_schema

from schemas import avro, codec, compatibility
from schemas.ids import compute_id
from schemas.records import RECORDS, Prompt, Split
from tests.support.schema_registry import FakeSchemaRegistry
from tests.support.waiting import HANG_S

ID = compute_id("x")
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NEW_SYMBOL = "LATER"
PLAIN = {"string": ID, "long": 7, "float": 0.5, "double": 0.25, "boolean": True, "bytes": b"\x00~"}
EACH_MODEL = pytest.mark.parametrize("model", RECORDS, ids=lambda model: model.__name__)


# Schemas of other versions, and values for them


def list_optional_fields(model):
    return [field["name"] for field in avro.get_schema(model)["fields"] if "default" in field]


def remove_fields(model, *names):
    """Return the schema without these fields; each named type is still defined at its first use."""
    schema = copy.deepcopy(avro.get_schema(model))
    named, seen = compatibility.collect_named_types(schema), set()
    schema["fields"] = [field for field in schema["fields"] if field["name"] not in names]

    def expand(kind):
        kind = named.get(kind, kind) if isinstance(kind, str) else kind
        if isinstance(kind, list):
            return [expand(branch) for branch in kind]
        if not isinstance(kind, dict):
            return kind
        if "name" in kind:
            if kind["name"] in seen:
                return f"{avro.NAMESPACE}.{kind['name']}"
            seen.add(kind["name"])
        inner = {key: expand(kind[key]) for key in ("items", "values") if key in kind}
        fields = [field | {"type": expand(field["type"])} for field in kind.get("fields", [])]
        return kind | inner | ({"fields": fields} if fields else {})

    return expand(schema)


def extend_schema(model):
    """Return the schema with one more field in every nested record and one more symbol in every enum."""
    schema = copy.deepcopy(avro.get_schema(model))
    for kind in compatibility.collect_named_types(schema).values():
        if kind["type"] == "enum":
            kind["symbols"].append(NEW_SYMBOL)
        else:
            kind["fields"].append({"name": "added", "type": ["null", "string"], "default": None})
    return schema


def make_value(schema):
    """Return a value with all fields set: the newest symbol of each enum, and strings that are valid ids."""
    named = compatibility.collect_named_types(schema)

    def sample(kind):
        kind = named.get(kind, kind) if isinstance(kind, str) else kind
        if isinstance(kind, list):
            return sample(kind[-1])
        if isinstance(kind, str):
            return PLAIN[kind]
        if kind["type"] == "record":
            return {field["name"]: sample(field["type"]) for field in kind["fields"]}
        if kind["type"] == "enum":
            return kind["symbols"][-1]
        if kind["type"] == "array":
            return [sample(kind["items"])] * 2
        return {"key": sample(kind["values"])} if kind["type"] == "map" else WHEN

    return sample(schema)


def resolve_value(value, reader):
    """Resolve a written value for a reader schema, by the rules of the Avro specification and without fastavro.

    A field that the reader does not have is dropped, a field that only the reader has gets its default, and an unknown symbol
    becomes UNKNOWN.
    """
    named = compatibility.collect_named_types(reader)

    def resolve(value, kind):
        kind = named.get(kind, kind) if isinstance(kind, str) else kind
        if isinstance(kind, list):
            return None if value is None else resolve(value, kind[-1])
        if isinstance(kind, str):
            return value
        if kind["type"] == "record":
            return {
                field["name"]: resolve(value.get(field["name"], field.get("default")), field["type"])
                for field in kind["fields"]
            }
        if kind["type"] == "enum":
            return value if value in kind["symbols"] else "UNKNOWN"
        return [resolve(item, kind["items"]) for item in value] if kind["type"] == "array" else value

    return resolve(value, reader)


def encode_body(schema, value):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, parse_schema(schema, {}), value)
    return buffer.getvalue()


def encode_message(schema, value):
    return codec.SINGLE_OBJECT_MARKER + avro.compute_schema_fingerprint(schema) + encode_body(schema, value)


def read_with(writer, reader, value):
    """Write a value with one schema and read it with another, with fastavro only."""
    return fastavro.schemaless_reader(
        io.BytesIO(encode_body(writer, value)), parse_schema(writer, {}), parse_schema(reader, {})
    )


def check_both_directions(one, other):
    assert compatibility.find_incompatibilities(one, other) == compatibility.find_incompatibilities(other, one) == []
    for writer, reader in ((one, other), (other, one)):
        value = make_value(writer)
        assert read_with(writer, reader, value) == resolve_value(value, reader)


@EACH_MODEL
def test_newer_version_is_compatible_in_both_directions(model):
    assert avro.compute_schema_fingerprint(extend_schema(model)) != avro.compute_schema_fingerprint(avro.get_schema(model))
    check_both_directions(extend_schema(model), avro.get_schema(model))


@EACH_MODEL
def test_version_without_an_optional_field_is_compatible_in_both_directions(model):
    assert list_optional_fields(model)
    for name in list_optional_fields(model):
        check_both_directions(remove_fields(model, name), avro.get_schema(model))


@EACH_MODEL
def test_all_versions_are_compatible_with_each_other(model):
    """Not only consecutive versions: FULL_TRANSITIVE."""
    released = avro.load_released_schemas()[model.__name__]
    versions = [remove_fields(model, *list_optional_fields(model)), avro.get_schema(model), extend_schema(model), *released]
    for one in versions:
        for other in versions:
            check_both_directions(one, other)


# The codec as the reader


@pytest.fixture
def release(monkeypatch):
    """Return a function that adds a version to the released ones."""
    shipped = avro.load_released_schemas()

    def add(model, schema):
        monkeypatch.setattr(
            codec, "load_released_schemas", lambda: shipped | {model.__name__: [*shipped[model.__name__], schema]}
        )
        codec.load_writer_schemas.cache_clear()

    yield add
    codec.load_writer_schemas.cache_clear()


@EACH_MODEL
def test_codec_sets_defaults_for_fields_that_an_older_version_lacks(model, release):
    names = list_optional_fields(model)
    schema = remove_fields(model, *names)
    release(model, schema)
    record = codec.decode_record(encode_message(schema, make_value(schema)), model)
    assert record.record_id == ID
    for name in names:
        # A record without a time is older than all records with one, so its time is not that of reading.
        default = EPOCH if name == "created_at" else model.model_fields[name].get_default(call_default_factory=True)
        assert getattr(record, name) == default, name


@EACH_MODEL
def test_codec_reads_a_newer_version_after_its_schema_is_released(model, release):
    schema = extend_schema(model)
    data = encode_message(schema, make_value(schema))
    with pytest.raises(codec.UnknownFingerprint, match="newer version of Charter"):
        codec.decode_record(data, model)
    release(model, schema)
    assert codec.decode_record(data, model) == model.model_validate(resolve_value(make_value(schema), avro.get_schema(model)))
    assert NEW_SYMBOL not in codec.decode_record(data, model).model_dump_json()


def test_new_enum_symbol_decodes_as_unknown(release):
    schema = extend_schema(Prompt)
    release(Prompt, schema)
    assert make_value(schema)["split"] == NEW_SYMBOL
    assert codec.decode_record(encode_message(schema, make_value(schema)), Prompt).split is Split.UNKNOWN


# Old and new code, each in its own process, on one log

CHILD = '''
"""Run old or new code, depending on the first `schemas` on the path: write one record to each topic, or read all records."""
import json, os, sys
import schemas
from engine.bus import open_bus
from engine.bus.port import ProducerRecord
from engine.bus.read import read_topic
from schemas import codec
from schemas.confluent import SchemaRegistryClient
from schemas.records import RECORDS
from schemas.topics import make_topic_table

log, registry, values = sys.argv[1:]
assert schemas.__file__.startswith(os.getcwd()), schemas.__file__
if registry:
    codec.configure_framing("confluent", SchemaRegistryClient(registry))
bus = open_bus(log)
bus.create_topics(list(make_topic_table(1).values()))
if values:
    records = [model.model_validate(json.loads(values)[model.__name__]) for model in RECORDS]
    bus.publish([ProducerRecord(record.topic, record.key, codec.encode_record(record)) for record in records])
else:
    for model in RECORDS:
        for record in read_topic(bus, model.topic):
            try:
                values = codec.decode_record(record.value, model).model_dump(mode="json")
            except codec.RecordError as error:
                values = {"error": str(error)}
            print(json.dumps([model.__name__, values]))
bus.close()
'''
# Changes of a later version: fields of every record, a field of a nested record, an enum symbol.
CHANGES = [
    (
        "    latency_ms: float = 0.0\n",
        '    latency_ms: float = 0.0\n    mood: str = "calm"\n    notes: list[ChatMessage] = Field(default_factory=list)\n',
    ),
    ("    role: str\n    content: str\n", '    role: str\n    content: str\n    tone: str = "plain"\n'),
    ('    EVAL = "EVAL"\n', f'    EVAL = "EVAL"\n    {NEW_SYMBOL} = "{NEW_SYMBOL}"\n'),
]


class SchemasCopy:
    """A copy of `schemas/`, and processes that run it."""

    def __init__(self, folder, source):
        self.folder = folder
        shutil.copytree(source, folder / "schemas", ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, *arguments):
        environment = os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{avro.SCHEMA_FOLDER.parent}"}
        completed = subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def write(self, log, values, registry=""):
        self.run("-c", CHILD, str(log), registry, json.dumps(values))

    def read(self, log, registry=""):
        """Return the values on each topic in order, by record name."""
        values_by_name = {}
        for line in self.run("-c", CHILD, str(log), registry, "").splitlines():
            name, values = json.loads(line)
            values_by_name.setdefault(name, []).append(values)
        return values_by_name


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return SchemasCopy(tmp_path_factory.mktemp("old"), avro.SCHEMA_FOLDER)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Apply `CHANGES` to a copy, and release and check it with the same commands as every release."""
    code = SchemasCopy(tmp_path_factory.mktemp("new"), avro.SCHEMA_FOLDER)
    records = code.folder / "schemas" / "records.py"
    text = records.read_text()
    for before, after in CHANGES:
        assert text.count(before) == 1, f"records.py has changed: update CHANGES ({before!r})"
        text = text.replace(before, after)
    records.write_text(text)
    code.run("-m", "schemas.avro")
    assert "every record class is compatible with every released version" in code.run("-m", "schemas.compatibility")
    return code


@pytest.fixture(scope="module")
def prepared(old, new, tmp_path_factory):
    """Return old code with the released schemas of the new version, installed before new code starts."""
    code = SchemasCopy(tmp_path_factory.mktemp("prepared"), old.folder / "schemas")
    shutil.copytree(new.folder / "schemas" / "released", code.folder / "schemas" / "released", dirs_exist_ok=True)
    return code


def jsonable(value):
    return json.loads(json.dumps(value, default=lambda part: part.decode() if isinstance(part, bytes) else part.isoformat()))


OLD_VALUES = {model.__name__: jsonable(make_value(avro.get_schema(model))) for model in RECORDS}
# The erasure of another prompt: the log stores the records of an erased prompt without their values.
OLD_VALUES["Erasure"]["prompt_id"] = compute_id("erased")
OLD_READ = {model.__name__: model.model_validate(OLD_VALUES[model.__name__]).model_dump(mode="json") for model in RECORDS}


def to_new_values(values):
    """Return the record as new code writes it, with all new fields and symbols."""
    message = {"role": "user", "content": "later", "tone": "loud"}
    new_values = values | {"mood": "glad", "notes": [message]}
    new_values |= {"messages": [message]} if "messages" in values else {}
    return new_values | ({"split": NEW_SYMBOL} if "split" in values else {})


def to_old_view(values):
    view = values | ({"messages": [{"role": "user", "content": "later"}]} if "messages" in values else {})
    return view | ({"split": "UNKNOWN"} if "split" in values else {})


def to_new_view(values):
    view = values | {"mood": "calm", "notes": []}
    return view | (
        {"messages": [message | {"tone": "plain"} for message in values["messages"]]} if "messages" in values else {}
    )


NEW_VALUES = {name: to_new_values(values) for name, values in OLD_VALUES.items()}
NEW_READ = {name: to_new_values(values) for name, values in OLD_READ.items()}


@pytest.fixture(scope="module")
def log(old, new, tmp_path_factory):
    """Return a log to which old and new code wrote alternately."""
    folder = tmp_path_factory.mktemp("log")
    for code, values in ((old, OLD_VALUES), (new, NEW_VALUES), (old, OLD_VALUES)):
        code.write(folder, values)
    return folder


def test_new_code_reads_records_of_old_and_new_code(new, log):
    values_by_name = new.read(log)
    for name, values in OLD_READ.items():
        assert values_by_name[name] == [to_new_view(values), NEW_READ[name], to_new_view(values)]


def test_old_code_reports_unknown_schemas_and_reads_the_other_records(old, log):
    values_by_name = old.read(log)
    for name, values in OLD_READ.items():
        first, second, third = values_by_name[name]
        assert first == third == values
        assert "unknown schema fingerprint" in second["error"] and "upgrade this process" in second["error"]


def test_old_code_with_the_new_schemas_reads_all_records(prepared, log):
    values_by_name = prepared.read(log)
    for name, values in OLD_READ.items():
        assert values_by_name[name] == [values, to_old_view(values), values]


def test_old_and_new_code_with_a_registry_read_all_records(old, new, tmp_path):
    """Old code gets the new schemas from the registry, so nothing has to be installed first."""
    server = FakeSchemaRegistry()
    try:
        for code, values in ((old, OLD_VALUES), (new, NEW_VALUES)):
            code.write(tmp_path, values, server.url)
        old_views, new_views = old.read(tmp_path, server.url), new.read(tmp_path, server.url)
    finally:
        server.close()
    assert len(server.schemas) == 2 * len(RECORDS)
    for name, values in OLD_READ.items():
        assert old_views[name] == [values, to_old_view(values)]
        assert new_views[name] == [to_new_view(values), NEW_READ[name]]


def test_log_with_both_framings_is_read_by_old_and_new_code(old, prepared, new, tmp_path):
    """A change of bus.framing does not require upgrading all processes at once."""
    server = FakeSchemaRegistry()
    try:
        old.write(tmp_path, OLD_VALUES)
        new.write(tmp_path, NEW_VALUES, server.url)
        new_views, old_views = new.read(tmp_path, server.url), prepared.read(tmp_path, server.url)
    finally:
        server.close()
    for name, values in OLD_READ.items():
        assert new_views[name] == [to_new_view(values), NEW_READ[name]]
        assert old_views[name] == [values, to_old_view(values)]
