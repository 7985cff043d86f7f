"""The dashboard without a browser: who may ask, what a view and its JSON twin say, also when something is missing."""

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
from tests.support.dashboard import HOSTILE_TEXTS, make_setting_flags, run_hostile_prompts
from tests.support.records import RecordDatabase, add_counted_run, make_prompt

PAGES = ("/", "/stories", "/preferences", "/training", "/dead-letters", "/sql", "/sql?q=SELECT+42+AS+answer", "/runs")
HERE = "http://localhost:8400"


def settings_of(folder):
    return load_settings(make_setting_flags(folder, "scripted"), environment={})[0]


def visit(settings, token=None, base=HERE):
    return TestClient(Dashboard(settings).build_app(token), base_url=base, follow_redirects=False)


def twin(path):
    return "/api/pipeline" if path == "/" else "/api" + path


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The folder of a run of the scripted model on hostile prompts, one of which no stage can read."""
    folder = tmp_path_factory.mktemp("dashboard") / "data"
    run_hostile_prompts(folder, "scripted")
    return folder


@pytest.fixture
def client(streamed):
    with visit(settings_of(streamed)) as found:
        yield found


@pytest.fixture
def own(streamed, tmp_path):
    """A copy of the run that a test may change."""
    folder = tmp_path / "data"
    shutil.copytree(streamed, folder)
    return folder


# What there is to see


@pytest.mark.parametrize("path", PAGES)
def test_every_view_is_a_page_and_has_a_twin(client, path):
    page, answer = client.get(path), client.get(twin(path))
    assert (page.status_code, answer.status_code) == (200, 200)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    found = answer.json()
    assert found["trouble"] is None and (found["data"] is not None or path == "/sql")
    assert f'href="{twin(path)}"'.replace("+", "%20") in page.text.replace("+", "%20")


def test_a_view_that_has_not_changed_is_not_sent_again(client):
    first = client.get("/runs")
    again = client.get("/runs", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_pages_reach_nothing_outside_and_allow_no_inline_script(client):
    for path in PAGES:
        page = client.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not re.findall(r"<script(?! src=\"/static/)", page.text)
        assert not re.findall(r"""(?:src|href|action)=["']?(?:https?:)?//""", page.text)
        assert not re.findall(r"\son[a-z]+=|\sstyle=", re.sub(r">[^<]*<", "><", page.text))


def test_a_story_shows_what_became_of_its_prompt(client):
    stories = client.get("/api/stories").json()["data"]["stories"]
    assert len(stories) == len(HOSTILE_TEXTS)
    prompt = next(story["prompt_id"] for story in stories if story["rounds"])
    story = client.get(f"/api/stories/{prompt}").json()["data"]
    assert story["answers"] and story["chains"][0]["end_reason"] and story["preferences"][0]["p_forward"] is not None
    page = client.get(f"/stories/{prompt}").text
    assert "<ins>" in page and "A shown first" in page and "B shown first" in page


def test_search_and_filters(client):
    def found(**wanted):
        return client.get("/api/stories", params=wanted).json()["data"]["stories"]

    every = found()
    assert [story["prompt_id"] for story in found(q="onmouseover")] == [
        s["prompt_id"] for s in every if "onmouseover" in s["prompt"]
    ]
    assert found(q=every[0]["prompt_id"][:8])[0]["prompt_id"] == every[0]["prompt_id"]
    assert found(q="no such words at all") == []
    assert found(q="100%_'\"\\") == []
    assert len(found(end_reason=every[0]["end_reason"])) == sum(
        story["end_reason"] == every[0]["end_reason"] for story in every
    )
    assert found(policy="1") == [] and len(found(policy="0")) == len(every)
    assert client.get("/api/stories", params={"before": "x"}).json()["trouble"]["why"] == "it must be a whole number"


