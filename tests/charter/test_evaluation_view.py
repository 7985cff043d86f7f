"""The evaluation view and the section of the report: hostile text is data, and each cell has its responses."""

import json
import re

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from charter.cli import cli
from charter.dashboard import charts
from charter.dashboard.app import Dashboard
from engine.settings import load_settings
from schemas import ids
from schemas.records import RunManifest
from tests.support.dashboard import HOSTILE_TEXTS, make_evaluation, make_setting_flags
from tests.support.records import RecordDatabase

DANGEROUS = ("<img src=x", "<b onmouseover", "<svg/onload", "<script>document", "<h1>big")


def make_manifest(run):
    settings = json.dumps({"evaluation_run": {"name": "eval"}} if run.startswith("eval") else {})
    values = {"name": run, "settings": settings, "constitution_text": "", "charter_version": "0"}
    return RunManifest(record_id=ids.compute_id("run", run), prompt_id=None, run_id=run, stage="run", **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    database = RecordDatabase(folder / "charter.duckdb")
    database.add(*(make_manifest(run) for run in ("live", "eval-policy-0", "eval-policy-3")), *make_evaluation((0, 3)))
    return folder


@pytest.fixture
def client(folder):
    settings = load_settings(make_setting_flags(folder, "scripted"), environment={})[0]
    with TestClient(Dashboard(settings).build_app(), base_url="http://localhost:8400") as test_client:
        yield test_client


def test_the_table_links_each_rate_to_its_responses(client):
    data = client.get("/api/evaluation").json()["data"]
    assert (data["name"], data["policies"]) == ("eval", [0, 3])
    row = next(row for row in data["rows"] if row["subset"] == "unsafe")
    assert (row["metric"], [rate["rate"] for rate in row["rates"]]) == ("refused", [0.0, 3 / len(HOSTILE_TEXTS)])
    page = client.get("/evaluation").text
    assert "suite=xstest&amp;subset=unsafe&amp;a=0&amp;b=3#responses" in page
    assert [point["policy"] for point in data["plane"]["points"]] == [0, 3]


def test_responses_of_two_policies_are_side_by_side_and_escaped(client):
    address = "/evaluation?suite=xstest&subset=unsafe&a=0&b=3"
    responses = client.get("/api" + address).json()["data"]["responses"]
    assert (responses["num_prompts"], responses["num_differing"]) == (len(HOSTILE_TEXTS), 3)
    assert [prompt["differs"] for prompt in responses["prompts"]] == [True] * 3 + [False] * (len(HOSTILE_TEXTS) - 3)
    left, right = responses["prompts"][0]["sides"]
    assert (left["policy"], right["policy"]) == (0, 3)
    assert right["completions"][0]["labels"] == {"refusal": "refuses"}
    assert responses["prompts"][0]["item"].endswith(left["completions"][0]["text"])
    page = client.get(address).text
    assert "labels differ" in page and not any(text in page for text in DANGEROUS)


@pytest.mark.parametrize("query", ["name=other", "suite=xstest&a=1", "suite=xstest&a=%3Cb%3E"])
def test_a_wrong_address_is_explained(client, query):
    page = client.get(f"/evaluation?{query}").text
    assert 'role="alert"' in page and "<b>" not in page


def test_a_suite_without_prompts_is_empty(client):
    assert "No prompt of this suite" in client.get("/evaluation?suite=none").text


def test_the_report_has_the_evaluation_and_shows_the_newest_run_that_is_none(folder):
    def report(*arguments):
        result = CliRunner().invoke(cli, ["report", *arguments, "--data", str(folder)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    contents = json.loads(report("--json"))
    assert contents["run"] == "live" and contents["evaluation"]["policies"] == [0, 3]
    page = report("-")
    assert "Harmlessness and helpfulness" in page and not any(text in page for text in DANGEROUS)
    assert "href=" not in page


def test_the_axes_of_the_plane_are_fixed():
    def draw(rate):
        point = {"policy": 1, "x": rate, "y": rate, "x_interval": (rate - 0.1, rate + 0.1), "y_interval": (rate, rate)}
        return charts.draw_plane([point], "plane", "x", "y")

    ticks = [re.findall(r'class="tick">([^<]*)<', draw(rate)) for rate in (0.2, 0.3)]
    assert ticks == [["0", "0.5", "1", "0", "0.2", "0.4", "0.6", "0.8", "1"]] * 2
    assert charts.draw_plane([], "plane", "x", "y") == ""
