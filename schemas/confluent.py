"""The Confluent wire format: a zero byte, a 4-byte big-endian schema id, the Avro body; and the registry that knows the ids.

`Registry` is a small client of a Confluent-compatible Schema Registry. It registers the schema of a record under the subject
`<topic>-value` and asks for the schema of an id; both are remembered, for an id never changes its meaning. Ids come from
messages and schemas from another program, so neither is trusted: a schema is read only if it is one of a record of ours by
its full name, and could not make a few bytes stand for endless work.

    RecordError (schemas.codec)    the record's fault: UnknownSchemaId, ForeignSchema
    RegistryUnreachable            the registry is away, refuses our login or answers nonsense: try again later
    SchemaRefused                  the registry will not have a schema of ours: a person must look at its subject

Source: Confluent documentation, "Wire format" and "Schema Registry API Reference".
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from fastavro.schema import SchemaParseException, parse_schema

from schemas.avro import NAMESPACE, get_schema
from schemas.codec import CONFLUENT_MAGIC, ForeignSchema, RecordError, UnknownSchemaId, get_parsed_schema
from schemas.records import RECORDS, Record

if TYPE_CHECKING:
    import httpx

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_TIMEOUT_S = 10.0
MAX_RESPONSE_BYTES = 1024 * 1024  # our largest schema has about 10,000
_SCHEMA_NOT_FOUND_CODE = 40403
_REJECTED_STATUSES = (409, 422)  # incompatible with the subject's versions; no valid schema, or a registry that is read-only
_REJECTION_CACHE_TTL_S = 60.0
REJECTION_CACHE_SIZE = 1000
_MIN_BYTES_BY_TYPE = {
    "null": 0,
    "boolean": 1,
    "int": 1,
    "long": 1,
    "float": 4,
    "double": 8,
    "bytes": 1,
    "string": 1,
}  # bytes of a value
_RECORDS_BY_NAME = {f"{NAMESPACE}.{model.__name__}": model for model in RECORDS}


class RegistryError(Exception):
    """Something about the registry: what, why, and what to do."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class RegistryUnreachable(RegistryError):
    """The registry does not answer, or not as one: no fault of a record's, and it may pass."""


class SchemaRejected(RegistryError):
    """The registry will not take a schema of ours."""


