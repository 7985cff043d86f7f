"""`charter status` and the dashboard show which workers really run, paused phases and rollbacks."""

import uuid

import pytest
from starlette.testclient import TestClient

from charter.connect import connect_bus
from charter.dashboard.app import Dashboard
from charter.pipeline import make_host
from charter.stages import STAGES
from engine.instances import ServiceLease
from engine.models.endpoint import Endpoint
from engine.policy import make_restore_update
from engine.server_waits import list_server_waits
from engine.worker import to_producer_record
from schemas.records import Incident
from tests.support.chat_server import FakeChatServer, make_script
from tests.support.deployment import Deployment
from tests.support.records import copy_empty_database
from tests.support.waiting import wait_until


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def deployment(request, tmp_path):
    address = {"embedded": ""}.get(request.param) if request.param == "embedded" else request.getfixturevalue("kafka_address")
    deployment = Deployment(tmp_path / "data", address, f"v{uuid.uuid4().hex[:8]}." if address else "")
    deployment.publish("One?")
    deployment.stream(1)
    return deployment


def count_running(deployment, run="live"):
    rows = deployment.rows("status", "--run", run)["workers"]
    return {(row["worker"], row["run"]): row["running"] for row in rows}


STOPPED = {**{(stage, "live"): 0 for stage in STAGES}, ("sink", None): 0, ("trainer", None): 0, ("generator", None): 0}


def test_status_shows_the_workers_that_run(deployment):
    wait_until(lambda: count_running(deployment) == STOPPED)
    assert "(nothing runs; to process records, type: charter run)" in deployment.call("status")
    settings = deployment.settings()
    bus = connect_bus(settings)
    with make_host(settings, bus, ["respond", "judge"], sink=True) as host:
        expected = STOPPED | {("respond", "live"): 1, ("judge", "live"): 1, ("sink", None): 1}
        wait_until(lambda: count_running(deployment) == expected, host)
        other = make_host(deployment.settings(run__id="v1.2"), bus, ["critique"], sink=False)
        with other:
            wait_until(lambda: count_running(deployment) == expected | {("critique", "v1.2"): 1}, host)
        trainer = ServiceLease(settings.folder, "trainer")
        wait_until(lambda: count_running(deployment) == expected | {("trainer", None): 1}, host)
        trainer.close()
        assert "nothing runs" not in deployment.call("status")
    wait_until(lambda: count_running(deployment) == STOPPED)
    bus.close()


def test_status_shows_pauses_policies_and_rollbacks(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?")
    deployment.stream(1)
    assert {deployment.rows("status")[name] == [] for name in ("paused", "policies", "incidents")} == {True}
    deployment.call("policy", "pause", "ppo", "--reason", "looks odd")
    bus = connect_bus(deployment.settings())
    update = make_restore_update([], 0, run_id="live", base_model="scripted")
    incident = Incident(
        record_id=str(uuid.uuid4()), run_id="live", stage="train", phase="ppo", title="rolled back", detail="kl"
    )
    bus.publish([to_producer_record(update), to_producer_record(incident)])
    bus.close()
    status = deployment.rows("status")
    assert status["run"] == "live" and status["paused"] == [{"phase": "ppo", "reason": "looks odd"}]
    (policy,), (shown,) = status["policies"], status["incidents"]
    assert (policy["version"], policy["weights_of"], policy["phase"]) == (1, 0, "restore")
    assert (shown["title"], shown["detail"]) == ("rolled back", "kl")
    text = deployment.call("status")
    assert "ppo is paused (looks odd); to resume: charter policy resume ppo" in text
    assert "rolled back" in text and "restore" in text
    assert deployment.call("status", "--csv").startswith("topic,records,")


def test_dashboard_is_live_only_while_a_worker_runs(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?")
    deployment.stream(1)
    settings = deployment.settings()
    bus = connect_bus(settings)

    with TestClient(Dashboard(settings).build_app(), base_url="http://127.0.0.1:8000") as client:

        def shows(activity):
            return all(f'data-activity="{activity}"' in client.get(path).text for path in ("/", "/runs", "/traces"))

        wait_until(lambda: shows("stopped"))
        with make_host(settings, bus, ["respond"], sink=False) as host:
            wait_until(lambda: shows("running"), host)
            workers = client.get("/api/pipeline").json()["lag"]["workers"]
            assert [row["worker"] for row in workers if row["running"]] == ["respond"]
        wait_until(lambda: shows("stopped"))
    bus.close()


def test_dashboard_without_a_log_does_not_claim_to_be_live(tmp_path):
    settings = Deployment(tmp_path / "data").settings()
    with TestClient(Dashboard(settings).build_app(), base_url="http://127.0.0.1:8000") as client:
        assert 'data-activity="unknown"' in client.get("/").text
    assert not (tmp_path / "data").exists()


def test_status_and_dashboard_show_the_model_server_that_a_stage_waits_for(tmp_path):
    server = FakeChatServer()
    server.script = lambda n, request: (503, b"loading the model")
    deployment = Deployment(tmp_path / "data")
    spec = deployment.flags["models.policy"] = f"{server.url}#m"
    models = {spec: Endpoint(server.url, "m", backoff_range_s=(0.01, 0.02))}
    deployment.publish("One?")
    settings = deployment.settings()
    copy_empty_database(settings.folder / "charter.duckdb")
    bus = connect_bus(settings)
    client = TestClient(Dashboard(settings).build_app(None), base_url="http://localhost:8400")
    try:
        with make_host(settings, bus, ["respond"], sink=True, open_models=models) as host:
            wait_until(lambda: list_server_waits(settings.folder), host)
            message = f"waiting for {server.url}#m: status 503: loading the model; "
            assert deployment.rows("status")["waiting"][0]["message"].startswith(message)
            assert message in deployment.call("status")
            assert client.get("/api/pipeline").json()["waits"][0]["message"].startswith(message)
            assert message in client.get("/").text
            server.script = make_script()
            wait_until(lambda: not list_server_waits(settings.folder), host)
        assert deployment.rows("status")["waiting"] == [] and "waiting for" not in client.get("/").text
    finally:
        bus.close()
        server.close()
