"""A data folder with its event log, and the command line on it."""

import json
import uuid

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.pipeline import make_host
from charter.stages import STAGES
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from tests.support.records import copy_empty_database
from tests.support.waiting import HANG_S, wait_until

PROMPTS = 6


class Deployment:
    """A data folder, its event log, and the command line."""

    def __init__(self, folder, address="", prefix=""):
        self.folder = folder
        self.flags = {
            "data.folder": str(folder),
            "models.policy": "scripted",
            "critique.rounds": "1",
            "prompts.eval_fraction": "0",
        }
        self.flags |= {"bus.address": address, "bus.prefix": prefix} if address else {}

    def settings(self, **more):
        return load_settings(self.flags | {key.replace("__", "."): value for key, value in more.items()}, environment={})[0]

    def call(self, *arguments, code=0, stream="stdout", stdin=""):
        if arguments[0] == "run":
            copy_empty_database(self.folder / "charter.duckdb")
        words = [word for key, value in self.flags.items() for word in ("--set", f"{key}={value}")]
        result = CliRunner().invoke(cli, [*map(str, arguments), *words], input=stdin)
        if code == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return getattr(result, stream)

    def fails(self, error, match, *arguments):
        with pytest.raises(error, match=match):
            self.call(*arguments)

    def rows(self, *arguments):
        return json.loads(self.call(*arguments, "--json"))

    def sql(self, text):
        return open_store(self.settings()).query(text, limit_s=HANG_S).rows

    def stream(self, count, sql="SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL", **more):
        """Run all stages until a query returns `count`."""
        settings = self.settings(**more)
        copy_empty_database(settings.folder / "charter.duckdb")
        bus = connect_bus(settings)
        with make_host(settings, bus, STAGES, sink=True) as host:
            wait_until(lambda: (settings.folder / "charter.duckdb").exists() and self.sql(sql) == [(count,)], host)
        bus.close()

    def publish(self, *texts):
        path = self.folder.parent / f"{uuid.uuid4().hex}.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        self.call("produce", path)


def finished_deployment(deployment):
    bus = connect_bus(deployment.settings())
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    bus.close()
    deployment.stream(PROMPTS)
    return deployment
