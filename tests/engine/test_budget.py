"""Limits on tokens and cost, counted from records, with a server that bills."""

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
from schemas.records import ModelRef, Preference
from tests.support.chat_server import FakeChatServer, make_script


def label(number, *, run="r", model="paid", read=1000, written=500):
    return Preference(
        record_id=ids.compute_record_id("judge", [], str(number)), run_id=run, stage="judge", messages=[], source="s",
        pairing="completions", response_a="x", response_b="y", model=ModelRef(id=model, revision="1"), prompt_tokens=read,
        completion_tokens=written,
    )  # fmt: skip


def test_prices_are_for_a_million_tokens_read_and_written():
    assert parse_prices(["a=0.15/0.60", "o/b=c=1/2"]) == {"a": Price(0.15, 0.6), "o/b=c": Price(1, 2)}
    assert Price(3, 15).compute_cost(2_000_000, 100_000) == pytest.approx(6 + 1.5)
    for bad in ("a", "a=1", "a=1/2/3", "=1/2", "a=-1/2", "a=nan/1", "a=inf/1", "a=x/y"):
        with pytest.raises(UsageError, match=r"budget\.prices"):
            parse_prices([bad])


def test_what_a_run_used_is_read_from_its_own_records(bus, caplog):
    bus.publish([to_producer_record(label(n)) for n in range(3)])
    bus.publish([to_producer_record(label(10, run="another")), to_producer_record(label(11, model="own"))])
    prices = parse_prices(["paid=2/10"])
    budget = Budget(bus, "r", max_tokens=5999, max_cost=0.03, prices=prices)
    assert budget.tokens == 4 * 1500 and budget.cost == pytest.approx(3 * (2000 + 5000) / 1e6)
    assert budget.can_admit("judge") and not budget.can_admit("respond")  # of tokens only admission is bounded
    bus.publish([to_producer_record(label(n)) for n in (20, 21)])
    budget.next_poll_at = 0.0
    assert not budget.can_admit("judge") and not budget.can_admit("critique")
    assert sum("budget.max_cost = 0.03" in message for message in caplog.messages) == 1
    budget.close()
    again = Budget(bus, "r", max_cost=0.04, prices=prices)  # raised, after a restart
    assert again.cost == pytest.approx(0.035) and again.can_admit("judge")
    again.close()


def test_at_the_limit_of_cost_every_stage_pauses_and_a_higher_one_goes_on(tmp_path):
    server = FakeChatServer()
    server.script = make_script(prefill_support="always")  # three tokens read and two written for each request
    more = {"budget.prices": "m=1000000/0", "respond.max_tokens": "8"}
    base = {
        "data.folder": str(tmp_path / "d"), "models.policy": "scripted", "models.judge": f"{server.url}#m",
        "prompts.eval_fraction": "0", "worker.max_in_flight": "4", "models.max_batch_size": "4", "critique.rounds": "1",
    }  # fmt: skip
    prompts = 30
    try:
        settings, _ = load_settings(base | more | {"budget.max_cost": "30"}, environment={})
        bus = connect_bus(settings)
        FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=prompts)
        with make_host(settings, bus, STAGES, sink=True) as host:
            while not all(worker.admission_closed for worker in host.workers):
                host.failure_event.wait(0.02)
                host.raise_if_failed()
        bus.close()
        labels = Store(tmp_path / "d" / "charter.duckdb").query("SELECT count(*), sum(prompt_tokens) FROM preferences").rows[0]
        assert 0 < labels[0] < prompts
        settings, _ = load_settings(base | more | {"budget.max_cost": "0"}, environment={})
        bus = connect_bus(settings)
        with make_host(settings, bus, STAGES, sink=True) as host:
            store = Store(tmp_path / "d" / "charter.duckdb")
            while store.query("SELECT count(*) FROM raw.preferences").rows[0][0] < prompts:
                host.failure_event.wait(0.05)
                host.raise_if_failed()
        bus.close()
        assert store.query("SELECT count(*), count(DISTINCT record_id) FROM raw.preferences").rows == [(prompts, prompts)]
        assert store.query("SELECT count(*) FROM raw.dead_letters").rows == [(0,)]
        with pytest.raises(UsageError, match="no price"):
            settings, _ = load_settings(base | {"budget.max_cost": "1"}, environment={})
            make_host(settings, connect_bus(settings), STAGES, sink=False)
    finally:
        server.close()