def test_pages_of_stories(tmp_path):
    world = RecordDatabase(tmp_path / "charter.duckdb")
    add_counted_run(world)
    world.add(*(make_prompt(f"number {n}") for n in range(60)))
    with visit(settings_of(tmp_path)) as client:
        seen, before = [], None
        while True:
            page = client.get("/api/stories", params={"before": before} if before else {}).json()["data"]
            seen += [story["prompt_id"] for story in page["stories"]]
            before = page["older"]
            if before is None:
                break
        assert len(seen) == len(set(seen)) == 64


def test_stats_views_are_those_that_were_counted_by_hand(tmp_path):
    """The records of tests/engine/test_stats_views.py, through the page's own questions."""
    add_counted_run(RecordDatabase(tmp_path / "charter.duckdb"))
    with visit(settings_of(tmp_path)) as client:
        found = client.get("/api/preferences").json()["data"]
    care = next(row for row in found["principles"] if row["principle"] == "care")
    harm = next(row for row in found["principles"] if row["principle"] == "harm")
    assert (care["asked"], care["compared"], care["wins"], care["refused"]) == (5, 4, 3.0, 1)
    assert (harm["answered"], harm["fired"]) == (5, 3) and harm["fire_share"] == pytest.approx(0.6)
    low, high = care["win_interval"]  # Wilson's for 3 of 4
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert sum(found["labels"]) == 6 + 2 and found["agreement"][0]["pairs"] == 3
    assert found["human_calibration"]["n"] == 3


def test_a_long_training_shows_its_newest_versions(tmp_path):
    """More versions and steps than are taken: what is left out is the oldest, and policy 0 stays to be compared with."""
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
    with visit(settings_of(tmp_path)) as client:
        found = client.get("/api/training").json()["data"]
        page = client.get("/training").text
    assert [update["version"] for update in found["updates"]] == list(range(41, versions + 1))
    assert found["frontier"][-1]["version"] == versions
    assert found["phases"][0]["curves"][0]["points"][-1][1] > steps - 200
    rows = page.split("Versions in time")[-1].split("</tbody>")[0].count("<tr")
    assert rows == 1 + 12 and "1 more" in page and "Earlier ones" in page


def test_what_each_policy_does_is_bounded_from_the_newest():
    rows = [{"policy_version": n, "share": n / 600, "span": (0.0, 1.0), "reward": None} for n in range(600)]
    drawn = charts.draw_by_version(rows, "share", "span", "flawed")
    assert drawn.count("<circle") == 600 and "policy 599: 0.998 (95 % interval 0 to 1)" in drawn
    assert charts.draw_by_version(rows, "reward", None, "reward") == ""


def test_ticks_are_written_as_people_read_them():
    assert [charts.format_tick(value) for value in (20_000.0, 1_500_000.0, 2e9, 0.5, 0.0002)] == [
        "20,000", "1,500,000", "2e9", "0.5", "2e-4",
    ]  # fmt: skip


# Hostile text


def test_hostile_text_is_inert_on_every_page(client):
    ids = [story["prompt_id"] for story in client.get("/api/stories").json()["data"]["stories"]]
    pages = [*PAGES, *(f"/stories/{one}" for one in ids), "/sql?q=SELECT+messages+FROM+prompts"]
    for path in pages:
        page = client.get(path).text
        for dangerous in ("<img src=x", "<b onmouseover", "<svg/onload", "<script>document", "<h1>big"):
            assert dangerous not in page, path
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", page), path
    whole = "".join(client.get(f"/stories/{one}").text for one in ids)
    assert "U+202E" in whole and "U+001B" in whole and "&lt;script&gt;document" in whole


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_in_the_address(client, text):
    names = {"/stories": ("q", "tag", "run"), "/dead-letters": ("retried", "stage"), "/sql": ("q",), "/": ("run",)}
    for path in names:
        page = client.get(path, params=dict.fromkeys(names[path], text))
        assert page.status_code == 200
        assert "<script>document" not in page.text and "<img src=x" not in page.text
    assert client.get("/runs/" + quote(text)).status_code == 404


