"""Run stages and the sink in this process until they have processed every record on the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from charter.lag import CompletionCheck
from charter.pipeline import make_host
from charter.stages import get_stage_inputs
from engine.bus.port import Bus
from engine.run_starts import ensure_run_start
from engine.settings import Settings
from engine.store import Store

_POLL_INTERVAL_S = 0.2


def run_stages(
    settings: Settings, bus: Bus, store: Store, stages: Sequence[str], open_models: dict[str, Any] | None = None
) -> None:
    """Run the stages and the sink until every record is processed and in the database. Raise the error of a failed thread."""
    run_id = settings.run.id
    run_start = ensure_run_start(bus, run_id)
    host = make_host(settings, bus, stages, sink=True, open_models=open_models)
    groups = {f"{run_id}.{stage}": topics for stage, topics in get_stage_inputs(settings).items() if stage in stages}
    check = CompletionCheck(bus, groups, store, run_start.offsets)
    with host:
        while not check.is_done():
            host.raise_if_failed()
            host.failure_event.wait(_POLL_INTERVAL_S)
