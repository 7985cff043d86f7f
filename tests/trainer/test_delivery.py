"""Delivery of a policy to an inference server: combined adapters, and a loopback server that loads them or fails."""

import shlex
import sys

import pytest
import torch
from peft import PeftModel

from charter.models import RoleModels, make_policy_getter
from engine.checkpoints import read_checkpoint, write_checkpoint
from engine.models.endpoint import compute_served_revision
from engine.models.interface import GenerationRequest
from engine.policy import make_restore_update, read_policy_updates
from engine.settings import load_settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import ChatMessage, ModelRef, PolicyKind, PolicyUpdate
from tests.support.vllm_server import FakeVllm
from trainer import phases, weights
from trainer.batches import find_revision_mismatch
from trainer.learners import dpo, sft
from trainer.learners.reward import PreferenceExample
from trainer.learners.sft import SftExample
from trainer.state import TrainingState

MESSAGES = (ChatMessage(role="user", content="say a"),)
TEXTS = [SftExample(MESSAGES, "abc", True, str(n)) for n in range(4)]
PAIRS = [PreferenceExample(MESSAGES, "aa", "bb", 0.9, str(n), True, True) for n in range(4)]
HARDWARE = weights.Hardware(precision="fp32")


def train_sft(base, folder, first, rank):
    settings = {"learning_rate": 1e-2, "lora_rank": rank, "hardware": HARDWARE}
    model, tokenizer, _ = sft.train(base, TEXTS, **settings)
    write_checkpoint(folder, phases.make_sft_saver(model, tokenizer, base, first), {})


def test_combined_adapter_reproduces_the_checkpoint_on_the_base_model(tiny, tmp_path):
    first, second, third, whole = (tmp_path / name for name in ("1", "2", "3", "4"))
    train_sft(tiny, first, tiny, 2)
    save, _ = dpo.train(first, first, PAIRS, learning_rate=1e-2, lora_rank=3, hardware=HARDWARE)
    write_checkpoint(second, phases.make_saver_with_adapter(save, first, tiny), {})
    train_sft(second, third, tiny, 2)
    ids_ = torch.tensor([[5, 6, 7, 8, 9]])
    plain = weights.load_policy(tiny)(input_ids=ids_).logits
    for folder, rank in ((first, 2), (second, 5), (third, 7)):
        adapted = PeftModel.from_pretrained(weights.load_policy(tiny), folder / "adapter").eval()
        logits = weights.load_policy(folder).eval()(input_ids=ids_).logits
        assert adapted.peft_config["default"].r == rank
        torch.testing.assert_close(adapted(input_ids=ids_).logits, logits, atol=1e-4, rtol=1e-4)
        assert (logits - plain).abs().max() > 1e-2
    train_sft(third, whole, tiny, 0)
    assert not (whole / "adapter").exists()
    train_sft(whole, tmp_path / "5", tiny, 2)
    assert not (tmp_path / "5" / "adapter").exists()  # the server does not have the weights that it was trained on


@pytest.fixture
def server():
    server = FakeVllm()
    yield server
    server.http.close()


def publish(bus, folder, version, *, adapter=True):
    """Publish a policy whose checkpoint has an adapter, or none; return its folder."""

    def save(temporary):
        (temporary / "x.safetensors").write_text(str(version))
        if adapter:
            (temporary / "adapter").mkdir()

    checkpoint_folder = folder / "checkpoints" / f"policy-{version:06d}"
    checkpoint = write_checkpoint(checkpoint_folder, save, {})
    bus.publish(
        [
            to_producer_record(
                PolicyUpdate(
                    record_id=ids.compute_record_id("train", [], str(version)), run_id="r", stage="train",
                    model=ModelRef(id="m", revision=str(version)), kind=PolicyKind.POLICY, version=version, phase="sft",
                    uri=str(checkpoint_folder), content_hash=checkpoint.content_hash, base_version=version - 1,
                    batch_id=ids.compute_record_id("batch", [], str(version)),
                )
            )
        ]
    )  # fmt: skip
    return checkpoint_folder


