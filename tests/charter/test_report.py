"""`charter report`: one file that needs nothing else and shows what the dashboard shows."""

import json
import re

import pytest
from click.testing import CliRunner

from charter.cli import cli
from tests.support.dashboard import HOSTILE_TEXTS, run_hostile_prompts
from tests.support.records import RecordDatabase, add_counted_run


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "data"
    run_hostile_prompts(folder, "scripted")
    return folder


def call(folder, *arguments, code=0):
    done = CliRunner().invoke(cli, ["report", "--data", str(folder), *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_a_report_is_one_file_that_asks_for_nothing(streamed, tmp_path):
    file = tmp_path / "run.html"
    assert str(file) in call(streamed, file, "--stories", len(HOSTILE_TEXTS)).stdout
    page = file.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|action)=|<script|<link|@import|url\(""", re.sub(r">[^<]*<", "><", page))
    assert "default-src 'none'" in page and "notice bad" not in page
    for title in ("What was made", "Before and after", "Training", "Principles", "Stories", "What the run is made of"):
        assert f"{title}</h2>" in page or f"{title} <span" in page
    for dangerous in ("<img src=x", "<b onmouseover", "<svg/onload", "<script>document", "<h1>big"):
        assert dangerous not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", page)
    assert page.count('class="story"') == len(HOSTILE_TEXTS)


def test_a_report_goes_to_standard_output_or_is_json(streamed):
    assert call(streamed, "-").stdout.startswith("<!doctype html>")
    found = json.loads(call(streamed, "--json", "--stories", "2").stdout)
    assert found["run"] == "live" and len(found["stories"]["stories"]) == 2
    assert found["policies"]["policies"][0]["prompts"] == len(HOSTILE_TEXTS)
    assert found["counts"]["topics"][0]["records"] == len(HOSTILE_TEXTS)


def test_the_same_stories_each_time(streamed):
    def drawn():
        return [story["id"] for story in json.loads(call(streamed, "--json", "--stories", "3").stdout)["stories"]["stories"]]

    first = drawn()
    assert first == drawn() and len(set(first)) == 3


def test_what_is_not_there_is_said(streamed, tmp_path):
    with pytest.raises(Exception, match="there is no database"):
        CliRunner().invoke(cli, ["report", "--data", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(Exception, match="there is no run nowhere"):
        CliRunner().invoke(cli, ["report", "--data", str(streamed), "--run", "nowhere"], catch_exceptions=False)
    add_counted_run(RecordDatabase(tmp_path / "charter.duckdb"))
    with pytest.raises(Exception, match="there is no run in"):
        CliRunner().invoke(cli, ["report", "--data", str(tmp_path)], catch_exceptions=False)
