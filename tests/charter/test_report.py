"""`charter report`: one HTML file without external files, with the data of the dashboard."""

import json
import re

import pytest
from click.testing import CliRunner

from charter.cli import cli
from tests.support.dashboard import HOSTILE_TEXTS, copy_hostile_run
from tests.support.records import RecordDatabase, add_counted_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return copy_hostile_run(tmp_path_factory.mktemp("report") / "data")


def run_report(folder, *arguments, code=0):
    result = CliRunner().invoke(cli, ["report", "--data", str(folder), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_report_loads_no_external_files(run_folder, tmp_path):
    file = tmp_path / "run.html"
    assert str(file) in run_report(run_folder, file, "--traces", len(HOSTILE_TEXTS)).stdout
    page = file.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|action)=|<script|<link|@import|url\(""", re.sub(r">[^<]*<", "><", page))
    assert "default-src 'none'" in page and "notice bad" not in page
    for title in ("Record counts", "Policy comparison", "Training", "Principles", "Traces", "Configuration"):
        assert f"{title}</h2>" in page or f"{title} <span" in page
    for dangerous in ("<img src=x", "<b onmouseover", "<svg/onload", "<script>document", "<h1>big"):
        assert dangerous not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", page)
    assert page.count('class="trace"') == len(HOSTILE_TEXTS)


def test_a_report_prints_html_or_json(run_folder):
    page = run_report(run_folder, "-").stdout
    assert page.startswith("<!doctype html>") and "Can I train on this?" in page and "<p>labels: " in page
    contents = json.loads(run_report(run_folder, "--json", "--traces", "2").stdout)
    assert contents["run"] == "live" and len(contents["traces"]["traces"]) == 2
    assert contents["policies"]["policies"][0]["prompts"] == len(HOSTILE_TEXTS)
    assert contents["counts"]["topics"][0]["records"] == len(HOSTILE_TEXTS)
    assert contents["labels"]["verdict"].startswith("labels: ")


def test_sampled_traces_are_the_same_each_time(run_folder):
    def sample():
        return [
            trace["id"] for trace in json.loads(run_report(run_folder, "--json", "--traces", "3").stdout)["traces"]["traces"]
        ]

    first = sample()
    assert first == sample() and len(set(first)) == 3


def test_a_missing_run_is_an_error(run_folder, tmp_path):
    with pytest.raises(Exception, match="there is no database"):
        CliRunner().invoke(cli, ["report", "--data", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(Exception, match="there is no run nowhere"):
        CliRunner().invoke(cli, ["report", "--data", str(run_folder), "--run", "nowhere"], catch_exceptions=False)
    add_counted_run(RecordDatabase(tmp_path / "charter.duckdb"))
    with pytest.raises(Exception, match="there is no run in"):
        CliRunner().invoke(cli, ["report", "--data", str(tmp_path)], catch_exceptions=False)
