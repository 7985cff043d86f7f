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

from schemas.avro import NAMESPACE, schema_of
from schemas.codec import MAGIC, ForeignSchema, RecordError, UnknownSchemaId, current_schema
from schemas.records import RECORDS, Record

if TYPE_CHECKING:
    import httpx

CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1024 * 1024  # our largest schema has about 10,000
SCHEMA_NOT_FOUND = 40403
REFUSALS = (409, 422)  # incompatible with the subject's versions; no valid schema, or a registry that is read-only
REMEMBER_REFUSED_S = 60.0
REMEMBER_REFUSED = 1000
LEAST = {"null": 0, "boolean": 1, "int": 1, "long": 1, "float": 4, "double": 8, "bytes": 1, "string": 1}  # bytes of a value
BY_NAME = {f"{NAMESPACE}.{model.__name__}": model for model in RECORDS}


class RegistryError(Exception):
    """Something about the registry: what, why, and what to do."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class RegistryUnreachable(RegistryError):
    """The registry does not answer, or not as one: no fault of a record's, and it may pass."""


class SchemaRefused(RegistryError):
    """The registry will not take a schema of ours."""


class Registry:
    """A client of the registry at `url`, usable by many threads.

    `login` is USER:PASSWORD, the value of an environment variable, and appears in no error. `prefix` is the bus's, for the
    subjects are those of the topics' real names. `away` makes the error of a registry that cannot be asked.
    """

    def __init__(
        self,
        url: str,
        *,
        login: str = "",
        prefix: str = "",
        timeout_s: float = TIMEOUT_S,
        away: Callable[[str, str, str], Exception] = RegistryUnreachable,
    ) -> None:
        self.url, self.prefix, self.timeout_s, self.away = checked(url), prefix, timeout_s, away
        self._client = client_of(login, timeout_s)
        self._headers: dict[type[Record], bytes] = {}
        self._writers: dict[int, tuple[type[Record], Any]] = {}
        self._refused: dict[int, tuple[float, Callable[[], RecordError]]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._client.close()

    # Writing

    def header(self, model: type[Record]) -> bytes:
        """The first five bytes of a message with this record; its schema is registered when first asked for."""
        found = self._headers.get(model)
        return self._registered(model) if found is None else found

    def _registered(self, model: type[Record]) -> bytes:
        with self._lock:
            if model not in self._headers:
                schema_id = self._register(model)
                self._writers[schema_id] = (model, current_schema(model))
                self._headers[model] = MAGIC + struct.pack(">I", schema_id)
            return self._headers[model]

    def _register(self, model: type[Record]) -> int:
        subject = f"{self.prefix}{model.topic}-value"
        path = f"/subjects/{quote(subject, safe='')}/versions"
        status, answer = self._ask("POST", path, {"schema": json.dumps(schema_of(model))})
        if status in REFUSALS:
            raise SchemaRefused(
                f"the schema registry {self.url} refuses the schema of {model.__name__} ({status})",
                said(answer),
                f"look at the versions and the compatibility of its subject {subject}",
            )
        schema_id = answer.get("id")
        if status not in (200, 201) or type(schema_id) is not int or not 0 <= schema_id < 2**32:
            raise self._nonsense(f"{status} and no schema id to a schema of {model.__name__}")
        if self._writers.get(schema_id, (model,))[0] is not model:
            raise self._nonsense(f"the id {schema_id} to schemas of two records")
        return schema_id

    # Reading

    def writer(self, schema_id: int) -> tuple[type[Record], Any]:
        """The record class and the writer's parsed schema of an id, from memory or from the registry."""
        found = self._writers.get(schema_id)
        return self._asked(schema_id) if found is None else found

    def _asked(self, schema_id: int) -> tuple[type[Record], Any]:
        """Ask for an id. A refusal is remembered for a minute, lest a topic full of them is as many requests."""
        until, refusal = self._refused.get(schema_id, (0.0, None))
        if refusal is not None and time.monotonic() < until:
            raise refusal()
        try:
            found = self._fetch(schema_id)
        except RecordError as error:
            if len(self._refused) >= REMEMBER_REFUSED:
                self._refused.clear()
            self._refused[schema_id] = (time.monotonic() + REMEMBER_REFUSED_S, partial(type(error), *error.args))
            raise
        return self._writers.setdefault(schema_id, found)

    def _fetch(self, schema_id: int) -> tuple[type[Record], Any]:
        status, answer = self._ask("GET", f"/schemas/ids/{schema_id}")
        if status == 404 and answer.get("error_code") == SCHEMA_NOT_FOUND:
            raise UnknownSchemaId(
                f"the schema registry has no schema {schema_id}",
                f"the message was written with another registry than {self.url}, or by another program",
                "look at the message with `charter tail --raw`",
            )
        if status != 200 or not isinstance(answer.get("schema"), str):
            raise self._nonsense(f"{status} and no schema to the id {schema_id}")
        return writer_of(schema_id, answer)

    # Requests

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """The status and the JSON object of an answer; whatever else comes is the registry's fault."""
        import httpx

        try:
            status, data = self._exchange(method, path, body)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise self.away(
                f"the schema registry {self.url} does not answer",
                type(error).__name__,
                "look at the registry and at bus.schema_registry; work goes on when it is back",
            ) from None  # the request inside has the login among its headers
        if status in (401, 403):
            raise self.away(
                f"the schema registry {self.url} refuses the login ({status})",
                "",
                "check the variable that bus.schema_registry_auth_env names, and what its user may do",
            )
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._nonsense(f"{status} and no JSON object")
        return status, answer

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """One request. Its timeout bounds each step of it, so the whole has one too; so has the answer's size."""
        deadline, data = time.monotonic() + self.timeout_s, b""
        with self._client.stream(method, self.url + path, json=body) as response:
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise self._nonsense(f"more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return response.status_code, data

    def _nonsense(self, found: str) -> Exception:
        return self.away(
            f"{self.url} does not answer like a schema registry",
            f"it gave {found}",
            "check bus.schema_registry: the URL of a Confluent-compatible registry, with its path if it has one",
        )


def checked(url: str) -> str:
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


def client_of(login: str, timeout_s: float) -> httpx.Client:
    """An HTTP client that follows no redirect (it would carry the login along) and takes nothing compressed."""
    import httpx

    user, colon, password = login.partition(":")
    if login and not (colon and login.isprintable()):  # an unprintable one would fail inside, and be quoted
        raise ValueError("the schema registry's login must be USER:PASSWORD")
    headers = {"Accept": f"{CONTENT_TYPE}, application/json", "Accept-Encoding": "identity", "Content-Type": CONTENT_TYPE}
    return httpx.Client(auth=(user, password) if login else None, headers=headers, timeout=timeout_s, follow_redirects=False)


def said(answer: dict[str, Any]) -> str:
    """The registry's words, short and on one line."""
    return "".join(c if c.isprintable() else " " for c in str(answer.get("message", ""))[:300])


# Schemas of other programs


def writer_of(schema_id: int, answer: dict[str, Any]) -> tuple[type[Record], Any]:
    """The record class and parsed schema in the registry's answer; ForeignSchema if it is none that we can read."""
    if (answer.get("schemaType") or "AVRO") != "AVRO":  # Avro's goes without saying
        raise foreign(schema_id, f"it is of the type {str(answer['schemaType'])[:50]!r}, not Avro")
    if answer.get("references"):
        raise foreign(schema_id, "it refers to other schemas of the registry; ours are whole")
    named: dict[str, Any] = {}
    try:
        schema = parse_schema(plain(answer["schema"]), named)
        least_bytes(schema, named, {})
        model = BY_NAME.get(schema["name"])
    except UNPARSEABLE as error:
        raise foreign(schema_id, f"{type(error).__name__}: {str(error)[:200]}") from None
    if model is None:
        raise foreign(schema_id, f"it is the schema of {schema['name'][:100]!r}")
    return model, schema


def plain(text: str) -> dict[str, Any]:
    """A record's schema as JSON, without the mark by which fastavro takes one as parsed already."""
    schema = json.loads(text)
    if not isinstance(schema, dict) or schema.get("type") != "record" or any(name.startswith("__") for name in schema):
        raise TypeError("it is not the schema of a record")
    return schema


# What json and fastavro raise of a schema that is none.
UNPARSEABLE = (SchemaParseException, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def foreign(schema_id: int, why: str) -> ForeignSchema:
    return ForeignSchema(
        f"the registry's schema {schema_id} is none of a Charter record",
        why,
        "another program writes to this topic, or a newer version of Charter: upgrade, or look with `charter tail --raw`",
    )


def least_bytes(schema: Any, named: dict[str, Any], known: dict[str, int | None]) -> int:
    """The fewest bytes that a value of a parsed schema takes.

    Refuses, with a TypeError, a record inside itself (fastavro would follow it down until the stack is gone) and items of no
    bytes (eight bytes could announce 2**60 of them). `known` holds the records seen, None for those still open.
    """
    if isinstance(schema, list):
        for branch in schema:
            least_bytes(branch, named, known)
        return 1
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind in LEAST:
        return LEAST[kind]
    schema = named.get(kind, schema)
    kind = schema["type"]
    if kind in ("record", "error"):
        return least_record(schema, named, known)
    if kind == "fixed":
        return max(0, int(schema["size"]))
    if kind == "array" and least_bytes(schema["items"], named, known) == 0:
        raise TypeError("it has an array of items that take no bytes")
    if kind == "map":
        least_bytes(schema["values"], named, known)
    return 1


def least_record(schema: Any, named: dict[str, Any], known: dict[str, int | None]) -> int:
    name = schema["name"]
    if name not in known:
        known[name] = None
        known[name] = sum(least_bytes(field["type"], named, known) for field in schema["fields"])
    least = known[name]
    if not least:
        raise TypeError(f"the record {str(name)[:100]} " + ("is inside itself" if least is None else "takes no bytes"))
    return least
