"""Old and new versions of every record on one topic: each is read by old and by new code, in any order of upgrading.

The first half derives older and newer schemas of each record and reads across them in this process. The second half runs old
and new code for real: copies of `schemas/`, edited and released as a person would, each in a process of its own, writing to
and reading from one embedded log.
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

ID = compute_id("x")
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NEW_SYMBOL = "LATER"
PLAIN = {"string": ID, "long": 7, "float": 0.5, "double": 0.25, "boolean": True, "bytes": b"\x00~"}
MODELS = pytest.mark.parametrize("model", RECORDS, ids=lambda model: model.__name__)


# Schemas of other times, and values of them


def optional_fields(model):
    return [field["name"] for field in avro.get_schema(model)["fields"] if "default" in field]


def older(model, *names):
    """The schema before these fields were there, each type still spelled out where it comes first."""
    schema = copy.deepcopy(avro.get_schema(model))
    named, seen = compatibility.collect_named_types(schema), set()
    schema["fields"] = [field for field in schema["fields"] if field["name"] not in names]

    def spell(kind):
        kind = named.get(kind, kind) if isinstance(kind, str) else kind
        if isinstance(kind, list):
            return [spell(branch) for branch in kind]
        if not isinstance(kind, dict):
            return kind
        if "name" in kind:
            if kind["name"] in seen:
                return f"{avro.NAMESPACE}.{kind['name']}"
            seen.add(kind["name"])
        inner = {key: spell(kind[key]) for key in ("items", "values") if key in kind}
        fields = [field | {"type": spell(field["type"])} for field in kind.get("fields", [])]
        return kind | inner | ({"fields": fields} if fields else {})

    return spell(schema)


def newer(model):
    """The schema with one more field in every record inside, and one more symbol in every enum."""
    schema = copy.deepcopy(avro.get_schema(model))
    for kind in compatibility.collect_named_types(schema).values():
        if kind["type"] == "enum":
            kind["symbols"].append(NEW_SYMBOL)
        else:
            kind["fields"].append({"name": "added", "type": ["null", "string"], "default": None})
    return schema


def value_of(schema):
    """A value of a schema with everything filled in: of an enum the newest symbol, of a text one that may be an id."""
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


def resolved(value, reader):
    """What Avro's rules make of a written value, from the specification's words and not from fastavro.

    A field that the reader lacks is gone, one of its own is its default, a symbol that it does not know is UNKNOWN.
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


def body(schema, value):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, parse_schema(schema, {}), value)
    return buffer.getvalue()


def message(schema, value):
    return codec.SINGLE_OBJECT_MARKER + avro.compute_schema_fingerprint(schema) + body(schema, value)


def read(writer, reader, value):
    """A value written with one schema and read with another, by fastavro alone."""
    return fastavro.schemaless_reader(io.BytesIO(body(writer, value)), parse_schema(writer, {}), parse_schema(reader, {}))


def check_both_ways(one, other):
    assert compatibility.find_incompatibilities(one, other) == compatibility.find_incompatibilities(other, one) == []
    for writer, reader in ((one, other), (other, one)):
        value = value_of(writer)
        assert read(writer, reader, value) == resolved(value, reader)


@MODELS
def test_a_newer_version_reads_and_is_read(model):
    assert avro.compute_schema_fingerprint(newer(model)) != avro.compute_schema_fingerprint(avro.get_schema(model))
    check_both_ways(newer(model), avro.get_schema(model))


@MODELS
def test_any_field_with_a_default_may_once_not_have_been_there(model):
    assert optional_fields(model)
    for name in optional_fields(model):
        check_both_ways(older(model, name), avro.get_schema(model))


@MODELS
def test_versions_many_releases_apart_read_each_other(model):
    """Not only neighbours: FULL_TRANSITIVE."""
    released = avro.load_released_schemas()[model.__name__]
    versions = [older(model, *optional_fields(model)), avro.get_schema(model), newer(model), *released]
    for one in versions:
        for other in versions:
            check_both_ways(one, other)


# Our codec as the reader


