"""GRPO on the completions of a real vLLM: the stream, two updates, and the weights of each in the server."""

import torch

from charter.connect import connect_bus, open_store
from charter.models import RoleModels, make_policy_getter
from charter.pipeline import make_stage
from constitutions.loader import load_constitution
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.host import Host
from engine.models.endpoint import compute_served_revision
from engine.weight_sync import get_served_model_name
from engine.worker import ModelExecutor, Worker
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record
from schemas.records import Response
from tests.support.real_servers import report
from tests.support.served_policies import make_settings
from tests.support.waiting import wait_until
from trainer.loop import Trainer

GRPO = {
    "train.rl_method": "grpo", "train.rewards": '["length=-1"]', "train.group_completions": "8", "grade.graders": '["length"]',
    "respond.num_completions": "4", "respond.max_tokens": "16", "grpo.learning_rate": "1e-5", "train.precision": "fp32",
}  # fmt: skip


def respond_and_grade(settings, models, bus, store, first, last):
    """Send prompts through the stages respond and grade. Wait until all completions have grades in the database."""
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), first_row=first, last_row=last)
    constitution = load_constitution("default")
    workers = [
        Worker(bus, make_stage(name, settings, models, constitution, bus), ModelExecutor(name), run_id="live", instance="t")
        for name in ("respond", "grade")
    ]
    with Host(workers, {"sink": Sink(bus, store, max_wait_s=0.05).run}) as host:
        count = "SELECT count(*) FROM grades"
        wait_until(lambda: store.query(count, limit_s=600).rows[0][0] == 4 * last, host, interval_s=0.5)


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


def test_two_grpo_updates_on_the_completions_of_the_server(vllm, untied, tmp_path):
    torch.set_num_threads(1)
    settings = make_settings(tmp_path, vllm.address, untied, "vllm", **GRPO)
    bus, models = connect_bus(settings), RoleModels(settings)
    store, updates = open_store(settings), []
    for number in (1, 2):
        respond_and_grade(settings, models, bus, store, 4 * number - 3, 4 * number)
        trainer = Trainer(bus, store, settings, untied)
        updates.append(trainer.update("grpo"))
        trainer.close()
        sink_all(bus, store)
        shown = {name: round(value, 5) for name, value in updates[-1].metrics.items() if "weight" in name or "kl" in name}
        report(f"GRPO update {number}: {updates[-1].metrics['rollouts']:.0f} rollouts, {shown}")
        assert updates[-1].version == number and updates[-1].metrics["rollouts"] >= 8
    policy, version = make_policy_getter(models, bus, None)()
    assert version == 2 and policy.revision == compute_served_revision(policy.url, get_served_model_name(updates[1]))
    responses = [decode_record(value, Response) for value in read_values(bus, "responses")]
    assert {response.policy_version for response in responses} == {0, 1}
    revisions = {response.policy_version: response.model.revision for response in responses}
    assert revisions[0] == models.get_model("policy").revision
    assert revisions[1] == compute_served_revision(policy.url, get_served_model_name(updates[0]))
    models.close()
    bus.close()
