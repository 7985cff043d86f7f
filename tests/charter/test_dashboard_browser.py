"""The dashboard in Chromium: all pages of a real run, wide and narrow, light and dark, with hostile text.

CHARTER_SCREENSHOTS=FOLDER saves a screenshot of each page.
"""

import importlib.util
import os
import shutil
import threading
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.dashboard.app import Dashboard
from charter.dashboard.serve import open_socket
from consumers.sink import Sink
from engine.bus import open_bus
from engine.bus.read import read_values
from engine.instances import ServiceLease
from producers.files import FileProducer
from schemas.codec import decode_record
from schemas.records import Preference
from tests.support.dashboard import HOSTILE_TEXTS, add_evaluation, copy_demo_with_hostile_run

REQUIRED = os.environ.get("CHARTER_REQUIRE_BROWSER") == "1"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
SHAPES = [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")]
SHOTS = os.environ.get("CHARTER_SCREENSHOTS")
CHECKED_SHAPES = SHAPES if SHOTS else [(1440, "light"), (390, "dark")]  # each width and each theme


@pytest.fixture(scope="module")
def browser():
    missing = [
        name
        for name, location in (("Chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
        if location is None
    ]
    if missing:
        report = pytest.fail if REQUIRED else pytest.skip
        report(f"{' and '.join(missing)} not installed; to test in a browser on Debian, type: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def settings(browser, tiny, tmp_path_factory):
    demo_settings = copy_demo_with_hostile_run(tmp_path_factory.mktemp("browser") / "data", tiny)
    add_evaluation(demo_settings)
    return demo_settings


@pytest.fixture(scope="module")
def address(settings):
    """The address of a dashboard server of the run."""
    server_socket = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(Dashboard(settings).build_app(), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [server_socket]})
    thread.start()
    yield f"http://127.0.0.1:{server_socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()


class BrowserSession:
    """A page of the dashboard in a browser. The test fails if the page logs an error or loads an external file."""

    def __init__(self, browser, address, width=1440, theme="light", **more):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **more)
        self.page, self.address, self.problems = self.context.new_page(), address, []
        self.width, self.theme = width, theme
        self.page.on("console", self.check_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.check_request(request.url))
        self.page.on("dialog", lambda dialog: (self.problems.append("a dialog"), dialog.dismiss()))
        self.page.set_default_timeout(15_000)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.problems == []

    def check_console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def check_request(self, url):
        if not url.startswith(self.address + "/"):
            self.problems.append(f"requested {url}")

    def open(self, path):
        self.page.goto(self.address + path)
        return self.page

    def check(self, name):
        """Check that the page fits the window, that hostile text had no effect, and that each chart has a label."""
        state = self.page.evaluate(
            """() => ({
                width: document.documentElement.scrollWidth,
                injected: document.querySelectorAll("main b, main i, main h1 h1, img").length,
                scripts: [...document.scripts].filter((script) => !script.src.startsWith(location.origin + "/static/")).length,
                unlabeled: document.querySelectorAll("svg[role=img]:not([aria-label])").length,
                background: getComputedStyle(document.body).backgroundColor})"""
        )
        assert state["width"] <= self.width, name
        assert (state["injected"], state["scripts"], state["unlabeled"]) == (0, 0, 0), name
        is_light = sum(map(int, state["background"].removeprefix("rgb(").removesuffix(")").split(","))) > 384
        assert is_light == (self.theme == "light"), name
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}-{self.width}-{self.theme}.png", full_page=True)


@pytest.fixture
def open_session(browser, address):
    return lambda *shape, **more: BrowserSession(browser, address, *shape, **more)


@pytest.mark.parametrize(("width", "theme"), CHECKED_SHAPES)
def test_navigation_links_open_every_page(open_session, width, theme):
    with open_session(width, theme) as session:
        page = session.open("/")
        page.get_by_role("heading", name="Consumer lag").wait_for()
        assert page.locator(f"svg.pipeline.{'wide' if width > 620 else 'tall'}").is_visible()
        session.check("pipeline")
        page.get_by_role("link", name="Traces", exact=True).click()
        page.get_by_role("heading", name="Traces").wait_for()
        session.check("traces")
        page.goto(session.address + "/traces?run=demo")
        page.locator(".traces a", has_text="revision").first.click()
        page.get_by_role("heading", name="Preferences", level=2).wait_for()
        for summary in page.locator("details.lineage > summary, details.sent > summary, details.options > summary").all()[:12]:
            summary.click()
        assert page.locator("details.sent[open] pre").first.is_visible()
        page.locator("details.sent .chip", has_text="verified").first.wait_for()
        assert page.locator("details.sent .chip.warn").count() == 0
        session.check("trace")
        page.locator(".run-form select").select_option("")
        page.wait_for_url(lambda address: "run=demo" not in address)
        headings = {"Preferences": "Judge principles", "Training": "Versions over time", "Dead letters": "respond"}
        for name, heading in headings.items():
            page.get_by_role("link", name=name, exact=True).click()
            page.locator("h2", has_text=heading).first.wait_for()
            session.check(name.lower().replace(" ", "-"))
        page.get_by_role("link", name="SQL", exact=True).click()
        page.get_by_role("link", name="Labels of each principle").click()
        page.locator(".result tbody tr").first.wait_for()
        session.check("sql")
        page.get_by_role("link", name="Runs", exact=True).click()
        page.get_by_role("link", name="demo", exact=True).click()
        page.get_by_role("heading", name="Models", exact=True).wait_for()
        page.get_by_label("Compare with").select_option("hostile")
        page.get_by_role("heading", name="Differences").wait_for()
        session.check("run")


@pytest.mark.parametrize("width", [1440, 390])
def test_hostile_text_has_no_effect(open_session, width):
    with open_session(width) as session:
        page = session.open("/traces?run=hostile")
        addresses = [link.get_attribute("href") for link in page.locator(".traces a").all()]
        assert len(addresses) == len(HOSTILE_TEXTS)
        session.check("hostile-traces")
        for number, path in enumerate(addresses):
            session.open(path).locator(".messages").wait_for()
            assert page.title().endswith("Charter")
            session.check(f"hostile-trace-{number}")
        excerpt = session.open("/traces?run=hostile&q=onmouseover").locator(".traces .excerpt").inner_text()
        assert "<b onmouseover=alert(1)>" in excerpt


def test_a_page_shows_a_new_record_without_a_reload(open_session, settings, tmp_path):
    from playwright.sync_api import expect

    with open_session() as session:
        page = session.open("/")
        page.evaluate("window.notReloaded = 1")
        tile = page.locator(".tile", has_text="prompts").locator(".value")
        before = int(tile.inner_text())
        file = tmp_path / "one.jsonl"
        file.write_text('{"prompt": "A prompt that comes while the page is open."}\n')
        bus = open_bus(str(settings.folder))
        FileProducer(bus, "hostile", eval_fraction=0.0).publish(str(file))
        sink = Sink(bus, open_store(settings), max_wait_s=0.05)
        while sink.step():
            pass
        sink.close()
        bus.close()
        expect(tile).to_have_text(str(before + 1), timeout=15_000)
        assert page.evaluate("window.notReloaded") == 1
        expect(page.locator("#live")).to_have_attribute("data-state", "stopped", timeout=15_000)  # no worker runs
        lease = ServiceLease(settings.folder, "trainer")
        expect(page.locator("#live")).to_have_attribute("data-state", "live", timeout=15_000)
        lease.close()
        expect(page.locator("#live")).to_have_attribute("data-state", "stopped", timeout=15_000)
        page.locator("#live").click()
        assert page.locator("#live").get_attribute("data-state") == "paused"


def find_log_labels(settings, labeler):
    """Return (p_a, outcome) of the human labels on the log."""
    bus = connect_bus(settings)
    try:
        records = [decode_record(value, Preference) for value in read_values(bus, "preferences")]
    finally:
        bus.close()
    return [(record.p_a, record.outcome.value) for record in records if record.labeler == labeler]


@pytest.mark.parametrize("width", [1440, 390])
def test_pairs_are_labeled_with_the_keyboard_and_with_buttons(open_session, settings, width):
    labeler = f"Ana {width}"
    with open_session(width) as session:
        page = session.open("/labels")
        session.check("labels")
        shown = page.locator("input[name=id]").input_value()
        page.keyboard.press("1")  # without a name, nothing is saved
        assert page.locator("input[name=id]").input_value() == shown and "saved" not in page.url
        assert (
            page.get_by_label("Your name").input_value() == ""
        )  # the browser moves the focus to the field; the key is not typed
        page.get_by_label("Your name").fill(labeler)
        page.get_by_label("Your name").press("2")  # typed into the field
        page.get_by_label("Your name").fill(labeler)
        page.locator("h1").click()
        page.keyboard.down("1")
        page.keyboard.down("1")  # a key that is held down repeats
        page.wait_for_url("**saved=**")
        page.keyboard.up("1")
        assert page.get_by_label("Your name").input_value() == labeler
        second = page.locator("input[name=id]").input_value()
        assert second != shown
        page.get_by_role("button", name="Not applicable").click()
        page.wait_for_url(f"**saved={second}**")
        page.keyboard.press("s")
        page.wait_for_url("**skip=1**")
        session.check("labels-skipped")
        page.keyboard.press("=")
        page.wait_for_url("**saved=**")
        # All actions stay in the window of a phone.
        boxes = [button.bounding_box() for button in page.locator(".choice-bar button").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    labels = find_log_labels(settings, labeler)
    assert len(labels) == 3 and (None, "NOT_APPLICABLE") in labels and (0.5, "OK") in labels


@pytest.mark.parametrize("width", [1440, 390])
def test_a_rate_opens_the_responses_of_two_policies(open_session, width):
    with open_session(width) as session:
        page = session.open("/")
        page.get_by_role("link", name="Evaluation", exact=True).click()
        page.get_by_role("heading", name="Rates").wait_for()
        chart = page.locator("figure", has_text="Harmlessness and helpfulness").locator("svg")
        assert chart.locator("circle").count() == 2
        session.check("evaluation")
        page.locator("table.evaluation tbody a").first.click()
        page.locator("#responses article").first.wait_for()
        first = page.locator("#responses article").first
        assert first.locator(".chip", has_text="labels differ").is_visible()
        assert first.locator(".completion").count() == 2
        assert "refuses" in first.locator(".completion").last.inner_text()
        session.check("evaluation-responses")


def test_the_key_column_of_a_table_stays_on_a_phone(open_session):
    with open_session(390) as session:
        page = session.open("/preferences?run=demo")
        table = page.locator(".scroll", has=page.locator("table")).first
        table.evaluate("(element) => { element.scrollLeft = 200; }")
        header, box = table.locator("tbody th").first.bounding_box(), table.bounding_box()
        assert table.evaluate("(element) => element.scrollLeft") > 100
        assert header["x"] == pytest.approx(box["x"], abs=1) and header["width"] < 0.5 * 390
        session.check("preferences-scrolled")


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_a_report_opens_in_the_browser(open_session, settings, tmp_path, width, theme):
    file = tmp_path / "report.html"
    result = CliRunner().invoke(cli, ["report", "--data", str(settings.folder), "--run", "demo", str(file)])
    assert result.exit_code == 0, result.output
    with open_session(width, theme) as session:
        session.address = file.as_uri().removesuffix("/report.html")
        session.open("/report.html").get_by_role("heading", name="Policy comparison").wait_for()
        assert session.page.locator("svg.chart").count() >= 5
        session.check("report")


def test_search_works_with_the_keyboard(open_session):
    with open_session() as session:
        page = session.open("/traces")
        page.keyboard.press("/")
        page.keyboard.type("onmouseover")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=onmouseover**")
        assert page.locator(".traces li").count() == 1
        page.get_by_role("link", name="Clear search and filters").click()
        page.wait_for_url("**/traces")
        page.locator("select[name=policy]").select_option("1")
        page.wait_for_url("**policy=1**")
        assert page.locator(".traces li").count() > 0


def test_sql_works_with_the_keyboard(open_session):
    with open_session() as session:
        page = session.open("/sql")
        page.get_by_label("Query").fill("SELECT 6 * 7 AS answer")
        page.keyboard.press("Control+Enter")
        page.locator(".result").wait_for()
        assert page.locator(".result td").inner_text().strip() == "42"
        page.get_by_label("Query").fill("DROP TABLE raw.prompts")
        page.get_by_role("button", name="Run").click()
        page.get_by_role("alert").wait_for()


def test_the_selected_theme_is_stored(open_session):
    with open_session(theme="light") as session:
        page = session.open("/runs")
        for name in ("light", "dark"):
            page.locator("#theme").click()
            assert page.locator("#theme .state").inner_text() == name
        session.theme = "dark"
        page.reload()
        session.check("runs")


def test_charts_show_values_in_a_tooltip(open_session):
    with open_session() as session:
        page = session.open("/training?run=demo")
        chart = page.locator("figure", has_text="Policy loss").locator("svg")
        chart.scroll_into_view_if_needed()
        chart.locator("circle").first.hover(force=True)
        page.locator(".tooltip").wait_for()
        assert page.locator(".tooltip").inner_text().startswith("batch 3, step 1: ")


def test_the_retry_button_retries_a_dead_letter(open_session):
    with open_session() as session:
        page = session.open("/dead-letters")
        page.locator(".dead-letters .actions a").first.click()
        page.locator(".dead-letters .step").first.wait_for()
        session.check("dead-letter")
        page.get_by_role("button", name="Retry").first.click()
        page.get_by_text("to the log again").wait_for()


def test_pages_work_without_javascript(open_session):
    with open_session(java_script_enabled=False) as session:
        page = session.open("/")
        page.get_by_role("link", name="Traces", exact=True).click()
        page.get_by_role("searchbox").fill("onmouseover")
        page.get_by_role("button", name="Search").click()
        assert page.locator(".traces li").count() == 1
        page.get_by_label("Run").select_option("demo")
        page.get_by_role("button", name="Show").click()
        assert "run=demo" in page.url