@pytest.fixture
def release(monkeypatch):
    """Puts one more version among the released ones."""
    shipped = avro.load_released_schemas()

    def add(model, schema):
        monkeypatch.setattr(
            codec, "load_released_schemas", lambda: shipped | {model.__name__: [*shipped[model.__name__], schema]}
        )
        codec.load_writer_schemas.cache_clear()

    yield add
    codec.load_writer_schemas.cache_clear()


@MODELS
def test_our_codec_fills_in_what_an_older_version_lacked(model, release):
    gone = optional_fields(model)
    schema = older(model, *gone)
    release(model, schema)
    record = codec.decode_record(message(schema, value_of(schema)), model)
    assert record.record_id == ID
    for name in gone:
        # Who wrote no time wrote before all who did, and not when it is read.
        default = EPOCH if name == "created_at" else model.model_fields[name].get_default(call_default_factory=True)
        assert getattr(record, name) == default, name


@MODELS
def test_our_codec_reads_a_newer_version_once_it_has_its_schema(model, release):
    schema = newer(model)
    data = message(schema, value_of(schema))
    with pytest.raises(codec.UnknownFingerprint, match="newer version of Charter"):
        codec.decode_record(data, model)
    release(model, schema)
    assert codec.decode_record(data, model) == model.model_validate(resolved(value_of(schema), avro.get_schema(model)))
    assert NEW_SYMBOL not in codec.decode_record(data, model).model_dump_json()


def test_a_symbol_of_the_future_is_unknown(release):
    schema = newer(Prompt)
    release(Prompt, schema)
    assert value_of(schema)["split"] == NEW_SYMBOL
    assert codec.decode_record(message(schema, value_of(schema)), Prompt).split is Split.UNKNOWN


# Old and new code, each in its own process, on one log

CHILD = '''
"""Old or new code, as the schemas first on the path are: writes one record to each topic, or reads all there are."""
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
        for message in read_topic(bus, model.topic):
            try:
                found = codec.decode_record(message.value, model).model_dump(mode="json")
            except codec.RecordError as error:
                found = {"error": str(error)}
            print(json.dumps([model.__name__, found]))
bus.close()
'''
# What a later version of Charter might change: fields of every record, a field of a part, a symbol.
CHANGES = [
    (
        "    latency_ms: float = 0.0\n",
        '    latency_ms: float = 0.0\n    mood: str = "calm"\n    notes: list[ChatMessage] = Field(default_factory=list)\n',
    ),
    ("    role: str\n    content: str\n", '    role: str\n    content: str\n    tone: str = "plain"\n'),
    ('    EVAL = "EVAL"\n', f'    EVAL = "EVAL"\n    {NEW_SYMBOL} = "{NEW_SYMBOL}"\n'),
]


class Code:
    """A copy of our schemas, and processes that run it."""

    def __init__(self, folder, source):
        self.folder = folder
        shutil.copytree(source, folder / "schemas", ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, *arguments):
        environment = os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{avro.SCHEMA_FOLDER.parent}"}
        done = subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def write(self, log, values, registry=""):
        self.run("-c", CHILD, str(log), registry, json.dumps(values))

    def read(self, log, registry=""):
        """Record name -> what was found on its topic, in order."""
        found = {}
        for line in self.run("-c", CHILD, str(log), registry, "").splitlines():
            name, values = json.loads(line)
            found.setdefault(name, []).append(values)
        return found


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return Code(tmp_path_factory.mktemp("old"), avro.SCHEMA_FOLDER)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """The code after `CHANGES`, released and checked by the same commands as every release."""
    code = Code(tmp_path_factory.mktemp("new"), avro.SCHEMA_FOLDER)
    records = code.folder / "schemas" / "records.py"
    text = records.read_text()
    for before, after in CHANGES:
        assert text.count(before) == 1, f"records.py has changed: mend CHANGES ({before!r})"
        text = text.replace(before, after)
    records.write_text(text)
    code.run("-m", "schemas.avro")
    assert "every record reads every released version" in code.run("-m", "schemas.compatibility")
    return code