class SchemaRegistryClient:
    """A client of the registry at `url`, usable by many threads.

    `login` is USER:PASSWORD, the value of an environment variable, and appears in no error. `prefix` is the bus's, for the
    subjects are those of the topics' real names. `away` makes the error of a registry that cannot be asked.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: str = "",
        prefix: str = "",
        timeout_s: float = _TIMEOUT_S,
        make_unreachable_error: Callable[[str, str, str], Exception] = RegistryUnreachable,
    ) -> None:
        self.url, self.prefix, self.timeout_s, self.make_unreachable_error = (
            _check_url(url),
            prefix,
            timeout_s,
            make_unreachable_error,
        )
        self._client = _create_client(credentials, timeout_s)
        self._headers: dict[type[Record], bytes] = {}
        self._writer_schemas: dict[int, tuple[type[Record], Any]] = {}
        self._rejections: dict[int, tuple[float, Callable[[], RecordError]]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._client.close()

    # Writing

    def get_header(self, model: type[Record]) -> bytes:
        """The first five bytes of a message with this record; its schema is registered when first asked for."""
        found = self._headers.get(model)
        return self._get_or_register(model) if found is None else found

    def _get_or_register(self, model: type[Record]) -> bytes:
        with self._lock:
            if model not in self._headers:
                schema_id = self._register_schema(model)
                self._writer_schemas[schema_id] = (model, get_parsed_schema(model))
                self._headers[model] = CONFLUENT_MAGIC + struct.pack(">I", schema_id)
            return self._headers[model]

    def _register_schema(self, model: type[Record]) -> int:
        subject = f"{self.prefix}{model.topic}-value"
        path = f"/subjects/{quote(subject, safe='')}/versions"
        status, answer = self._request_json("POST", path, {"schema": json.dumps(get_schema(model))})
        if status in _REJECTED_STATUSES:
            raise SchemaRejected(
                f"the schema registry {self.url} refuses the schema of {model.__name__} ({status})",
                _format_message(answer),
                f"look at the versions and the compatibility of its subject {subject}",
            )
        schema_id = answer.get("id")
        if status not in (200, 201) or type(schema_id) is not int or not 0 <= schema_id < 2**32:
            raise self._make_bad_response_error(f"{status} and no schema id to a schema of {model.__name__}")
        if self._writer_schemas.get(schema_id, (model,))[0] is not model:
            raise self._make_bad_response_error(f"the id {schema_id} to schemas of two records")
        return schema_id

    # Reading

    def get_writer_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        """The record class and the writer's parsed schema of an id, from memory or from the registry."""
        found = self._writer_schemas.get(schema_id)
        return self._get_or_fetch(schema_id) if found is None else found

    def _get_or_fetch(self, schema_id: int) -> tuple[type[Record], Any]:
        """Ask for an id. A refusal is remembered for a minute, lest a topic full of them is as many requests."""
        until, refusal = self._rejections.get(schema_id, (0.0, None))
        if refusal is not None and time.monotonic() < until:
            raise refusal()
        try:
            found = self._fetch_schema(schema_id)
        except RecordError as error:
            if len(self._rejections) >= REJECTION_CACHE_SIZE:
                self._rejections.clear()
            self._rejections[schema_id] = (time.monotonic() + _REJECTION_CACHE_TTL_S, partial(type(error), *error.args))
            raise
        return self._writer_schemas.setdefault(schema_id, found)

    def _fetch_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        status, answer = self._request_json("GET", f"/schemas/ids/{schema_id}")
        if status == 404 and answer.get("error_code") == _SCHEMA_NOT_FOUND_CODE:
            raise UnknownSchemaId(
                f"the schema registry has no schema {schema_id}",
                f"the message was written with another registry than {self.url}, or by another program",
                "look at the message with `charter tail --raw`",
            )
        if status != 200 or not isinstance(answer.get("schema"), str):
            raise self._make_bad_response_error(f"{status} and no schema to the id {schema_id}")
        return _parse_writer_schema(schema_id, answer)

    # Requests

    def _request_json(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """The status and the JSON object of an answer; whatever else comes is the registry's fault."""
        import httpx

        try:
            status, data = self._send_request(method, path, body)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise self.make_unreachable_error(
                f"the schema registry {self.url} does not answer",
                type(error).__name__,
                "look at the registry and at bus.schema_registry; work goes on when it is back",
            ) from None  # the request inside has the login among its headers
        if status in (401, 403):
            raise self.make_unreachable_error(
                f"the schema registry {self.url} refuses the login ({status})",
                "",
                "check the variable that bus.schema_registry_auth_env names, and what its user may do",
            )
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._make_bad_response_error(f"{status} and no JSON object")
        return status, answer

    def _send_request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """One request. Its timeout bounds each step of it, so the whole has one too; so has the answer's size."""
        deadline, data = time.monotonic() + self.timeout_s, b""
        with self._client.stream(method, self.url + path, json=body) as response:
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MAX_RESPONSE_BYTES:
                    raise self._make_bad_response_error(f"more than {MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return response.status_code, data

    def _make_bad_response_error(self, found: str) -> Exception:
        return self.make_unreachable_error(
            f"{self.url} does not answer like a schema registry",
            f"it gave {found}",
            "check bus.schema_registry: the URL of a Confluent-compatible registry, with its path if it has one",
        )


def _check_url(url: str) -> str:
    """The registry's address. One with a login inside is refused: settings are shown and recorded."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("the schema registry's URL must be http://HOST:PORT or https://HOST:PORT")
    if "@" in parts.netloc:
        raise ValueError("the schema registry's URL must have no login in it: put USER:PASSWORD into the variable for it")
    if parts.query or parts.fragment:
        raise ValueError("the schema registry's URL must end with its path")
    return url.rstrip("/")


def _create_client(credentials: str, timeout_s: float) -> httpx.Client:
    """An HTTP client that follows no redirect (it would carry the login along) and takes nothing compressed."""
    import httpx

    user, colon, password = credentials.partition(":")
    if credentials and not (colon and credentials.isprintable()):  # an unprintable one would fail inside, and be quoted
        raise ValueError("the schema registry's login must be USER:PASSWORD")
    headers = {"Accept": f"{_CONTENT_TYPE}, application/json", "Accept-Encoding": "identity", "Content-Type": _CONTENT_TYPE}
    return httpx.Client(
        auth=(user, password) if credentials else None, headers=headers, timeout=timeout_s, follow_redirects=False
    )


def _format_message(answer: dict[str, Any]) -> str:
    """The registry's words, short and on one line."""
    return "".join(c if c.isprintable() else " " for c in str(answer.get("message", ""))[:300])


# Schemas of other programs


def _parse_writer_schema(schema_id: int, answer: dict[str, Any]) -> tuple[type[Record], Any]:
    """The record class and parsed schema in the registry's answer; ForeignSchema if it is none that we can read."""
    if (answer.get("schemaType") or "AVRO") != "AVRO":  # Avro's goes without saying
        raise _make_foreign_schema_error(schema_id, f"it is of the type {str(answer['schemaType'])[:50]!r}, not Avro")
    if answer.get("references"):
        raise _make_foreign_schema_error(schema_id, "it refers to other schemas of the registry; ours are whole")
    named: dict[str, Any] = {}
    try:
        schema = parse_schema(_load_record_schema(answer["schema"]), named)
        _compute_min_bytes(schema, named, {})
        model = _RECORDS_BY_NAME.get(schema["name"])
    except _SCHEMA_ERRORS as error:
        raise _make_foreign_schema_error(schema_id, f"{type(error).__name__}: {str(error)[:200]}") from None
    if model is None:
        raise _make_foreign_schema_error(schema_id, f"it is the schema of {schema['name'][:100]!r}")
    return model, schema


def _load_record_schema(text: str) -> dict[str, Any]:
    """A record's schema as JSON, without the mark by which fastavro takes one as parsed already."""
    schema = json.loads(text)
    if not isinstance(schema, dict) or schema.get("type") != "record" or any(name.startswith("__") for name in schema):
        raise TypeError("it is not the schema of a record")
    return schema


# What json and fastavro raise of a schema that is none.
_SCHEMA_ERRORS = (SchemaParseException, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def _make_foreign_schema_error(schema_id: int, reason: str) -> ForeignSchema:
    return ForeignSchema(
        f"the registry's schema {schema_id} is none of a Charter record",
        reason,
        "another program writes to this topic, or a newer version of Charter: upgrade, or look with `charter tail --raw`",
    )


def _compute_min_bytes(schema: Any, named_schemas: dict[str, Any], min_bytes_by_record: dict[str, int | None]) -> int:
    """The fewest bytes that a value of a parsed schema takes.

    Refuses, with a TypeError, a record inside itself (fastavro would follow it down until the stack is gone) and items of no
    bytes (eight bytes could announce 2**60 of them). `known` holds the records seen, None for those still open.
    """
    if isinstance(schema, list):
        for branch in schema:
            _compute_min_bytes(branch, named_schemas, min_bytes_by_record)
        return 1
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind in _MIN_BYTES_BY_TYPE:
        return _MIN_BYTES_BY_TYPE[kind]
    schema = named_schemas.get(kind, schema)
    kind = schema["type"]
    if kind in ("record", "error"):
        return _compute_min_record_bytes(schema, named_schemas, min_bytes_by_record)
    if kind == "fixed":
        return max(0, int(schema["size"]))
    if kind == "array" and _compute_min_bytes(schema["items"], named_schemas, min_bytes_by_record) == 0:
        raise TypeError("it has an array of items that take no bytes")
    if kind == "map":
        _compute_min_bytes(schema["values"], named_schemas, min_bytes_by_record)
    return 1


def _compute_min_record_bytes(schema: Any, named_schemas: dict[str, Any], min_bytes_by_record: dict[str, int | None]) -> int:
    name = schema["name"]
    if name not in min_bytes_by_record:
        min_bytes_by_record[name] = None
        min_bytes_by_record[name] = sum(
            _compute_min_bytes(field["type"], named_schemas, min_bytes_by_record) for field in schema["fields"]
        )
    least = min_bytes_by_record[name]
    if not least:
        raise TypeError(f"the record {str(name)[:100]} " + ("is inside itself" if least is None else "takes no bytes"))
    return least
