"""A token endpoint for client credentials on the loopback interface."""

import base64
import json
import ssl
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qs, unquote_plus


class FakeTokenServer:
    """Answers each request with `answer`: a status, a body, and headers. `requests` has the form and the login of each request."""

    def __init__(self, certificate=None):
        self.requests, self.answer = [], (200, {}, {})
        self.server = ThreadingTCPServer(("127.0.0.1", 0), partial(_TokenHandler, self))
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server.server_address[1]}/token"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _TokenHandler(BaseHTTPRequestHandler):
    wbufsize = -1  # send headers and body in one packet: otherwise the body waits for the acknowledgment of the headers

    def __init__(self, server, *arguments):
        self.token_server = server
        super().__init__(*arguments)

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        login = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        self.token_server.requests.append(
            (
                {name: values[0] for name, values in parse_qs(form).items()},
                tuple(unquote_plus(part) for part in login.split(":")),
            )
        )
        status, body, headers = self.token_server.answer
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
