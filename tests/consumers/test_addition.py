"""Custom stages: the one in docs/extending.md runs, and errors in a stage file are reported."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from charter import custom_stage
from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.pipeline import make_host
from engine.errors import UsageError
from engine.settings import load_settings
from engine.worker import to_producer_record
from tests.support.waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ROLES = ("policy", "critic", "judge")


@pytest.fixture
def stage_file(tmp_path):
    """Write the stage of docs/extending.md to a file."""
    path = tmp_path / "measure.py"
    path.write_text(re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL).group(1))
    return path


def test_custom_stage_runs_next_to_the_other_stages(stage_file, tmp_path, make_prompt):
    settings, _ = load_settings(
        {"data.folder": str(tmp_path / "data"), "models.policy": "scripted", "run.id": "r"}, environment={}
    )
    bus = connect_bus(settings)
    bus.publish([to_producer_record(make_prompt(f"prompt {n}")) for n in range(5)])
    host = make_host(
        settings, bus, ["respond"], sink=True, custom_stages=[custom_stage.load_custom_stage(str(stage_file), ROLES)]
    )
    sql = "SELECT count(*), count(DISTINCT parent_ids[1]), min(metrics['completion/words']) FROM metrics"
    with host:
        store = open_store(settings)
        wait_until(lambda: store.path.exists() and store.query(sql).rows[0][0] == 5, host)
    bus.close()
    host.raise_if_failed()
    ((num_rows, num_responses, min_words),) = open_store(settings).query(sql).rows
    assert (num_rows, num_responses) == (5, 5) and min_words > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "has no stage"),
        ("def stage(s, m): ...\nROLE = 'jury'\n", "ROLE cannot be 'jury'"),
    ],
)
def test_load_custom_stage_rejects_an_incomplete_file(source, message, tmp_path):
    path = tmp_path / "custom.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=message):
        custom_stage.load_custom_stage(str(path), ROLES)


def test_validate_custom_stage_rejects_a_used_name_and_an_unknown_topic(stage_file):
    loaded = custom_stage.load_custom_stage(str(stage_file), ROLES)
    stage = loaded.make_stage(None, None)
    assert custom_stage.validate_custom_stage(stage, loaded.path, ("respond",)) is stage
    with pytest.raises(UsageError, match="the name measure is taken"):
        custom_stage.validate_custom_stage(stage, loaded.path, ("measure",))
    stage_file.write_text(stage_file.read_text().replace('outputs=("metrics",)', 'outputs=("measures",)'))
    with pytest.raises(UsageError, match="there is no topic measures"):
        custom_stage.validate_custom_stage(
            custom_stage.load_custom_stage(str(stage_file), ROLES).make_stage(None, None), stage_file, ()
        )


def test_run_rejects_a_missing_stage_file_and_an_unknown_stage(tmp_path):
    result = CliRunner().invoke(cli, ["run", "--data", str(tmp_path), "--stage", "absent.py"])
    assert isinstance(result.exception, UsageError) and "there is no file absent.py" in str(result.exception)
    assert CliRunner().invoke(cli, ["run", "--stage", "respnd"]).exit_code == 2
