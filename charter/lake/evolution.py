"""Read rows that were exported with an older version of a record class.

A new field of a record has a default, and older records are read with this default (`schemas.compatibility`). The same holds for
older files of a lake. A field that a record has lost is left out.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from charter.lake.rows import get_lake_schema
from schemas.topics import TopicSpec


def to_current_schema(spec: TopicSpec, rows: pa.Table) -> pa.Table:
    """Return the rows with the columns of the current record class, in their order."""
    schema = get_lake_schema(spec.record_class)
    if rows.schema.equals(schema):
        return rows
    if _list_fields(pa.struct(list(rows.schema))) == _list_fields(pa.struct(list(schema))):
        return rows.select(schema.names).cast(schema)  # a cast alone would set new fields to null
    converted = [_add_defaults(spec.record_class, row) for row in rows.to_pylist(maps_as_pydicts="strict")]
    return pa.Table.from_pylist(converted, schema=schema)


def _list_fields(data_type: pa.DataType) -> Any:
    """Return the names of the fields of a type, at all levels."""
    if pa.types.is_struct(data_type):
        return {field.name: _list_fields(field.type) for field in data_type}
    if pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        return _list_fields(data_type.value_type)
    return None


def _add_defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a record or of a part of it, with the defaults of the fields that it does not have."""
    result = dict(values)
    for name, info in model.model_fields.items():
        if name not in values:
            default = info.get_default(call_default_factory=True)
            result[name] = default.model_dump() if isinstance(default, BaseModel) else default
        elif (part := _find_model(info.annotation)) is not None and values[name] is not None:
            value = values[name]
            result[name] = (
                [_add_defaults(part, item) for item in value] if isinstance(value, list) else _add_defaults(part, value)
            )
    return result


def _find_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model class in the annotation of a field: the class itself, or that of an optional field or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in typing.get_args(annotation) if (model := _find_model(argument))), None)
