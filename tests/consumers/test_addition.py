"""A stage of one's own in one file: the one of docs/extending.md runs, and what is wrong with a file is said."""

import re
import time
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

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ROLES = ("policy", "critic", "judge")


@pytest.fixture
def measure(tmp_path):
    """The file of the page."""
    path = tmp_path / "measure.py"
    path.write_text(re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL).group(1))
    return path


def test_the_stage_of_the_page_runs_beside_the_others(measure, tmp_path, make_prompt):
    settings, _ = load_settings(
        {"data.folder": str(tmp_path / "data"), "models.policy": "scripted", "run.id": "r"}, environment={}
    )
    bus = connect_bus(settings)
    bus.publish([to_producer_record(make_prompt(f"prompt {n}")) for n in range(5)])
    host = make_host(settings, bus, ["respond"], sink=True, custom_stages=[custom_stage.load_custom_stage(str(measure), ROLES)])
    counted = "SELECT count(*), count(DISTINCT parent_ids[1]), min(metrics['answer/words']) FROM metrics"
    with host:
        deadline = time.monotonic() + 60
        while not (open_store(settings).path.exists() and open_store(settings).query(counted).rows[0][0] == 5):
            assert time.monotonic() < deadline and not host.failure_event.wait(0.05)
    bus.close()
    host.raise_if_failed()
    ((rows, answers, words),) = open_store(settings).query(counted).rows
    assert (rows, answers) == (5, 5) and words > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "has no stage"),
        ("def stage(s, m): ...\nROLE = 'jury'\n", "ROLE cannot be 'jury'"),
    ],
)
def test_a_file_that_lacks_something_is_told(text, said, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        custom_stage.load_custom_stage(str(path), ROLES)


def test_a_stage_that_does_not_fit_is_told(measure):
    made = custom_stage.load_custom_stage(str(measure), ROLES)
    stage = made.make_stage(None, None)
    assert custom_stage.validate_custom_stage(stage, made.path, ("respond",)) is stage
    with pytest.raises(UsageError, match="the name measure is taken"):
        custom_stage.validate_custom_stage(stage, made.path, ("measure",))
    measure.write_text(measure.read_text().replace('outputs=("metrics",)', 'outputs=("measures",)'))
    with pytest.raises(UsageError, match="there is no topic measures"):
        custom_stage.validate_custom_stage(
            custom_stage.load_custom_stage(str(measure), ROLES).make_stage(None, None), measure, ()
        )


def test_no_file_and_no_such_stage(tmp_path):
    said = CliRunner().invoke(cli, ["run", "--data", str(tmp_path), "--stage", "absent.py"])
    assert isinstance(said.exception, UsageError) and "there is no file absent.py" in str(said.exception)
    assert CliRunner().invoke(cli, ["run", "--stage", "respnd"]).exit_code == 2
