"""A real vLLM that gets policies as LoRA adapters: delivery, exact rollouts, unloading, and a restart."""

import pytest

from charter.models import RoleModels
from engine.models.vllm import VllmServer
from tests.real_servers.test_vllm_weights import check_weights, generate
from tests.support.served_policies import make_settings, train_policy


@pytest.fixture(scope="module")
def models(vllm_lora, smollm2, tmp_path_factory):
    return RoleModels(make_settings(tmp_path_factory.mktemp("adapters"), vllm_lora.address, smollm2, "vllm-lora"))


@pytest.fixture(scope="module")
def updates(smollm2, models):
    return [train_policy(models.settings.folder.parent, smollm2, version, lora_rank=4) for version in (1, 2, 3)]


def list_adapters(models):
    return VllmServer(models.get_model("policy")).list_models() - {"model"}


def test_adapters_are_delivered_and_those_that_no_request_uses_are_unloaded(models, updates, smollm2):
    check_weights(smollm2, generate(models.get_model("policy"), max_tokens=8), "vLLM with LoRA, version 0")
    endpoints = []
    for update in updates:
        endpoints.append(models.open_policy_update(update))
        check_weights(update.uri, generate(endpoints[-1], max_tokens=8), f"vLLM, adapter of version {update.version}", smollm2)
    assert list_adapters(models) == {endpoint.id for endpoint in endpoints[1:]}
    check_weights(updates[0].uri, generate(endpoints[0], max_tokens=4), "vLLM, adapter of version 1 loaded again")


def test_restarted_server_gets_the_adapter_again(models, updates, vllm_lora, smollm2):
    policy = models.open_policy_update(updates[2])
    vllm_lora.kill()
    vllm_lora.start()
    vllm_lora.wait_until_ready()
    assert list_adapters(models) == set()
    check_weights(updates[2].uri, generate(policy, max_tokens=4), "vLLM, adapter of version 3 after a restart", smollm2)
    assert list_adapters(models) == {policy.id}
