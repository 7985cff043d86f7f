"""The server of the policy must serve the model that the trainer trains."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from charter import served_policy
from charter.models import RoleModels
from charter.served_policy import require_separate_server
from engine.errors import UsageError
from engine.models.interface import GenerationRequest
from engine.settings import load_settings
from schemas.records import ChatMessage
from tests.support.chat_server import STREAM_FIELDS, VLLM_FIELDS, FakeChatServer, make_chat_completion, stream_answer
from tests.support.token_completions import DISABLED, TokenScript

MESSAGES = (ChatMessage(role="user", content="a"),)


class TinyServer:
    """A server of the model in `folder`, with exact token ids and log-probabilities. Its completions are constant."""

    def __init__(self, folder, text="so it is."):
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        self.text, self.shift, self.http, self.fields = text, 0, FakeChatServer(), VLLM_FIELDS | STREAM_FIELDS
        self.tokens = lambda number, request: DISABLED
        self.http.script = self.answer

    def answer(self, number, request):
        if "token_ids" in request:
            return self.tokens(number, request)
        if unknown := set(request) - self.fields:
            return 400, {"error": {"message": f"unknown fields {sorted(unknown)}"}}
        prompt = self.tokenizer(f"\n\nHuman: {request['messages'][-1]['content']}\n\nAssistant:")["input_ids"]
        tokens = [*self.tokenizer(self.text, add_special_tokens=False)["input_ids"], 2]
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        completion = make_chat_completion(self.text, token_counts=(len(prompt), len(tokens)))
        choice = completion["choices"][0]
        if request.get("return_token_ids"):
            completion["prompt_token_ids"] = [(token + self.shift) % len(self.tokenizer) for token in prompt]
            choice["token_ids"] = [(token + self.shift) % len(self.tokenizer) for token in tokens]
        if request.get("logprobs"):
            top = [{"token": chr(97 + n), "logprob": -3.0 - n} for n in range(request["top_logprobs"])]
            choice["logprobs"] = {
                "content": [
                    {"token": "t", "logprob": float(logprobs[len(prompt) - 1 + n, token]), "top_logprobs": top}
                    for n, token in enumerate(tokens)
                ]
            }
        return stream_answer(completion) if request.get("stream") else (200, completion)


@pytest.fixture
def server(tiny):
    server = TinyServer(tiny)
    yield server
    server.http.close()


def open_policy(server, base_model, **more):
    flags = {"models.policy": f"{server.http.url}#m", "train.base_model": str(base_model), "models.critic": "scripted"} | more
    return RoleModels(load_settings(flags, environment={})[0]).get_model("policy")


def test_server_of_the_base_model_is_accepted(server, tiny, caplog):
    model = open_policy(server, tiny)
    ((one,),) = model.generate([GenerationRequest(MESSAGES)])
    assert one.text == server.text and len(one.logprobs) == len(one.token_ids) > 0
    assert model.server_capabilities.stream_body is not None


def test_prompts_of_the_policy_are_encoded_with_the_base_model_also_if_the_server_has_another_template(server, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    server.tokenizer.chat_template = "{% for m in messages %}({{ m.content }}){% endfor %}:"
    server.tokenizer.save_pretrained(base)
    server.tokens = TokenScript()
    ((one,),) = open_policy(server, base).generate([GenerationRequest(MESSAGES)])
    assert server.tokenizer.decode(one.prompt_token_ids) == "(a):" and len(one.logprobs) == len(one.token_ids) > 0
    server.shift = 1
    with pytest.raises(UsageError, match=r"does not use the tokenizer of train\.base_model"):
        open_policy(server, base).generate([GenerationRequest(MESSAGES)])


@pytest.mark.parametrize(
    ("base_model", "words"),
    [("", "train.base_model is not set"), ("http://127.0.0.1:9/v1#m", "train.base_model is http://127.0.0.1:9/v1#m")],
)
def test_policy_without_a_tokenizer_on_this_machine_gets_messages(server, caplog, base_model, words):
    server.tokens = TokenScript()
    model = open_policy(server, base_model)
    ((one,),) = model.generate([GenerationRequest(MESSAGES)])
    assert one.text == server.text and model.server_capabilities.accepts_token_ids
    (line,) = [line for line in caplog.messages if "with its own chat template" in line]
    assert words in line


def test_ids_of_another_tokenizer_are_refused_before_the_first_record(server, tiny):
    server.shift = 1
    with pytest.raises(UsageError, match=r"does not use the tokenizer of train\.base_model") as caught:
        open_policy(server, tiny).generate([GenerationRequest(MESSAGES)])
    assert len(str(caught.value).splitlines()) == 3 and "mean" in caught.value.why


def test_ids_that_the_tokenizer_does_not_have_are_refused(server, tiny):
    server.tokenizer.add_tokens(["tokenthatisnew"])
    server.text = "tokenthatisnew"
    server.model.resize_token_embeddings(len(server.tokenizer))
    with pytest.raises(UsageError, match="sends the token id"):
        open_policy(server, tiny).generate([GenerationRequest(MESSAGES)])


def test_another_model_with_the_same_tokenizer_is_refused_at_each_use(server, tiny):
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.mul_(5.0)
    model = open_policy(server, tiny)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"does not have the weights of train\.base_model") as caught:
            model.generate([GenerationRequest(MESSAGES)])
        assert len(str(caught.value).splitlines()) == 3


def test_reloaded_weights_that_are_too_large_are_not_verified(server, tiny, monkeypatch, caplog):
    model = open_policy(server, tiny)
    assert served_policy.require_reloaded_weights(model, tiny)
    monkeypatch.setattr(served_policy, "_MAX_WEIGHT_BYTES", 1)
    assert not served_policy.require_reloaded_weights(model, tiny)
    assert "are not verified, because they are larger than 2 GB" in caplog.messages[-1]


def test_metrics_name_a_server_once_after_its_weights_were_replaced(server, tiny):
    models = RoleModels(load_settings({"models.policy": f"{server.http.url}#m"}, environment={})[0])
    policy = models.get_model("policy").with_weights(None, "policy-000001-00000001")
    models.policy_follower = SimpleNamespace(model=policy)
    assert [(one.url, one.id) for one in models.list_servers()] == [(server.http.url, "m")]


@pytest.mark.parametrize(("missing", "words"), [("return_token_ids", "token ids"), ("logprobs", "exact log-probabilities")])
def test_server_without_rollouts_is_refused_if_rl_needs_them(server, tiny, caplog, missing, words):
    server.fields = server.fields - {missing}
    with pytest.raises(UsageError, match="RL cannot train on the completions") as caught:
        open_policy(server, tiny, **{"models.weight_sync": "vllm-lora"}).generate([GenerationRequest(MESSAGES)])
    assert f"does not return {words}" in caught.value.why and len(str(caught.value).splitlines()) == 3
    with caplog.at_level(logging.WARNING, "charter.models"):
        for more in ({}, {"models.weight_sync": "vllm-lora", "train.rl_method": "dpo"}):
            ((one,),) = open_policy(server, tiny, **more).generate([GenerationRequest(MESSAGES)])
            assert one.text == server.text
    assert sum(f"does not return {words}: RL skips" in line for line in caplog.messages) == 2


@pytest.mark.parametrize(
    ("more", "role"),
    [
        ({}, "models.critic"),
        ({"models.critic": "http://127.0.0.1:9/v1#other"}, "models.critic"),
        ({"models.critic": "scripted"}, "monitor.judge"),
        ({"models.critic": "scripted", "monitor.prompts": "0"}, "models.judge"),
        (
            {"models.critic": "scripted", "models.judge": "scripted", "monitor.judge": "http://localhost:9/v1#m"},
            "monitor.judge",
        ),
        ({"models.critic": "scripted", "models.judge": "http://localhost:8/v1#m"}, None),
        ({"models.weight_sync": "vllm-lora"}, None),
    ],
)
def test_server_whose_weights_are_replaced_must_not_serve_the_critic_or_a_judge(more, role):
    flags = {"models.policy": "http://localhost:9/v1#m", "models.weight_sync": "vllm"}
    settings = load_settings(flags | more, environment={})[0]
    if role is None:
        require_separate_server(settings)
        return
    with pytest.raises(UsageError, match=f"{role} uses the server of the policy") as caught:
        require_separate_server(settings)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("page", "words"), [("/weight_info", "report its weight version"), (None, "keeps the old output layer")]
)
def test_server_whose_weights_cannot_be_replaced_is_refused(server, tiny, page, words):
    server.http.pages["/weight_info"] = {"weight_version": "default"}
    server.http.pages["/server_info"] = {"vllm_config": {"device_config": {"device": "cpu"}}}
    server.http.pages.pop(page, None)
    with pytest.raises(UsageError, match="cannot be replaced") as caught:
        open_policy(server, tiny, **{"models.weight_sync": "vllm"}).generate([GenerationRequest(MESSAGES)])
    assert words in caught.value.why and len(str(caught.value).splitlines()) == 3