@pytest.fixture(scope="module")
def prepared(old, new, tmp_path_factory):
    """Old code that was given the new version's released schemas, and nothing else, before new code was started."""
    code = Code(tmp_path_factory.mktemp("prepared"), old.folder / "schemas")
    shutil.copytree(new.folder / "schemas" / "released", code.folder / "schemas" / "released", dirs_exist_ok=True)
    return code


def jsonable(value):
    return json.loads(json.dumps(value, default=lambda part: part.decode() if isinstance(part, bytes) else part.isoformat()))


OLD_VALUES = {model.__name__: jsonable(value_of(avro.get_schema(model))) for model in RECORDS}
OLD_READ = {model.__name__: model.model_validate(OLD_VALUES[model.__name__]).model_dump(mode="json") for model in RECORDS}


def of_the_future(values):
    """The same record as new code writes it, with all that is new."""
    message = {"role": "user", "content": "later", "tone": "loud"}
    future = values | {"mood": "glad", "notes": [message]}
    future |= {"messages": [message]} if "messages" in values else {}
    return future | ({"split": NEW_SYMBOL} if "split" in values else {})


def as_old_code_sees_it(values):
    seen = values | ({"messages": [{"role": "user", "content": "later"}]} if "messages" in values else {})
    return seen | ({"split": "UNKNOWN"} if "split" in values else {})


def as_new_code_sees_it(values):
    seen = values | {"mood": "calm", "notes": []}
    return seen | (
        {"messages": [message | {"tone": "plain"} for message in values["messages"]]} if "messages" in values else {}
    )


NEW_VALUES = {name: of_the_future(values) for name, values in OLD_VALUES.items()}
NEW_READ = {name: of_the_future(values) for name, values in OLD_READ.items()}


@pytest.fixture(scope="module")
def log(old, new, tmp_path_factory):
    """One log on which old and new code took turns."""
    folder = tmp_path_factory.mktemp("log")
    for code, values in ((old, OLD_VALUES), (new, NEW_VALUES), (old, OLD_VALUES)):
        code.write(folder, values)
    return folder


def test_new_code_reads_what_old_code_wrote_and_its_own(new, log):
    found = new.read(log)
    for name, values in OLD_READ.items():
        assert found[name] == [as_new_code_sees_it(values), NEW_READ[name], as_new_code_sees_it(values)]


def test_old_code_names_what_it_cannot_read_and_reads_the_rest(old, log):
    found = old.read(log)
    for name, values in OLD_READ.items():
        first, second, third = found[name]
        assert first == third == values
        assert "unknown schema fingerprint" in second["error"] and "upgrade this process" in second["error"]


def test_old_code_that_was_given_the_new_schemas_reads_everything(prepared, log):
    found = prepared.read(log)
    for name, values in OLD_READ.items():
        assert found[name] == [values, as_old_code_sees_it(values), values]


def test_with_a_registry_old_and_new_code_read_everything(old, new, tmp_path):
    """The registry hands old code the schemas of the future: nothing needs to be given to it first."""
    server = FakeSchemaRegistry()
    try:
        for code, values in ((old, OLD_VALUES), (new, NEW_VALUES)):
            code.write(tmp_path, values, server.url)
        olds, news = old.read(tmp_path, server.url), new.read(tmp_path, server.url)
    finally:
        server.close()
    assert len(server.schemas) == 2 * len(RECORDS)
    for name, values in OLD_READ.items():
        assert olds[name] == [values, as_old_code_sees_it(values)]
        assert news[name] == [as_new_code_sees_it(values), NEW_READ[name]]


def test_a_log_of_both_framings_is_read_by_both(old, prepared, new, tmp_path):
    """A change of bus.framing needs no flag day either."""
    server = FakeSchemaRegistry()
    try:
        old.write(tmp_path, OLD_VALUES)
        new.write(tmp_path, NEW_VALUES, server.url)
        news, olds = new.read(tmp_path, server.url), prepared.read(tmp_path, server.url)
    finally:
        server.close()
    for name, values in OLD_READ.items():
        assert news[name] == [as_new_code_sees_it(values), NEW_READ[name]]
        assert olds[name] == [values, as_old_code_sees_it(values)]
