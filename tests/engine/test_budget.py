"""Limits on tokens and cost, counted from the records of a run."""

import pytest

from charter.connect import connect_bus
from charter.pipeline import STAGES, make_host
from engine.budget import Budget, Price, parse_prices
from engine.errors import UsageError
from engine.settings import load_settings
from engine.store import Store
from engine.worker import to_producer_record
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas import ids
from schemas.records import ModelRef, Preference, ProducerOffset
from tests.support.chat_server import FakeChatServer, make_script
from tests.support.waiting import wait_until


def make_label(number, *, run="r", model="paid", read=1000, written=500):
    return Preference(
        record_id=ids.compute_record_id("judge", [], str(number)), run_id=run, stage="judge", messages=[], source="s",
        pairing="completions", response_a="x", response_b="y", model=ModelRef(id=model, revision="1"), prompt_tokens=read,
        completion_tokens=written,
    )  # fmt: skip


def test_prices_are_per_million_prompt_and_completion_tokens():
    assert parse_prices(["a=0.15/0.60", "o/b=c=1/2"]) == {"a": Price(0.15, 0.6), "o/b=c": Price(1, 2)}
    assert Price(3, 15).compute_cost(2_000_000, 100_000) == pytest.approx(6 + 1.5)
    for price in ("a", "a=1", "a=1/2/3", "=1/2", "a=-1/2", "a=nan/1", "a=inf/1", "a=x/y"):
        with pytest.raises(UsageError, match=r"budget\.prices"):
            parse_prices([price])


def test_budget_counts_only_records_of_its_run(bus, caplog):
    bus.publish([to_producer_record(make_label(n)) for n in range(3)])
    bus.publish([to_producer_record(make_label(10, run="another")), to_producer_record(make_label(11, model="own"))])
    prices = parse_prices(["paid=2/10"])
    budget = Budget(bus, "r", max_tokens=5999, max_cost=0.03, prices=prices)
    assert budget.tokens == 4 * 1500 and budget.cost == pytest.approx(3 * (2000 + 5000) / 1e6)
    assert budget.can_admit("judge") and not budget.can_admit("respond")  # the token limit applies only to admission
    bus.publish([to_producer_record(make_label(n)) for n in (20, 21)])
    budget.next_poll_at = 0.0
    assert not budget.can_admit("judge") and not budget.can_admit("critique")
    assert sum("budget.max_cost = 0.03" in message for message in caplog.messages) == 1
    budget.close()
    raised = Budget(bus, "r", max_cost=0.04, prices=prices)  # after a restart with a higher limit
    assert raised.cost == pytest.approx(0.035) and raised.can_admit("judge")
    raised.close()


def test_budget_counts_the_sums_of_a_generator_once(bus):
    def make_position(index, *, run="r", seed=0):
        record_id = ids.compute_id("generator", run, seed)
        position = ProducerOffset(
            record_id=record_id, run_id=run, stage="generate", name="default", content_hash="h", next_line=index, published=0,
            model=ModelRef(id="paid", revision="1"), prompt_tokens=1000 * index, completion_tokens=100 * index,
        )  # fmt: skip
        return to_producer_record(position)

    bus.publish([make_position(n) for n in (1, 2, 3)] + [make_position(1, seed=1), make_position(9, run="another")])
    budget = Budget(bus, "r", max_tokens=4400, prices=parse_prices(["paid=2/10"]))
    assert budget.tokens == 4 * 1100 and budget.cost == pytest.approx(4 * (2000 + 1000) / 1e6)
    assert not budget.can_admit("generate") and budget.can_admit("judge")
    budget.close()


def test_stages_pause_at_the_cost_limit_and_resume_with_a_higher_one(tmp_path):
    server = FakeChatServer()
    server.script = make_script(prefill_support="always")  # three prompt tokens and two completion tokens per request
    price_flags = {"budget.prices": "m=1000000/0", "respond.max_tokens": "8"}
    base = {
        "data.folder": str(tmp_path / "d"), "models.policy": "scripted", "models.judge": f"{server.url}#m",
        "prompts.eval_fraction": "0", "worker.max_in_flight": "4", "models.max_batch_size": "4", "critique.rounds": "1",
    }  # fmt: skip
    num_prompts = 30
    try:
        settings, _ = load_settings(base | price_flags | {"budget.max_cost": "30"}, environment={})
        bus = connect_bus(settings)
        FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=num_prompts)
        with make_host(settings, bus, STAGES, sink=True) as host:
            wait_until(lambda: all(worker.admission_closed for worker in host.workers), host)
        bus.close()
        labels = Store(tmp_path / "d" / "charter.duckdb").query("SELECT count(*), sum(prompt_tokens) FROM preferences").rows[0]
        assert 0 < labels[0] < num_prompts
        settings, _ = load_settings(base | price_flags | {"budget.max_cost": "0"}, environment={})
        bus = connect_bus(settings)
        with make_host(settings, bus, STAGES, sink=True) as host:
            store = Store(tmp_path / "d" / "charter.duckdb")
            wait_until(lambda: store.query("SELECT count(*) FROM raw.preferences").rows[0][0] == num_prompts, host)
        bus.close()
        assert store.query("SELECT count(*), count(DISTINCT record_id) FROM raw.preferences").rows == [
            (num_prompts, num_prompts)
        ]
        assert store.query("SELECT count(*) FROM raw.dead_letters").rows == [(0,)]
        with pytest.raises(UsageError, match="no price"):
            settings, _ = load_settings(base | {"budget.max_cost": "1"}, environment={})
            make_host(settings, connect_bus(settings), STAGES, sink=False)
    finally:
        server.close()
