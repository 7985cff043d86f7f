"""A loopback server that speaks just enough of the chat-completions API to behave, or to misbehave, as a test says."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT = None  # an answer: the connection is cut


class Server:
    """Answers what `script` says: a function from (number of the request, request) to (status, body[, headers]) or CUT.

    A body is bytes, an object for JSON, or an iterator of bytes that trickle in. `lists` are the models that it names."""

    def __init__(self, lists=()):
        self.requests, self.keys, self.lock, self.busy, self.most = [], [], threading.Lock(), 0, 0
        self.lists = {"data": [{"id": name} for name in lists]}
        self.script = lambda number, request: (200, chat("fine"))
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.http.handle_error = lambda *_: None  # clients that hung up are what some tests are about
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    @property
    def bodies(self):
        return [request for _, _, request in self.requests]


def handler_of(state):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.keys.append(self.headers["Authorization"])
            body = json.dumps(state.lists).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append((self.path, self.headers.get("Authorization"), request))
                number = len(state.requests)
                state.busy += 1
                state.most = max(state.most, state.busy)
            try:
                result = state.script(number, request)
            finally:
                with state.lock:
                    state.busy -= 1
            if result is CUT:
                self.close_connection = True
                self.connection.close()
                return
            status, body, *headers = result
            parts = body if isinstance(body, Iterator) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            if isinstance(body, Iterator):
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(parts[0])))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    return Handler


def chat(text, finish="stop", top=None, used=(3, 2), **more):
    """A chat completion; `top` is the first token's [(token, log-probability)]."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}
    usage = {"usage": {"prompt_tokens": used[0], "completion_tokens": used[1]}} if used else {}
    return {"choices": [choice]} | usage | more


PLAIN = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "logprobs", "top_logprobs"}
VLLM = PLAIN | {
    "continue_final_message", "add_generation_prompt", "chat_template_kwargs", "top_k", "min_p", "repetition_penalty",
    "return_token_ids",
}  # fmt: skip


def server_like(*, takes=PLAIN, most=20, goes_on="never", processed=False, logprobs=True, ids=False):
    """The script of a server of some kind. It refuses fields that it does not take, as strict ones do.

    `goes_on` with a prefill: "never", "told" (with vLLM's fields) or "always". `most`: top log-probabilities allowed.
    """

    def script(number, request):
        if unknown := set(request) - takes:
            return 400, {"error": {"message": f"Unrecognized request arguments: {sorted(unknown)}"}}
        if request.get("top_logprobs", 0) > most:
            return 400, {"error": {"message": f"top_logprobs must be at most {most}"}}
        begun = request["messages"][-1]["role"] == "assistant"
        told = request.get("continue_final_message") and not request.get("add_generation_prompt", True)
        text = "en, twelve" if begun and (goes_on == "always" or (goes_on == "told" and told)) else "one, two"
        top = None
        if logprobs and request.get("logprobs"):
            heat = (request["temperature"] or 1.0) if processed else 1.0
            raw = [("A", math.log(0.6)), ("B", math.log(0.3)), ("The", math.log(0.1))]
            total = math.log(sum(math.exp(p / heat) for _, p in raw))
            top = [(token, p / heat - total) for token, p in raw][: request.get("top_logprobs", 0)]
        answer = chat(text, top=top)
        if ids and request.get("return_token_ids"):
            answer["prompt_token_ids"], answer["choices"][0]["token_ids"] = [1, 2, 3], [7, 8, 2]
            if top is not None:
                answer["choices"][0]["logprobs"]["content"] = [{"token": t, "logprob": -0.5} for t in "abc"]
        return 200, answer

    return script
