"""A stage of one's own in one file: the one of docs/extending.md runs, and what is wrong with a file is said."""

import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from charter import addition
from charter.cli import cli
from charter.pipeline import connect, make_host, store_of
from engine.errors import UsageError
from engine.settings import load
from engine.worker import outgoing

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ROLES = ("policy", "critic", "judge")


@pytest.fixture
def measure(tmp_path):
    """The file of the page."""
    path = tmp_path / "measure.py"
    path.write_text(re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL).group(1))
    return path


def test_the_stage_of_the_page_runs_beside_the_others(measure, tmp_path, make_prompt):
    settings, _ = load({"data.folder": str(tmp_path / "data"), "models.policy": "scripted", "run.id": "r"}, environment={})
    bus = connect(settings)
    bus.publish([outgoing(make_prompt(f"prompt {n}")) for n in range(5)])
    host = make_host(settings, bus, ["respond"], sink=True, additions=[addition.read(str(measure), ROLES)])
    counted = "SELECT count(*), count(DISTINCT parent_ids[1]), min(metrics['answer/words']) FROM metrics"
    with host:
        deadline = time.monotonic() + 60
        while not (store_of(settings).path.exists() and store_of(settings).query(counted).rows[0][0] == 5):
            assert time.monotonic() < deadline and not host.failed.wait(0.05)
    bus.close()
    host.check()
    ((rows, answers, words),) = store_of(settings).query(counted).rows
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
        addition.read(str(path), ROLES)


def test_a_stage_that_does_not_fit_is_told(measure):
    made = addition.read(str(measure), ROLES)
    stage = made.make(None, None)
    assert addition.checked(stage, made.path, ("respond",)) is stage
    with pytest.raises(UsageError, match="the name measure is taken"):
        addition.checked(stage, made.path, ("measure",))
    measure.write_text(measure.read_text().replace('outputs=("metrics",)', 'outputs=("measures",)'))
    with pytest.raises(UsageError, match="there is no topic measures"):
        addition.checked(addition.read(str(measure), ROLES).make(None, None), measure, ())


def test_no_file_and_no_such_stage(tmp_path):
    said = CliRunner().invoke(cli, ["run", "--data", str(tmp_path), "--stage", "absent.py"])
    assert isinstance(said.exception, UsageError) and "there is no file absent.py" in str(said.exception)
    assert CliRunner().invoke(cli, ["run", "--stage", "respnd"]).exit_code == 2