def test_text_is_shown_whole_up_to_a_limit():
    assert escape_text("a" * 30, max_length=10) == 'aaaaaaaaaa<span class="cut"> … 20 more characters</span>'
    assert escape_text("line\n\ttab") == "line\n\ttab"
    assert 'title="right-to-left override"' in escape_text("\u202e")


def test_word_changes_lead_from_one_text_to_the_other():
    before, after = "the old house by the sea", "the new red house by a sea"
    changes = diff_words(before, after)
    assert "".join(text for kind, text in changes if kind != "removed") == after
    assert [text.strip() for kind, text in changes if kind == "removed"] == ["old", "the"]
    assert [text.strip() for kind, text in changes if kind == "added"] == ["new red", "a"]
    assert render_diff("x <b>", "y <b>") == "<del>x </del><ins>y </ins>&lt;b&gt;"
    assert "too long" in render_diff("a " * 5000, "b " * 5000)


def test_json_has_no_value_that_json_has_not():
    assert to_json_value({"a": float("nan"), 1: [float("inf"), b"\x00\x01"]}) == {"a": None, "1": [None, "2 bytes"]}


# Who may ask


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example", ""])
def test_another_name_in_the_host_header_is_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 403
    assert client.get("/api/stories", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8400", "127.0.0.1:8400", "[::1]:8400", "LOCALHOST"])
def test_this_machine_has_these_names(client, host):
    assert client.get("/runs", headers={"Host": host}).status_code == 200


def test_other_sites_pages_are_refused(client):
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert client.get("/api/stories", headers=cross).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/sql?q=SELECT+1", headers=link).status_code == 403


FORM = {"stage": "respond", "kind": "DECODE", "error": "x"}


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:9"},
     {"Origin": HERE, "Sec-Fetch-Site": "cross-site"}, {"Origin": HERE, "Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
def test_a_retry_needs_this_page_as_its_origin(client, headers):
    assert client.post("/dead-letters/retry", data=FORM, headers=headers).status_code == 403


def test_only_a_post_retries(client):
    assert client.get("/dead-letters/retry").status_code == 405
    assert client.post("/dead-letters", headers={"Origin": HERE}).status_code == 405
    assert client.post("/dead-letters/retry", content=b"x" * 20_000, headers={"Origin": HERE}).status_code == 413
    nothing = client.post("/dead-letters/retry", data={}, headers={"Origin": HERE})
    assert nothing.status_code == 400 and "the form names no dead letters" in nothing.text


def test_elsewhere_every_request_needs_the_token(streamed):
    with visit(settings_of(streamed), token="s3cret", base="http://box.example:8400") as client:
        for path in ("/", "/api/stories", "/static/charter.css", "/?token=wrong", "/?token="):
            assert client.get(path).status_code == 401
        assert client.get("/runs", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/runs", headers={"Cookie": "charter_token=wrong"}).status_code == 401
        given = client.get("/stories?q=x&token=s3cret")
        assert (given.status_code, given.headers["location"]) == (303, "/stories?q=x")
        cookie = given.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/stories").status_code == 200
        page = client.get("/").text
        assert "s3cret" not in page
        assert client.post("/dead-letters/retry", data=FORM, headers={"Origin": HERE}).status_code == 403


def test_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.5", "box")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert format_address("::1", 8400, None) == "http://[::1]:8400/"
    assert format_address("10.0.0.1", 8400, "t") == "http://10.0.0.1:8400/?token=t"


# Dead letters


def test_a_group_is_tried_again_once(own):
    settings = settings_of(own)
    with visit(settings) as client:
        group = next(g for g in client.get("/api/dead-letters").json()["data"]["groups"] if g["stage"] == "respond")
        assert group["kind"] == "DECODE" and group["open"] == group["letters"] == 1
        form = {name: group[name] for name in ("stage", "kind", "error")}
        page = client.get("/dead-letters", params=form).text
        assert "&lt;b&gt;key&lt;/b&gt;" in page and "00 6e 6f 74 20 61" in page
        done = client.post("/dead-letters/retry", data=form, headers={"Origin": HERE})
        assert (done.status_code, done.headers["location"]) == (303, "/dead-letters?retried=1")
        assert "1 message" in client.get(done.headers["location"]).text
        # Before the sink has seen the retry, the log knows of it.
        again = client.post("/dead-letters/retry", data=form, headers={"Origin": HERE})
        assert again.headers["location"] == "/dead-letters?retried=0"
    log = sqlite3.connect(own / "log.sqlite")
    assert log.execute("SELECT count(*) FROM messages WHERE topic = 'prompts'").fetchall()
    log.close()


# SQL


def test_documented_queries_run(client):
    for query in queries.load_example_queries():
        answer = client.get("/api/sql", params={"q": query["sql"]}).json()
        assert answer["trouble"] is None and answer["data"]["columns"], query["name"]


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE raw.prompts", "INSERT INTO raw.runs SELECT * FROM raw.runs", "COPY prompts TO '/tmp/stolen.csv'",
     "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/etc/passwd')", "ATTACH '/tmp/x.duckdb'",
     "INSTALL httpfs",
     "SET enable_external_access = true", "PRAGMA database_list; DROP VIEW prompts", "CREATE TABLE t AS SELECT 1", "SELEC 1"],
)  # fmt: skip
def test_sql_reads_and_nothing_else(client, statement):
    answer = client.get("/api/sql", params={"q": statement})
    assert answer.status_code == 200 and answer.json()["data"] is None and answer.json()["trouble"]["what"]
    page = client.get("/sql", params={"q": statement})
    assert page.status_code == 200 and "notice bad" in page.text


def test_a_long_query_is_cut(client):
    started = time.monotonic()
    answer = client.get(
        "/api/sql", params={"q": "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range + b.range = 3"}
    )
    assert "took longer than" in answer.json()["trouble"]["what"]
    assert time.monotonic() - started < 8


def test_one_value_that_cannot_be_interrupted_ends_on_time(client):
    """DuckDB looks for an interruption between vectors, and one row is one vector."""
    started = time.monotonic()
    answer = client.get("/api/sql", params={"q": "SELECT range(100000000)"}).json()
    assert answer["data"] is None and "was ended" in answer["trouble"]["what"]
    assert time.monotonic() - started < 8
    assert client.get("/api/sql", params={"q": "SELECT 1 AS one"}).json()["data"]["rows"] == [[1]]


def test_an_answer_too_long_for_a_page_is_said(client):
    answer = client.get("/api/sql", params={"q": "SELECT repeat('x', 5000000) AS x"}).json()
    assert answer["data"] is None and "too long" in answer["trouble"]["what"]


# What can be missing


def test_without_a_database_every_page_says_what_to_type(tmp_path):
    with visit(settings_of(tmp_path / "nothing")) as client:
        for path in PAGES:
            page = client.get(path)
            assert page.status_code == 200 and "charter produce" in page.text, path
            assert client.get(twin(path)).json()["data"] is None
    assert not (tmp_path / "nothing" / "charter.duckdb").exists()


def test_a_database_of_another_version(own):
    with duckdb.connect(str(own / "charter.duckdb")) as connection:
        connection.execute("UPDATE raw.sink_state SET version = 1")
    with visit(settings_of(own)) as client:
        page = client.get("/stories")
        assert page.status_code == 200 and "use another folder" in page.text
        assert "another version of Charter" in client.get("/api/stories").json()["trouble"]["what"]


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "charter.duckdb").write_bytes(b"not a database at all" * 500)
    with visit(settings_of(tmp_path)) as client:
        assert "cannot be opened" in client.get("/").text


def test_a_busy_database_shows_what_was_known(own, monkeypatch):
    monkeypatch.setattr("charter.dashboard.query_cache.LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr("charter.dashboard.query_cache.MIN_REFRESH_INTERVAL_S", 0.0)
    monkeypatch.setattr("charter.dashboard.query_cache.MAX_AGE_S", 0.0)
    with visit(settings_of(own)) as client:
        known_before = client.get("/api/stories").json()["data"]
        with AccessLock(own / "charter.gate").write_lock(1.0):
            stale = client.get("/api/stories")
            assert stale.json()["data"] == known_before and "busy" in stale.json()["trouble"]["what"]
            fresh = client.get("/api/runs")
            assert fresh.status_code == 503 and fresh.json()["data"] is None
        assert client.get("/api/runs").json()["trouble"] is None


def test_a_run_that_is_deleted_while_it_is_shown(own):
    with visit(settings_of(own)) as client:
        run = client.get("/api/runs").json()["data"]["listed"][0]["run"]
        prompt = client.get("/api/stories").json()["data"]["stories"][0]["prompt_id"]
        shown = [f"/runs/{run}", f"/?run={run}", f"/stories/{prompt}", f"/training?run={run}"]
        assert [client.get(path).status_code for path in shown] == [200] * 4
        with duckdb.connect(str(own / "charter.duckdb")) as connection:
            tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'raw'").fetchall()
            for (table,) in tables:
                if table not in ("sink_state", "sink_offsets"):
                    connection.execute(f"DELETE FROM raw.{table}")
            connection.execute("CHECKPOINT")
        time.sleep(1.6)  # an answer this young stands
        assert [client.get(path).status_code for path in shown] == [404, 200, 404, 200]
        assert "(any more)" in client.get(f"/runs/{run}").text
    shutil.rmtree(own)


def test_the_folder_is_deleted_while_it_is_shown(own):
    with visit(settings_of(own)) as client:
        assert client.get("/runs").status_code == 200
        shutil.rmtree(own)
        time.sleep(1.6)
        page = client.get("/runs")
        assert page.status_code == 200 and "there is no database" in page.text


def test_a_log_that_is_away_is_said_beside_the_counts(own):
    settings = load_settings(make_setting_flags(own, "scripted", **{"bus.address": "kafka://127.0.0.1:9"}), environment={})[0]
    with visit(settings) as client:
        found = client.get("/api/pipeline").json()
        ends = time.monotonic() + 30
        while found["log"]["trouble"] is None and time.monotonic() < ends:
            found = client.get("/api/pipeline").json()
            threading.Event().wait(0.1)
        assert found["log"]["trouble"] and found["data"]["topics"][0]["records"] == len(HOSTILE_TEXTS)


# The sink comes first


def test_a_flush_is_delayed_by_at_most_the_read_limit(own):
    """While visitors ask the heaviest questions without a pause, a writer gets the file within the read limit."""
    from engine.store import QUERY_LIMIT_S

    slow = "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range + b.range = 3"
    dashboard = Dashboard(settings_of(own))
    stop, waits = threading.Event(), []

    def ask():
        while not stop.is_set():
            dashboard.query_cache.run_once(lambda ask: queries.run_statement(ask, slow))

    visitors = [threading.Thread(target=ask) for _ in range(2)]
    for visitor in visitors:
        visitor.start()
    store = open_store(settings_of(own))
    for _ in range(2):
        threading.Event().wait(0.2)
        started = time.monotonic()
        with store.open_write_session() as connection:
            waits.append(time.monotonic() - started)
            connection.execute("UPDATE raw.sink_state SET next_seq = next_seq")
    stop.set()
    for visitor in visitors:
        visitor.join()
    assert max(waits) < QUERY_LIMIT_S + 1.0, waits


def test_the_dashboard_is_out_of_the_way_of_other_verbs():
    script = (
        "import sys; from charter.cli import cli; "
        "print([m for m in ('starlette', 'uvicorn', 'jinja2', 'duckdb', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
