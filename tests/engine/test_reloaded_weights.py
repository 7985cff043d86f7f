"""All weights of a fake vLLM server are replaced, and no response of other weights is used."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import ModelUnreachable, UsageError
from engine.metrics import collect_server_metrics
from engine.models.endpoint import Endpoint, compute_served_revision
from engine.models.interface import GenerationRequest
from engine.models.vllm import VllmServer
from engine.reloaded_weights import ReloadedWeights, WeightLoader
from engine.weight_sync import BASE_WEIGHTS_NAME, VLLM, WeightSync
from schemas import ids
from schemas.records import ChatMessage, ModelRef, PolicyKind, PolicyUpdate
from tests.support.vllm_server import FakeVllm

REQUESTS = [GenerationRequest((ChatMessage(role="user", content="hello"),), group="1")]


@pytest.fixture
def server():
    server = FakeVllm()
    yield server
    server.http.close()


@pytest.fixture
def base(server, tmp_path):
    """Return the endpoint of version 0 on the server, whose weights are checked."""
    endpoint = Endpoint(server.http.url, "base", backoff_range_s=(0.001, 0.001), stream=False)
    endpoint.served_weights = ReloadedWeights(make_loader(server, endpoint, tmp_path), 0, BASE_WEIGHTS_NAME, tmp_path / "base")
    return endpoint


def make_loader(server, endpoint, folder):
    def verify(loaded, weights):
        if generate(loaded) != f"fine {weights}":
            raise ModelUnreachable("the weights differ")
        return "large" not in weights.name

    return WeightLoader(VllmServer(endpoint), verify, folder / "lock")


def generate(endpoint):
    ((one,),) = endpoint.generate(REQUESTS)
    return one.text


def make_update(version, *, restored_version=None):
    return PolicyUpdate(
        record_id=ids.compute_record_id("train", [], str(version)), run_id="r", stage="train", model=ModelRef(id="m", revision="1"),
        kind=PolicyKind.POLICY, version=version, phase="sft", uri="x", content_hash="" if restored_version == 0 else f"{version:08x}",
        base_version=0, batch_id=ids.compute_record_id("batch", [], str(version)), restored_version=restored_version,
    )  # fmt: skip


def load(server, base, version, folder, **more):
    loader = make_loader(server, base, folder)
    return WeightSync(base, VLLM, loader)(make_update(version, **more), folder / (f"p{version}" if not more else "base"))


def test_policy_is_loaded_while_the_server_is_paused_and_verified_before_it_has_its_version(server, base, tmp_path):
    assert generate(base) == "fine first" and server.version == "default"
    policy = load(server, base, 1, tmp_path)
    assert server.calls == [
        "/pause?mode=wait", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version",
    ]  # fmt: skip
    assert server.version.startswith("policy-000001-00000001.") and generate(policy) == f"fine {tmp_path / 'p1'}"
    assert (policy.id, policy.revision) == ("base", compute_served_revision(base.url, "policy-000001-00000001"))
    assert (
        load(server, base, 1, tmp_path).revision == policy.revision and len(server.calls) == 6
    )  # a second process loads nothing


def test_metrics_count_the_weights_that_were_loaded_and_not_verified(server, base, tmp_path):
    load(server, base, 1, tmp_path)
    server.stale = True
    with pytest.raises(ModelUnreachable):
        load(server, base, 2, tmp_path)
    server.stale = False
    large = WeightSync(base, VLLM, make_loader(server, base, tmp_path))(make_update(3), tmp_path / "large")
    samples = [s for s in collect_server_metrics([large]) if s.name == "charter_server_weight_loads_total"]
    assert {s.labels[2]: s.value for s in samples} == {
        ("outcome", "verified"): 1, ("outcome", "failed"): 1, ("outcome", "not verified"): 1,
    }  # fmt: skip


def test_refused_server_keeps_its_weights(server, base, tmp_path):
    def refuse(endpoint):
        raise UsageError("the weights cannot be replaced")

    base.verify = refuse
    with pytest.raises(UsageError, match="cannot be replaced"):
        load(server, base, 1, tmp_path)
    assert server.calls == [] and server.weights == "first"


def test_processes_that_load_the_same_policy_wait_for_the_first_of_them(server, base, tmp_path):
    with ThreadPoolExecutor(4) as executor:
        policies = list(executor.map(lambda _: load(server, base, 1, tmp_path), range(4)))
    assert server.calls.count("/collective_rpc") == 1
    assert {generate(policy) for policy in policies} == {f"fine {tmp_path / 'p1'}"}


def test_restarted_server_gets_the_weights_again_before_the_next_batch(server, base, tmp_path):
    policy = load(server, base, 1, tmp_path)
    server.restart()
    assert generate(policy) == f"fine {tmp_path / 'p1'}"


def test_responses_of_a_batch_are_discarded_if_the_weights_change_in_the_meantime(server, base, tmp_path):
    policy = load(server, base, 1, tmp_path)
    generate(policy)

    def restart_and_load():
        server.on_chat = None
        server.restart()
        server.weights = "first"
        server.set_version("policy-000001-00000001.another")  # another process has loaded the same policy again

    server.on_chat = restart_and_load
    with pytest.raises(ModelUnreachable, match="replaced during a batch"):
        generate(policy)
    assert policy.take_unbilled().completion_tokens > 0  # the discarded tokens are counted


def test_weights_that_were_not_replaced_are_refused_and_the_previous_policy_is_loaded_again(server, base, tmp_path):
    policy = load(server, base, 1, tmp_path)
    server.stale = True
    with pytest.raises(ModelUnreachable, match="the weights differ"):
        load(server, base, 2, tmp_path)
    assert server.version == "failed/policy-000002-00000002" and not server.paused
    server.stale = False
    assert generate(policy) == f"fine {tmp_path / 'p1'}"


def test_failed_reload_leaves_the_server_running(server, base, tmp_path):
    server.loads = False
    with pytest.raises(ModelUnreachable, match="no such folder") as caught:
        load(server, base, 1, tmp_path)
    assert len(str(caught.value).splitlines()) == 3 and not server.paused
    server.loads = True
    assert generate(base) == f"fine {tmp_path / 'base'}"  # nobody knows what the server has


def test_newer_weights_and_those_of_others_are_not_replaced(server, base, tmp_path):
    policy = load(server, base, 1, tmp_path)
    newer = load(server, base, 2, tmp_path)
    with pytest.raises(ModelUnreachable, match="newer weights than policy 1"):
        generate(policy)
    assert generate(newer) == f"fine {tmp_path / 'p2'}"
    for version in ("policy-000002-ffffffff.1", "something"):
        server.set_version(version)
        with pytest.raises(UsageError, match="do not belong to this data folder") as caught:
            generate(newer)
        assert len(str(caught.value).splitlines()) == 3


def test_dead_loader_of_this_machine_is_replaced_and_that_of_another_machine_is_awaited(server, base, tmp_path):
    server.set_version("loading/other-host/policy-000001-00000001")
    with pytest.raises(ModelUnreachable, match="is loading policy-000001-00000001"):
        load(server, base, 1, tmp_path)
    server.set_version(f"loading/{socket.gethostname()}/policy-000001-00000001")
    assert generate(load(server, base, 1, tmp_path)) == f"fine {tmp_path / 'p1'}"


def test_server_that_is_not_vllm_is_reported_in_three_lines(server, base):
    server.http.pages["/weight_info"] = {"status": "ok"}
    with pytest.raises(ModelUnreachable, match="has no weight_version") as caught:
        generate(base)
    assert len(str(caught.value).splitlines()) == 3


def test_restored_base_model_is_loaded_and_has_the_revision_of_version_0(server, base, tmp_path):
    load(server, base, 1, tmp_path)
    restored = load(server, base, 2, tmp_path, restored_version=0)
    assert generate(restored) == f"fine {tmp_path / 'base'}" and restored.revision == base.revision
    assert server.version.startswith("policy-000002-base.")
