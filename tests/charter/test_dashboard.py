"""The dashboard without a browser: access control, the views and their JSON versions, and missing dependencies."""

import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import duckdb
import pytest
from starlette.testclient import TestClient

from charter.connect import open_store
from charter.dashboard import charts, training_view
from charter.dashboard import sql_view as queries
from charter.dashboard.app import Dashboard
from charter.dashboard.rendering import diff_words, escape_text, render_diff, to_json_value
from charter.dashboard.serve import format_address, is_loopback
from engine.access_lock import AccessLock
from engine.settings import load_settings
from schemas.codec import decode_record
from schemas.records import LabelSource, Outcome, Preference
from tests.support.dashboard import HOSTILE_TEXTS, copy_hostile_run, make_setting_flags
from tests.support.records import RecordDatabase, add_counted_run, make_prompt
from tests.support.waiting import wait_until

PAGES = (
    "/",
    "/traces",
    "/preferences",
    "/labels",
    "/training",
    "/evaluation",
    "/dead-letters",
    "/sql",
    "/sql?q=SELECT+42+AS+answer",
    "/runs",
)
BASE_URL = "http://localhost:8400"


def load_test_settings(folder):
    return load_settings(make_setting_flags(folder, "scripted"), environment={})[0]


def open_client(settings, token=None, base=BASE_URL):
    return TestClient(Dashboard(settings).build_app(token), base_url=base, follow_redirects=False)


def get_json_path(path):
    return "/api/pipeline" if path == "/" else "/api" + path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The data folder of a run of the scripted model on hostile prompts, one of which no stage can decode."""
    return copy_hostile_run(tmp_path_factory.mktemp("dashboard") / "data")


@pytest.fixture
def client(run_folder):
    with open_client(load_test_settings(run_folder)) as test_client:
        yield test_client


@pytest.fixture
def run_copy(run_folder, tmp_path):
    """A copy of the data folder that a test can change."""
    folder = tmp_path / "data"
    shutil.copytree(run_folder, folder)
    return folder


# Views


@pytest.mark.parametrize("path", PAGES)
def test_each_view_has_a_page_and_a_json_version(client, path):
    page, response = client.get(path), client.get(get_json_path(path))
    assert (page.status_code, response.status_code) == (200, 200)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    view = response.json()
    assert view["error"] is None and (view["data"] is not None or path == "/sql")
    assert f'href="{get_json_path(path)}"'.replace("+", "%20") in page.text.replace("+", "%20")


def test_an_unchanged_view_returns_304_without_a_body(client):
    wait_until(lambda: 'data-activity="stopped"' in client.get("/runs").text)  # the page shows which workers run
    first = client.get("/runs")
    second = client.get("/runs", headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")


def test_pages_load_no_external_files_and_allow_no_inline_script(client):
    for path in PAGES:
        page = client.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not re.findall(r"<script(?! src=\"/static/)", page.text)
        assert not re.findall(r"""(?:src|href|action)=["']?(?:https?:)?//""", page.text)
        assert not re.findall(r"\son[a-z]+=|\sstyle=", re.sub(r">[^<]*<", "><", page.text))


def test_a_trace_shows_the_records_of_its_prompt(client):
    traces = client.get("/api/traces").json()["data"]["traces"]
    assert len(traces) == len(HOSTILE_TEXTS)
    prompt_id = next(trace["prompt_id"] for trace in traces if trace["rounds"])
    trace = client.get(f"/api/traces/{prompt_id}").json()["data"]
    assert trace["responses"] and trace["chains"][0]["end_reason"] and trace["preferences"][0]["p_forward"] is not None
    page = client.get(f"/traces/{prompt_id}").text
    assert "<ins>" in page and "A shown first" in page and "B shown first" in page
    # Each step has the prompts of its model, verified, its option log-probabilities, and what it used.
    steps = [*trace["responses"], *trace["chains"][0]["steps"], *trace["preferences"]]
    sent = trace["sent_prompts"]
    assert all(sent[step["record_id"]]["problem"] == "" and sent[step["record_id"]]["prompts"] for step in steps)
    assert page.count(">verified</span>") == page.count(" completion tokens<") == page.count(">no price<") == len(steps)
    assert "Lines that begin with &gt; are quoted" in page and "Option log-probabilities" in page
    assert trace["preferences"][0]["votes"][0]["options"][0]["logprob_first"] < 0