def test_served_version_changes_only_when_the_server_has_loaded_the_adapter(server, bus, tmp_path):
    flags = {
        "models.policy": f"{server.http.url}#base",
        "models.weight_sync": "vllm-lora",
        "data.folder": str(tmp_path / "data"),
    }
    models = RoleModels(load_settings(flags, environment={})[0])
    policy = make_policy_getter(models, bus, None)
    assert (policy()[0].id, policy()[1]) == ("base", 0)
    server.loads = False
    checkpoint_folder = publish(bus, tmp_path / "data", 1)
    assert (policy()[0].id, policy()[1]) == ("base", 0)  # the server failed to load it: the base model keeps responding
    server.loads, models.policy_follower.retry_at = True, 0.0
    model, version = policy()
    name = f"policy-000001-{read_checkpoint(checkpoint_folder).content_hash[:8]}"  # policy 1 of another data folder has another name
    assert (model.id, version, model.revision) == (name, 1, compute_served_revision(server.http.url, name))
    assert {"lora_name": name, "lora_path": str(checkpoint_folder / "adapter")} in server.adapter_loads
    assert (
        model.generate([GenerationRequest(MESSAGES)])[0][0].text == "fine first"
        and server.http.request_bodies[-1]["model"] == name
    )
    publish(bus, tmp_path / "data", 2, adapter=False)
    assert policy() == (model, 1)  # it was trained with all weights and has no adapter
    bus.publish([to_producer_record(make_restore_update(read_policy_updates(bus), 0, run_id="r", base_model="base"))])
    assert (policy()[0].id, policy()[1]) == ("base", 3)
    models.close()


def test_weight_sync_command_counts_only_when_the_server_serves_the_policy(server, bus, tmp_path):
    script = tmp_path / "deliver.py"
    script.write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[1]).joinpath('x.safetensors').read_text()\nprint(sys.argv[2])\n"
    )
    command = shlex.join([sys.executable, str(script)])
    flags = {"models.policy": f"{server.http.url}#base", "models.weight_sync": command, "data.folder": str(tmp_path / "data")}
    models = RoleModels(load_settings(flags, environment={})[0])
    policy = make_policy_getter(models, bus, None)
    checkpoint_folder = publish(bus, tmp_path / "data", 1, adapter=False)
    assert policy()[1] == 0  # the command succeeded, but the server does not serve the policy
    name = f"policy-000001-{read_checkpoint(checkpoint_folder).content_hash[:8]}"
    server.names.add(name)
    models.policy_follower.retry_at = 0.0
    assert (policy()[0].id, policy()[1]) == (name, 1)
    models.close()


def test_revision_mismatch_accepts_the_revision_of_a_server():
    state = TrainingState(1, model_revisions={0: "w0", 1: "w1"})
    served = {0: "s0", 1: "s1"}
    row = {"policy_version": 1, "revision": "s1"}
    assert find_revision_mismatch(row, state, served) is None and find_revision_mismatch(row, state, {}) is not None
    assert find_revision_mismatch(row | {"revision": "s0"}, state, served) == "its model revision s0 is not that of policy 1"


def open_policies(server, bus, tmp_path, count):
    """Publish policies with adapters, and load each. Return the models of the roles and the endpoints."""
    flags = {
        "models.policy": f"{server.http.url}#base",
        "models.weight_sync": "vllm-lora",
        "data.folder": str(tmp_path / "data"),
    }
    models = RoleModels(load_settings(flags, environment={})[0])
    policy, endpoints = make_policy_getter(models, bus, None), []
    for version in range(1, count + 1):
        publish(bus, tmp_path / "data", version)
        endpoints.append(policy()[0])
    return models, endpoints


def test_adapters_that_no_request_uses_are_unloaded(server, bus, tmp_path):
    models, endpoints = open_policies(server, bus, tmp_path, 2)
    with endpoints[0].health.track_requests(1):
        endpoints.append(models.get_weight_sync()(*read_newest(bus, tmp_path, 3)))
        assert server.names == {"base", *(endpoint.id for endpoint in endpoints)}  # a request still uses the oldest
    newest = models.get_weight_sync()(*read_newest(bus, tmp_path, 4))
    assert server.names == {"base", endpoints[2].id, newest.id}
    ((one,),) = endpoints[0].generate([GenerationRequest(MESSAGES)])  # another process asks for it: it is loaded again
    assert one.text.startswith("fine")
    models.close()


def read_newest(bus, tmp_path, version):
    folder = publish(bus, tmp_path / "data", version)
    return read_policy_updates(bus)[-1], folder


def test_restarted_server_gets_its_adapter_again(server, bus, tmp_path, caplog):
    models, (endpoint,) = open_policies(server, bus, tmp_path, 1)
    server.restart()
    ((one,),) = endpoint.generate([GenerationRequest(MESSAGES)])
    assert one.text == "fine first" and server.names == {"base", endpoint.id}
    assert "does not have policy-000001" in caplog.text
    models.close()
