"""A schema registry on the loopback interface with the endpoints that Charter's client uses."""

import contextlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

FIRST_SCHEMA_ID = 258  # its two bytes differ, so a test sees a wrong byte order
REGISTRY_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


class FakeSchemaRegistry:
    """A fake schema registry. If `answer` is set, every request gets this response instead."""

    def __init__(self):
        self.schemas, self.requests, self.answer = {}, [], None
        # Not http.server.HTTPServer: it looks up its host name in the network.
        self.server = ThreadingTCPServer(("127.0.0.1", 0), partial(_SchemaRegistryHandler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def register_schema(self, schema):
        """Return the id of a schema; the same text always gets the same id."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        ids = {schema: schema_id for schema_id, schema in self.schemas.items()}
        return ids.get(text) or self.put_schema(FIRST_SCHEMA_ID + len(self.schemas), text)

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
    wbufsize = -1  # send headers and body in one packet: otherwise the body waits for the acknowledgment of the headers

    def __init__(self, registry, *arguments):
        self.registry = registry
        super().__init__(*arguments)

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.registry.authorization = self.headers.get("Authorization")
        self.registry.content_type = self.headers.get("Content-Type")
        status, response = self.registry.answer_request(self.command, self.path, body)
        data = response if isinstance(response, bytes) else json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", REGISTRY_CONTENT_TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client may close the connection early
            self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass
