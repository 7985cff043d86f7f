"""The Confluent wire format (a zero byte, a 4-byte big-endian schema id, the Avro body) and a client of the schema registry.

`SchemaRegistryClient` is a small client of a Confluent-compatible Schema Registry. It registers the schema of each record under
the subject `<topic>-value`, and fetches schemas by their id. The client caches ids and schemas, because the schema of an id
never changes. Ids and schemas from the registry are not trusted, because other programs can also write there. A schema is used
only if it has the full name of a Charter record. A schema is rejected if a few bytes of data with it could cause unlimited
work.

    RecordError (schemas.codec)    the record cannot be decoded (UnknownSchemaId or ForeignSchema)
    RegistryUnreachable            the registry is unreachable, rejects the credentials or sends invalid responses; retry later
    SchemaRejected                 the registry rejects a schema of Charter; check the subject in the registry

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
from schemas.http_client import create_http_client
from schemas.records import RECORDS, Record

if TYPE_CHECKING:
    import httpx

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_TIMEOUT_S = 10.0
MAX_RESPONSE_BYTES = 1024 * 1024  # the largest schema of Charter has about 10,000 bytes
_SCHEMA_NOT_FOUND_CODE = 40403
# 409 means that the schema is incompatible with earlier versions. 422 means an invalid schema or a read-only registry.
_REJECTED_STATUSES = (409, 422)
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
}  # minimum number of bytes of a value
_RECORDS_BY_NAME = {f"{NAMESPACE}.{model.__name__}": model for model in RECORDS}


class RegistryError(Exception):
    """An error of the schema registry. The message has three lines: what happened, why, and what to do."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class RegistryUnreachable(RegistryError):
    """The registry is unreachable or its response is invalid. A later request may succeed. Records remain valid."""


class SchemaRejected(RegistryError):
    """The registry rejects a schema of Charter."""


class SchemaRegistryClient:
    """A thread-safe client of the registry at `url`.

    `credentials` has the form USER:PASSWORD. Error messages do not contain it. `prefix` is the topic prefix of the bus; the
    subjects in the registry have the same prefix. `make_unreachable_error` creates the error for an unreachable registry.
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
        """Return the first five bytes of every encoded record of a class. The first call for a class registers its schema."""
        header = self._headers.get(model)
        return self._get_or_register(model) if header is None else header

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
        status, response = self._request_json("POST", path, {"schema": json.dumps(get_schema(model))})
        if status in _REJECTED_STATUSES:
            raise SchemaRejected(
                f"the schema registry {self.url} rejects the schema of {model.__name__} (status {status})",
                _format_message(response),
                f"check the versions and the compatibility setting of the subject {subject}",
            )
        schema_id = response.get("id")
        if status not in (200, 201) or type(schema_id) is not int or not 0 <= schema_id < 2**32:
            raise self._make_bad_response_error(f"status {status} without a schema id for the schema of {model.__name__}")
        if self._writer_schemas.get(schema_id, (model,))[0] is not model:
            raise self._make_bad_response_error(f"the id {schema_id} for the schemas of two record classes")
        return schema_id

    # Reading

    def get_writer_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        """Return the record class and the parsed schema of a schema id, from the cache or from the registry."""
        entry = self._writer_schemas.get(schema_id)
        return self._get_or_fetch(schema_id) if entry is None else entry

    def _get_or_fetch(self, schema_id: int) -> tuple[type[Record], Any]:
        """Return the record class and the schema of an id that is not in the cache.

        A RecordError is cached for a minute. Many records with the same invalid id therefore cause only one request per minute.
        """
        expires_at, make_error = self._rejections.get(schema_id, (0.0, None))
        if make_error is not None and time.monotonic() < expires_at:
            raise make_error()
        try:
            entry = self._fetch_schema(schema_id)
        except RecordError as error:
            if len(self._rejections) >= REJECTION_CACHE_SIZE:
                self._rejections.clear()
            self._rejections[schema_id] = (time.monotonic() + _REJECTION_CACHE_TTL_S, partial(type(error), *error.args))
            raise
        return self._writer_schemas.setdefault(schema_id, entry)

    def _fetch_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        status, response = self._request_json("GET", f"/schemas/ids/{schema_id}")
        if status == 404 and response.get("error_code") == _SCHEMA_NOT_FOUND_CODE:
            raise UnknownSchemaId(
                f"the schema registry has no schema {schema_id}",
                f"the record was written with another registry than {self.url}, or by another program",
                "inspect the record with `charter tail --raw`",
            )
        if status != 200 or not isinstance(response.get("schema"), str):
            raise self._make_bad_response_error(f"status {status} without a schema for the id {schema_id}")
        return _parse_writer_schema(schema_id, response)

    # Requests

    def _request_json(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Send a request and return the status and the JSON object of the response. Raise an error for any other response."""
        import httpx

        try:
            status, data = self._send_request(method, path, body)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise self.make_unreachable_error(
                f"the schema registry {self.url} is unreachable",
                type(error).__name__,
                "check the registry and bus.schema_registry; work continues when the registry is available again",
            ) from None  # the original error contains the request, and its headers contain the credentials
        if status in (401, 403):
            raise self.make_unreachable_error(
                f"the schema registry {self.url} rejects the credentials (status {status})",
                "",
                "check the variable named by bus.schema_registry_auth_env, and the permissions of the user",
            )
        try:
            response = json.loads(data)
        except (ValueError, RecursionError):
            response = None
        if not isinstance(response, dict):
            raise self._make_bad_response_error(f"status {status} without a JSON object")
        return status, response

    def _send_request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Send a request. Limit the total time and the size of the response. (The client's timeout limits only each step.)"""
        deadline, data = time.monotonic() + self.timeout_s, b""
        with self._client.stream(method, self.url + path, json=body) as response:
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MAX_RESPONSE_BYTES:
                    raise self._make_bad_response_error(f"more than {MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return response.status_code, data

    def _make_bad_response_error(self, description: str) -> Exception:
        return self.make_unreachable_error(
            f"{self.url} does not respond like a schema registry",
            f"the response was {description}",
            "set bus.schema_registry to the URL of a Confluent-compatible registry, including its path",
        )


def _check_url(url: str) -> str:
    """Return the URL without a trailing slash. Reject a URL with credentials, because settings are printed and recorded."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("the URL of the schema registry must be http://HOST:PORT or https://HOST:PORT")
    if "@" in parts.netloc:
        raise ValueError(
            "the URL of the schema registry must not contain credentials: put USER:PASSWORD into an environment variable"
        )
    if parts.query or parts.fragment:
        raise ValueError("the URL of the schema registry must not have a query or a fragment")
    return url.rstrip("/")


def _create_client(credentials: str, timeout_s: float) -> httpx.Client:
    """Create an HTTP client without compressed responses and without redirects. A redirect would forward the credentials."""
    user, colon, password = credentials.partition(":")
    # If the credentials have unprintable characters, httpx raises an error whose message contains the credentials.
    if credentials and not (colon and credentials.isprintable()):
        raise ValueError("the credentials of the schema registry must be USER:PASSWORD")
    headers = {"Accept": f"{_CONTENT_TYPE}, application/json", "Accept-Encoding": "identity", "Content-Type": _CONTENT_TYPE}
    return create_http_client(
        auth=(user, password) if credentials else None, headers=headers, timeout=timeout_s, follow_redirects=False
    )


def _format_message(response: dict[str, Any]) -> str:
    """Return the registry's error message, shortened and on one line."""
    return "".join(c if c.isprintable() else " " for c in str(response.get("message", ""))[:300])


# Schemas of other programs


def _parse_writer_schema(schema_id: int, response: dict[str, Any]) -> tuple[type[Record], Any]:
    """Return the record class and the parsed schema in a response. Raise ForeignSchema if the schema cannot be used."""
    if (response.get("schemaType") or "AVRO") != "AVRO":  # the type is omitted for Avro
        raise _make_foreign_schema_error(schema_id, f"it is of the type {str(response['schemaType'])[:50]!r}, not Avro")
    if response.get("references"):
        raise _make_foreign_schema_error(schema_id, "it refers to other schemas, but Charter's schemas do not")
    named: dict[str, Any] = {}
    try:
        schema = parse_schema(_load_record_schema(response["schema"]), named)
        _compute_min_bytes(schema, named, {})
        model = _RECORDS_BY_NAME.get(schema["name"])
    except _SCHEMA_ERRORS as error:
        raise _make_foreign_schema_error(schema_id, f"{type(error).__name__}: {str(error)[:200]}") from None
    if model is None:
        raise _make_foreign_schema_error(schema_id, f"it is the schema of {schema['name'][:100]!r}")
    return model, schema


def _load_record_schema(text: str) -> dict[str, Any]:
    """Parse the JSON text of a record schema. Reject keys that begin with `__`, because fastavro then skips the validation."""
    schema = json.loads(text)
    if not isinstance(schema, dict) or schema.get("type") != "record" or any(name.startswith("__") for name in schema):
        raise TypeError("it is not the schema of a record")
    return schema


# json and fastavro raise these errors for an invalid schema.
_SCHEMA_ERRORS = (SchemaParseException, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def _make_foreign_schema_error(schema_id: int, reason: str) -> ForeignSchema:
    return ForeignSchema(
        f"the schema {schema_id} of the registry is not the schema of a Charter record",
        reason,
        "another program or a newer version of Charter writes to this topic: upgrade, or inspect it with `charter tail --raw`",
    )


def _compute_min_bytes(schema: Any, named_schemas: dict[str, Any], min_bytes_by_record: dict[str, int | None]) -> int:
    """Return the minimum number of bytes of a value of a parsed schema.

    Raise TypeError for a recursive record, because fastavro recurses until the stack overflows. Raise TypeError for an array
    whose items have no bytes, because eight bytes of data could then specify 2**60 items. `min_bytes_by_record` contains the
    records visited so far. While a record is visited, its value is None.
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
        raise TypeError("it has an array of items without bytes")
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
    min_bytes = min_bytes_by_record[name]
    if not min_bytes:
        raise TypeError(f"the record {str(name)[:100]} " + ("contains itself" if min_bytes is None else "has no bytes"))
    return min_bytes
