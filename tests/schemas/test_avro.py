"""The committed schemas match the record classes, and every version can read every other version."""

import copy
import io
import json

import fastavro
import pytest
from fastavro.schema import parse_schema

from schemas import avro, compatibility
from schemas.records import RECORDS, Prompt


@pytest.mark.parametrize("model", RECORDS, ids=lambda model: model.__name__)
def test_committed_schema_matches_its_class(model):
    schema = avro.get_schema(model)
    assert json.loads((avro.SCHEMA_FOLDER / f"{model.topic}.avsc").read_text()) == schema, "run: python -m schemas.avro"
    released = avro.RELEASED_FOLDER / model.__name__ / f"{avro.compute_schema_fingerprint(schema).hex()}.avsc"
    assert released.exists(), "run: python -m schemas.avro"


def test_released_schemas_are_compatible():
    assert compatibility.check_released_schemas() == []


def check_change(change):
    schema = copy.deepcopy(avro.get_schema(Prompt))
    change(schema)
    return compatibility.find_incompatibilities(avro.get_schema(Prompt), schema)


def test_adding_a_field_with_a_default_is_allowed():
    assert check_change(lambda s: s["fields"].append({"name": "new", "type": "string", "default": ""})) == []


def test_adding_a_field_without_a_default_breaks_new_code():
    assert any(
        "new code" in problem for problem in check_change(lambda s: s["fields"].append({"name": "new", "type": "string"}))
    )


def test_removing_a_field_without_a_default_breaks_old_code():
    def remove_source(schema):
        schema["fields"] = [f for f in schema["fields"] if f["name"] != "source"]

    assert any("old code" in problem for problem in check_change(remove_source))


def test_changing_a_type_breaks_both():
    def change_source_type(schema):
        next(f for f in schema["fields"] if f["name"] == "source")["type"] = "long"

    assert len(check_change(change_source_type)) == 2


def test_new_enum_symbol_reads_as_unknown_in_old_code():
    def add_symbol(schema):
        next(f for f in schema["fields"] if f["name"] == "split")["type"]["symbols"].append("TEST")

    assert check_change(add_symbol) == []
    new = copy.deepcopy(avro.get_schema(Prompt))
    add_symbol(new)
    values = {"record_id": "x", "run_id": "r", "stage": "s", "messages": [], "source": "x", "split": "TEST"}
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, parse_schema(new, {}), values)
    buffer.seek(0)
    values = fastavro.schemaless_reader(buffer, parse_schema(new, {}), parse_schema(avro.get_schema(Prompt), {}))
    assert values["split"] == "UNKNOWN"