def test_search_and_filters_select_traces(client):
    def search(**parameters):
        return client.get("/api/traces", params=parameters).json()["data"]["traces"]

    all_traces = search()
    assert [trace["prompt_id"] for trace in search(q="onmouseover")] == [
        s["prompt_id"] for s in all_traces if "onmouseover" in s["prompt"]
    ]
    assert search(q=all_traces[0]["prompt_id"][:8])[0]["prompt_id"] == all_traces[0]["prompt_id"]
    assert search(q="no such words at all") == []
    assert search(q="100%_'\"\\") == []
    assert len(search(end_reason=all_traces[0]["end_reason"])) == sum(
        trace["end_reason"] == all_traces[0]["end_reason"] for trace in all_traces
    )
    assert search(policy="1") == [] and len(search(policy="0")) == len(all_traces)
    assert client.get("/api/traces", params={"before": "x"}).json()["error"]["why"] == "it must be a whole number"


def test_pages_list_each_trace_once(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    add_counted_run(database)
    database.add(*(make_prompt(f"number {n}") for n in range(60)))
    with open_client(load_test_settings(tmp_path)) as client:
        prompt_ids, before = [], None
        while True:
            page = client.get("/api/traces", params={"before": before} if before else {}).json()["data"]
            prompt_ids += [trace["prompt_id"] for trace in page["traces"]]
            before = page["next_before"]
            if before is None:
                break
        assert len(prompt_ids) == len(set(prompt_ids)) == 64


def test_preference_statistics_match_a_manual_count(tmp_path):
    """The records are those of tests/engine/test_stats_views.py; the queries are those of the page."""
    add_counted_run(RecordDatabase(tmp_path / "charter.duckdb"))
    with open_client(load_test_settings(tmp_path)) as client:
        statistics = client.get("/api/preferences").json()["data"]
    care = next(row for row in statistics["principles"] if row["principle"] == "care")
    harm = next(row for row in statistics["principles"] if row["principle"] == "harm")
    assert (care["asked"], care["compared"], care["wins"], care["refused"]) == (5, 4, 3.0, 1)
    assert (harm["answered"], harm["fired"]) == (5, 3) and harm["fire_share"] == pytest.approx(0.6)
    low, high = care["win_interval"]  # Wilson's interval for 3 of 4
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert sum(statistics["label_histogram"]) == 6 + 2 and statistics["agreement"][0]["pairs"] == 3
    assert statistics["human_calibration"]["num_pairs"] == 3


def test_a_long_training_shows_the_newest_versions(tmp_path):
    """With more versions and steps than the limits, the view omits the oldest."""
    add_counted_run(RecordDatabase(tmp_path / "charter.duckdb"))
    versions, steps = training_view.MAX_VERSIONS + 40, training_view.MAX_STEPS + 7
    with duckdb.connect(str(tmp_path / "charter.duckdb")) as database:
        database.execute(
            """INSERT INTO raw.policies BY NAME SELECT uuid() AS record_id, 'live' AS run_id, 'POLICY' AS kind, i AS version,
                      'ppo' AS phase, i - 1 AS base_version, 'file:///p' AS uri, now()::TIMESTAMP AS created_at,
                      MAP {'kl_ref': 0.1 * i, 'reward_mean': i, 'other': 1.0} AS metrics, 1000 + i AS commit_seq,
                      false AS is_duplicate FROM range(1, ?) t(i)""",
            [versions + 1],
        )
        database.execute(
            """INSERT INTO raw.metrics BY NAME SELECT uuid() AS record_id, 'live' AS run_id, 'ppo' AS phase, 1 AS batch_number,
                      i AS step, MAP {'kl_ref': i::DOUBLE} AS metrics, now()::TIMESTAMP AS created_at,
                      5000 + i AS commit_seq, false AS is_duplicate FROM range(?) t(i)""",
            [steps],
        )
    with open_client(load_test_settings(tmp_path)) as client:
        training = client.get("/api/training").json()["data"]
        page = client.get("/training").text
    assert [update["version"] for update in training["updates"]] == list(range(41, versions + 1))
    assert training["frontier"][-1]["version"] == versions
    assert training["phases"][0]["curves"][0]["points"][-1][1] > steps - 200
    rows = page.split("Versions over time")[-1].split("</tbody>")[0].count("<tr")
    assert rows == 1 + 12 and "1 more" in page and "Show all" in page


def test_chart_by_version_draws_one_marker_per_policy():
    rows = [{"policy_version": n, "share": n / 600, "interval": (0.0, 1.0), "reward": None} for n in range(600)]
    chart = charts.draw_by_version(rows, "share", "interval", "flawed")
    assert chart.count("<circle") == 600 and "policy 599: 0.998 (95 % interval 0 to 1)" in chart
    assert charts.draw_by_version(rows, "reward", None, "reward") == ""


def test_labels_of_close_values_fit_into_the_chart():
    points = [(1, 0.69314718, "a"), (2, 0.69314721, "b")]
    chart = charts.draw_curve(points, "Loss", "step", "nats")
    labels = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end" class="tick">([^<]+)<', chart)
    assert max(len(label) for _, label in labels) > 8
    assert all(float(x) - 6.6 * len(label) >= 0 for x, label in labels)


def test_steps_have_the_numbers_of_the_trainer():
    rows = [{"batch_number": batch, "step": step, "metrics": {"loss": 1.0}} for batch in (4, 7) for step in (1, 2)]
    curves = training_view._build_curves("reward", rows)
    assert [(x, name) for x, _, name in curves["curves"][0]["points"]] == [
        (1, "batch 4, step 1"), (2, "batch 4, step 2"), (3, "batch 7, step 1"), (4, "batch 7, step 2"),
    ]  # fmt: skip
    long = [{"batch_number": 1, "step": step, "metrics": {"loss": 1.0}} for step in range(1, 602)]
    (name, *_) = (name for _, _, name in training_view._build_curves("reward", long)["curves"][0]["points"])
    assert name == "mean of batch 1, step 1 to batch 1, step 3"


def test_ticks_use_readable_number_formats():
    assert [charts.format_tick(value) for value in (20_000.0, 1_500_000.0, 2e9, 0.5, 0.0002)] == [
        "20,000", "1,500,000", "2e9", "0.5", "2e-4",
    ]  # fmt: skip


# Hostile text


def test_hostile_text_is_escaped_on_every_page(client):
    prompt_ids = [trace["prompt_id"] for trace in client.get("/api/traces").json()["data"]["traces"]]
    pages = [*PAGES, *(f"/traces/{prompt_id}" for prompt_id in prompt_ids), "/sql?q=SELECT+messages+FROM+prompts"]
    for path in pages:
        page = client.get(path).text
        for dangerous in ("<img src=x", "<b onmouseover", "<svg/onload", "<script>document", "<h1>big"):
            assert dangerous not in page, path
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", page), path
    all_pages = "".join(client.get(f"/traces/{prompt_id}").text for prompt_id in prompt_ids)
    assert "U+202E" in all_pages and "U+001B" in all_pages and "&lt;script&gt;document" in all_pages


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_in_the_address_is_escaped(client, text):
    parameters = {"/traces": ("q", "tag", "run"), "/dead-letters": ("retried", "stage"), "/sql": ("q",), "/": ("run",)}
    for path, names in parameters.items():
        page = client.get(path, params=dict.fromkeys(names, text))
        assert page.status_code == 200
        assert "<script>document" not in page.text and "<img src=x" not in page.text
    assert client.get("/runs/" + quote(text)).status_code == 404


def test_escape_text_truncates_long_text():
    assert escape_text("a" * 30, max_length=10) == 'aaaaaaaaaa<span class="truncated"> … 20 more characters</span>'
    assert escape_text("line\n\ttab") == "line\n\ttab"
    assert 'title="right-to-left override"' in escape_text("\u202e")


def test_diff_words_reconstructs_both_texts():
    before, after = "the old house by the sea", "the new red house by a sea"
    changes = diff_words(before, after)
    assert "".join(text for kind, text in changes if kind != "removed") == after
    assert [text.strip() for kind, text in changes if kind == "removed"] == ["old", "the"]
    assert [text.strip() for kind, text in changes if kind == "added"] == ["new red", "a"]
    assert render_diff("x <b>", "y <b>") == "<del>x </del><ins>y </ins>&lt;b&gt;"
    assert "too long" in render_diff("a " * 5000, "b " * 5000)


def test_to_json_value_replaces_values_that_json_lacks():
    assert to_json_value({"a": float("nan"), 1: [float("inf"), b"\x00\x01"]}) == {"a": None, "1": [None, "2 bytes"]}


# Access control


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_header_is_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 403
    assert client.get("/api/traces", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8400", "127.0.0.1:8400", "[::1]:8400", "LOCALHOST"])
def test_loopback_host_headers_are_allowed(client, host):
    assert client.get("/runs", headers={"Host": host}).status_code == 200


def test_requests_from_other_sites_are_refused(client):
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert client.get("/api/traces", headers=cross).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/sql?q=SELECT+1", headers=link).status_code == 403


FORM = {"stage": "respond", "kind": "DECODE", "error": "x"}


@pytest.mark.parametrize("path", ["/dead-letters/retry", "/labels"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:9"},
     {"Origin": BASE_URL, "Sec-Fetch-Site": "cross-site"}, {"Origin": BASE_URL, "Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
def test_an_action_requires_the_origin_of_the_dashboard(client, path, headers):
    assert client.post(path, data=FORM, headers=headers).status_code == 403


def test_a_retry_requires_a_valid_post(client):
    assert client.get("/dead-letters/retry").status_code == 405
    assert client.post("/dead-letters", headers={"Origin": BASE_URL}).status_code == 405
    assert client.post("/dead-letters/retry", content=b"x" * 20_000, headers={"Origin": BASE_URL}).status_code == 413
    empty = client.post("/dead-letters/retry", data={}, headers={"Origin": BASE_URL})
    assert empty.status_code == 400 and "the form selects no dead letters" in empty.text


def test_requests_beyond_loopback_require_the_token(run_folder):
    with open_client(load_test_settings(run_folder), token="s3cret", base="http://box.example:8400") as client:
        for path in ("/", "/api/traces", "/static/charter.css", "/?token=wrong", "/?token="):
            assert client.get(path).status_code == 401
        assert client.get("/runs", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/runs", headers={"Cookie": "charter_token=wrong"}).status_code == 401
        redirect = client.get("/traces?q=x&token=s3cret")
        assert (redirect.status_code, redirect.headers["location"]) == (303, "/traces?q=x")
        cookie = redirect.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/traces").status_code == 200
        page = client.get("/").text
        assert "s3cret" not in page
        for path in ("/dead-letters/retry", "/labels"):
            assert client.post(path, data=FORM, headers={"Origin": BASE_URL}).status_code == 403
    with open_client(load_test_settings(run_folder), token="s3cret", base="http://box.example:8400") as client:
        origin = {"Origin": "http://box.example:8400"}
        assert client.post("/labels", data=FORM, headers=origin).status_code == 401


def test_loopback_addresses_need_no_token():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.5", "box")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert format_address("::1", 8400, None) == "http://[::1]:8400/"
    assert format_address("10.0.0.1", 8400, "t") == "http://10.0.0.1:8400/?token=t"


# Dead letters


def test_a_group_of_dead_letters_is_retried_once(run_copy):
    settings = load_test_settings(run_copy)
    with open_client(settings) as client:
        group = next(g for g in client.get("/api/dead-letters").json()["data"]["groups"] if g["stage"] == "respond")
        assert group["kind"] == "DECODE" and group["open"] == group["count"] == 1
        form = {name: group[name] for name in ("stage", "kind", "error")}
        page = client.get("/dead-letters", params=form).text
        assert "&lt;b&gt;key&lt;/b&gt;" in page and "00 6e 6f 74 20 61" in page
        response = client.post("/dead-letters/retry", data=form, headers={"Origin": BASE_URL})
        assert (response.status_code, response.headers["location"]) == (303, "/dead-letters?retried=1")
        assert "Published 1 record to the log again" in client.get(response.headers["location"]).text
        # The sink has not read the retry yet; the log shows that the dead letter was retried.
        second = client.post("/dead-letters/retry", data=form, headers={"Origin": BASE_URL})
        assert second.headers["location"] == "/dead-letters?retried=0"
    log = sqlite3.connect(run_copy / "log.sqlite")
    sql = "SELECT count(*) FROM messages JOIN topics ON topics.id = messages.topic WHERE topics.name = 'prompts'"
    assert log.execute(sql).fetchall() == [(len(HOSTILE_TEXTS) + 2,)]  # the prompts, the broken record and its retry
    log.close()


# Labels


def post_label(client, pair, key, **more):
    form = {"id": pair["record_id"], "key": key, "labeler": "Ana Müller", "skip": "0"} | more
    return client.post("/labels", data=form, headers={"Origin": BASE_URL})


def read_log_labels(folder):
    with sqlite3.connect(folder / "log.sqlite") as log:
        sql = "SELECT value FROM messages JOIN topics ON topics.id = messages.topic WHERE topics.name = 'preferences'"
        records = [decode_record(value, Preference) for (value,) in log.execute(sql)]
    return [record for record in records if record.label_source is LabelSource.HUMAN]


def test_a_label_of_the_page_is_a_record_with_the_name_of_the_person(run_copy):
    with open_client(load_test_settings(run_copy)) as client:
        view = client.get("/api/labels").json()["data"]
        pair = view["pair"]
        assert (view["num_labeled"], view["num_pairs"]) == (0, len(HOSTILE_TEXTS)) and pair["questions"]
        # Nothing on the page reveals the judge's label, or which response is A.
        assert pair.keys() == {"record_id", "prompt_id", "messages", "principle_id", "questions", "source", "responses"}
        response = post_label(client, pair, "1")
        assert (response.status_code, response.headers["location"]) == (303, f"/labels?saved={pair['record_id']}")
        (label,) = read_log_labels(run_copy)
        better = label.response_a if label.p_a == 1.0 else label.response_b
        assert (label.parent_ids, label.labeler, better) == ([pair["record_id"]], "Ana Müller", pair["responses"][0])
        # No sink runs, so the label is only on the log. The pair is not shown again, and the page says why.
        page, second = client.get(response.headers["location"]).text, client.get("/api/labels").json()["data"]
        assert "1 label is on the log, but not in the database yet" in page and 'value="Ana Müller"' in page
        assert (second["num_labeled"], second["num_pending"]) == (1, 1)
        assert second["pair"]["record_id"] != pair["record_id"]
        assert post_label(client, second["pair"], "n", labeler="Ben").status_code == 303
        assert client.get("/api/labels", params={"skip": 1}).json()["data"]["pair"] is not None
    (label,) = (label for label in read_log_labels(run_copy) if label.labeler == "Ben")
    assert (label.outcome, label.p_a) == (Outcome.NOT_APPLICABLE, None)
    with open_client(load_test_settings(run_copy)) as client:  # a new server reads the labels from the log
        assert client.get("/api/labels").json()["data"]["num_labeled"] == 2
        again = client.get("/api/labels", params={"id": pair["record_id"]}).json()["data"]["pair"]
        assert again["responses"] == pair["responses"]


def test_a_form_that_is_no_label_is_refused(run_copy):
    with open_client(load_test_settings(run_copy)) as client:
        pair = client.get("/api/labels").json()["data"]["pair"]
        for more, message in (
            ({"labeler": " "}, "the name of the labeler cannot be"), ({"key": "3"}, "is not a label"),
            ({"id": "zzz"}, "matches no label of a judge"), ({"id": ""}, "matches no label of a judge"),
        ):  # fmt: skip
            response = client.post("/labels", data={"id": pair["record_id"], "key": "1", "labeler": "ana"} | more,
                                   headers={"Origin": BASE_URL})  # fmt: skip
            assert response.status_code == 400 and message in response.text, more
        assert "is not a number of pairs" in client.get("/labels", params={"skip": "x"}).text
        assert client.get("/labels", headers={"Cookie": "charter_labeler=%22%3Cb%3E"}).text.count("<b>") == 0
    assert read_log_labels(run_copy) == []


# SQL


def test_example_queries_run(client):
    for query in queries.load_example_queries():
        view = client.get("/api/sql", params={"q": query["sql"]}).json()
        assert view["error"] is None and view["data"]["columns"], query["name"]


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE raw.prompts", "INSERT INTO raw.runs SELECT * FROM raw.runs", "COPY prompts TO '/tmp/stolen.csv'",
     "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/etc/passwd')", "ATTACH '/tmp/x.duckdb'",
     "INSTALL httpfs",
     "SET enable_external_access = true", "PRAGMA database_list; DROP VIEW prompts", "CREATE TABLE t AS SELECT 1", "SELEC 1"],
)  # fmt: skip
def test_sql_allows_only_reads(client, statement):
    response = client.get("/api/sql", params={"q": statement})
    assert response.status_code == 200 and response.json()["data"] is None and response.json()["error"]["what"]
    page = client.get("/sql", params={"q": statement})
    assert page.status_code == 200 and "notice bad" in page.text


def test_a_long_query_is_interrupted(client):
    started = time.monotonic()
    response = client.get(
        "/api/sql", params={"q": "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range + b.range = 3"}
    )
    assert "took longer than" in response.json()["error"]["what"]
    assert time.monotonic() - started < 8


def test_a_query_that_duckdb_cannot_interrupt_is_killed(client):
    """DuckDB checks for interrupts between vectors, and this query builds a single value."""
    started = time.monotonic()
    view = client.get("/api/sql", params={"q": "SELECT range(100000000)"}).json()
    assert view["data"] is None and "was stopped" in view["error"]["what"]
    assert time.monotonic() - started < 8
    assert client.get("/api/sql", params={"q": "SELECT 1 AS one"}).json()["data"]["rows"] == [[1]]


def test_a_result_too_long_for_a_page_is_an_error(client):
    view = client.get("/api/sql", params={"q": "SELECT repeat('x', 5000000) AS x"}).json()
    assert view["data"] is None and "too long" in view["error"]["what"]


# Missing dependencies


def test_pages_without_a_database_name_the_command_to_type(tmp_path):
    with open_client(load_test_settings(tmp_path / "nothing")) as client:
        for path in PAGES:
            page = client.get(path)
            assert page.status_code == 200 and "charter produce" in page.text, path
            assert client.get(get_json_path(path)).json()["data"] is None
    assert not (tmp_path / "nothing" / "charter.duckdb").exists()


def test_a_database_of_another_version_is_an_error(run_copy):
    with duckdb.connect(str(run_copy / "charter.duckdb")) as connection:
        connection.execute("UPDATE raw.sink_state SET version = 1")
    with open_client(load_test_settings(run_copy)) as client:
        page = client.get("/traces")
        assert page.status_code == 200 and "use another folder" in page.text
        assert "another version of Charter" in client.get("/api/traces").json()["error"]["what"]


def test_an_invalid_database_file_is_an_error(tmp_path):
    (tmp_path / "charter.duckdb").write_bytes(b"not a database at all" * 500)
    with open_client(load_test_settings(tmp_path)) as client:
        assert "is damaged" in client.get("/").text


def test_a_busy_database_shows_the_last_data(run_copy, monkeypatch):
    monkeypatch.setattr("charter.dashboard.query_cache.LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr("charter.dashboard.query_cache.MIN_REFRESH_INTERVAL_S", 0.0)
    monkeypatch.setattr("charter.dashboard.query_cache.MAX_AGE_S", 0.0)
    with open_client(load_test_settings(run_copy)) as client:
        data_before = client.get("/api/traces").json()["data"]
        with AccessLock(run_copy / "charter.lock").write_lock(1.0):
            stale = client.get("/api/traces")
            assert stale.json()["data"] == data_before and "busy" in stale.json()["error"]["what"]
            fresh = client.get("/api/runs")
            assert fresh.status_code == 503 and fresh.json()["data"] is None
        assert client.get("/api/runs").json()["error"] is None


def test_pages_of_a_deleted_run_return_404(run_copy):
    with open_client(load_test_settings(run_copy)) as client:
        run = client.get("/api/runs").json()["data"]["runs"][0]["run"]
        prompt = client.get("/api/traces").json()["data"]["traces"][0]["prompt_id"]
        paths = [f"/runs/{run}", f"/?run={run}", f"/traces/{prompt}", f"/training?run={run}"]
        assert [client.get(path).status_code for path in paths] == [200] * 4
        with duckdb.connect(str(run_copy / "charter.duckdb")) as connection:
            tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'raw'").fetchall()
            for (table,) in tables:
                if table not in ("sink_state", "sink_offsets"):
                    connection.execute(f"DELETE FROM raw.{table}")
            connection.execute("CHECKPOINT")
        time.sleep(1.6)  # longer than MIN_REFRESH_INTERVAL_S
        assert [client.get(path).status_code for path in paths] == [404, 200, 404, 200]
        assert "This run is not in the database" in client.get(f"/runs/{run}").text
    shutil.rmtree(run_copy)


def test_pages_after_deletion_of_the_folder_show_an_error(run_copy):
    with open_client(load_test_settings(run_copy)) as client:
        assert client.get("/runs").status_code == 200
        shutil.rmtree(run_copy)
        time.sleep(1.6)
        page = client.get("/runs")
        assert page.status_code == 200 and "there is no database" in page.text


def test_an_unreachable_log_is_an_error_next_to_the_counts(run_copy):
    settings = load_settings(
        make_setting_flags(run_copy, "scripted", **{"bus.address": "kafka://127.0.0.1:9"}), environment={}
    )[0]
    with open_client(settings) as client:
        view = client.get("/api/pipeline").json()
        deadline = time.monotonic() + 30
        while view["lag"]["error"] is None and time.monotonic() < deadline:
            view = client.get("/api/pipeline").json()
            threading.Event().wait(0.1)
        assert view["lag"]["error"] and view["data"]["topics"][0]["records"] == len(HOSTILE_TEXTS)


# Isolation from the rest of Charter


def test_a_flush_is_delayed_by_at_most_the_read_limit(run_copy):
    """A writer gets the database within the read limit while other threads run heavy queries without a pause."""
    from engine.store import QUERY_LIMIT_S

    slow = "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range + b.range = 3"
    dashboard = Dashboard(load_test_settings(run_copy))
    stop, wait_times = threading.Event(), []

    def run_queries():
        while not stop.is_set():
            dashboard.query_cache.run_once(lambda query: queries.run_statement(query, slow))

    readers = [threading.Thread(target=run_queries) for _ in range(2)]
    for reader in readers:
        reader.start()
    store = open_store(load_test_settings(run_copy))
    for _ in range(2):
        threading.Event().wait(0.2)
        started = time.monotonic()
        with store.open_write_session() as connection:
            wait_times.append(time.monotonic() - started)
            connection.execute("UPDATE raw.sink_state SET next_seq = next_seq")
    stop.set()
    for reader in readers:
        reader.join()
    assert max(wait_times) < QUERY_LIMIT_S + 1.0, wait_times


def test_other_commands_do_not_import_the_dashboard_server():
    script = (
        "import sys; from charter.cli import cli; "
        "print([m for m in ('starlette', 'uvicorn', 'jinja2', 'duckdb', 'torch') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
