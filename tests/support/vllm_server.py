"""A fake vLLM server with weights that can be replaced, and with adapters. It answers with the name of the weights that it has."""

from tests.support.chat_server import FakeChatServer, make_chat_completion


class FakeVllm:
    """`loads` is false if the server cannot load anything. `stale` is true if reloads succeed, but leave the old weights.

    `weights` is the folder of the weights, and `calls` are the paths of the requests that manage the server.
    """

    def __init__(self, device="cuda"):
        self.http, self.loads, self.stale, self.paused = FakeChatServer(), True, False, False
        self.http.script = self.answer
        self.http.pages["/server_info"] = {"vllm_config": {"device_config": {"device": device}}}
        self.calls, self.adapter_loads, self.on_chat = [], [], None
        self.restart()

    def restart(self):
        self.weights, self.names, self.paused = "first", {"base"}, False
        self.set_version("default")
        self.list_names()

    def set_version(self, version):
        self.version = version
        self.http.pages["/weight_info"] = {"weight_version": version}

    def list_names(self):
        self.http.model_list = {"data": [{"id": name} for name in sorted(self.names)]}

    def answer(self, number, request):
        path = self.http.requests[number - 1][0]
        if path.endswith("/chat/completions"):
            if self.on_chat:
                self.on_chat()
            if request["model"] not in self.names:
                return 404, {"error": {"message": "no such model"}}
            return 200, make_chat_completion(f"fine {self.weights}", model=request["model"])
        self.calls.append(path)
        if path.startswith("/v1/") and not self.loads:
            return 500, {"error": {"message": "no room"}}
        if path == "/v1/load_lora_adapter":
            self.adapter_loads.append(request)
            self.names.add(request["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.names.discard(request["lora_name"])
        elif path == "/collective_rpc":
            assert self.paused and request["method"] == "reload_weights"
            if not self.loads:
                return 500, {"error": {"message": "no such folder"}}
            self.weights = self.weights if self.stale else request["kwargs"]["weights_path"]
        elif path == "/update_weight_version":
            self.set_version(request["new_version"])
        elif path in ("/pause?mode=wait", "/resume"):
            self.paused = path != "/resume"
        elif path != "/reset_prefix_cache":
            return 404, {"detail": "Not Found"}
        self.list_names()
        return 200, {"success": True}
