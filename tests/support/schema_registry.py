"""A schema registry for tests, on the loopback: as much of one as our client asks for."""

import contextlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

FIRST_SCHEMA_ID = 258  # two bytes that differ, so that their order shows
REGISTRY_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


class FakeSchemaRegistry:
    """As much of a schema registry as the client asks for. `answer`, when set, is given to every request instead."""

    def __init__(self):
        self.schemas, self.requests, self.answer = {}, [], None
        # Not http.server's: that one asks the network for its own name.
        self.server = ThreadingTCPServer(("127.0.0.1", 0), partial(_SchemaRegistryHandler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def register_schema(self, schema):
        """The id of a schema; the same one for the same text."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        known = {schema: schema_id for schema_id, schema in self.schemas.items()}
        return known.get(text) or self.put_schema(FIRST_SCHEMA_ID + len(self.schemas), text)

    def put_schema(self, schema_id, text):
        self.schemas[schema_id] = text
        return schema_id

    def answer_request(self, method, path, body):
        self.requests.append((method, path, body))
        if self.answer is not None:
            return self.answer
        if method == "POST":
            return 200, {"id": self.register_schema(body["schema"])}
        schema = self.schemas.get(int(path.rsplit("/", 1)[1]))
        missing = (404, {"error_code": 40403, "message": "Schema not found"})
        return (200, {"schema": schema}) if schema is not None else missing


class _SchemaRegistryHandler(BaseHTTPRequestHandler):
    wbufsize = -1  # head and body together: apart, the second waits for the first's acknowledgement

    def __init__(self, registry, *arguments):
        self.registry = registry
        super().__init__(*arguments)

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.registry.authorization = self.headers.get("Authorization")
        self.registry.content_type = self.headers.get("Content-Type")
        status, answer = self.registry.answer_request(self.command, self.path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", REGISTRY_CONTENT_TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has heard enough
            self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass
