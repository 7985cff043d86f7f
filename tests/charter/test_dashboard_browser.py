"""The dashboard in Chromium: clicked through on a real run, wide and narrow, light and dark, with hostile texts.

CHARTER_SCREENSHOTS=FOLDER keeps a picture of every page.
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
from charter.connect import open_store
from charter.dashboard.app import Dashboard
from charter.dashboard.serve import open_socket
from consumers.sink import Sink
from engine.bus import open_bus
from producers.files import FileProducer
from tests.support.dashboard import HOSTILE_TEXTS, create_demo_run

REQUIRED = os.environ.get("CHARTER_REQUIRE_BROWSER") == "1"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
SHAPES = [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")]
SHOTS = os.environ.get("CHARTER_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    missing = [
        name
        for name, found in (("Chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
        if found is None
    ]
    if missing:
        say = pytest.fail if REQUIRED else pytest.skip
        say(f"no {' and no '.join(missing)}: the dashboard is not tested in a browser; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def settings(browser, tiny, tmp_path_factory):
    return create_demo_run(tmp_path_factory.mktemp("browser") / "data", tiny)


@pytest.fixture(scope="module")
def address(settings):
    """A served dashboard of the run."""
    listening = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(Dashboard(settings).build_app(), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


class Visit:
    """A page of the dashboard, and all that went wrong on it."""

    def __init__(self, browser, address, width=1440, theme="light", **more):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **more)
        self.page, self.address, self.wrong = self.context.new_page(), address, []
        self.width, self.theme = width, theme
        self.page.on("console", self.from_console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.from_outside(request.url))
        self.page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))
        self.page.set_default_timeout(15_000)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.wrong == []

    def from_console(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def from_outside(self, url):
        if not url.startswith(self.address + "/"):
            self.wrong.append(f"asked for {url}")

    def open(self, path):
        self.page.goto(self.address + path)
        return self.page

    def check(self, name):
        """Nothing is wider than the window, nothing hostile has acted, and every picture has a name."""
        found = self.page.evaluate(
            """() => ({
                wide: document.documentElement.scrollWidth,
                injected: document.querySelectorAll("main b, main i, main h1 h1, img").length,
                scripts: [...document.scripts].filter((one) => !one.src.startsWith(location.origin + "/static/")).length,
                nameless: document.querySelectorAll("svg[role=img]:not([aria-label])").length,
                ground: getComputedStyle(document.body).backgroundColor})"""
        )
        assert found["wide"] <= self.width, name
        assert (found["injected"], found["scripts"], found["nameless"]) == (0, 0, 0), name
        light = sum(map(int, found["ground"].removeprefix("rgb(").removesuffix(")").split(","))) > 384
        assert light == (self.theme == "light"), name
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}-{self.width}-{self.theme}.png", full_page=True)


@pytest.fixture
def visit(browser, address):
    return lambda *shape, **more: Visit(browser, address, *shape, **more)


@pytest.mark.parametrize(("width", "theme"), SHAPES)
def test_every_panel_by_its_link(visit, width, theme):
    with visit(width, theme) as here:
        page = here.open("/")
        page.get_by_role("heading", name="What waits").wait_for()
        assert page.locator(f"svg.picture.{'wide' if width > 620 else 'tall'}").is_visible()
        here.check("pipeline")
        page.get_by_role("link", name="Stories", exact=True).click()
        page.get_by_role("heading", name="Stories").wait_for()
        here.check("stories")
        page.goto(here.address + "/stories?run=demo")
        page.locator(".stories a", has_text="rev.").first.click()
        page.get_by_role("heading", name="Judgements").wait_for()
        for summary in page.locator("details.lineage > summary").all()[:2]:
            summary.click()
        here.check("story")
        page.locator(".run-form select").select_option("")
        page.wait_for_url(lambda address: "run=demo" not in address)
        panels = {"Preferences": "Judging principles", "Training": "Versions in time", "Dead letters": "respond"}
        for name, heading in panels.items():
            page.get_by_role("link", name=name, exact=True).click()
            page.locator("h2", has_text=heading).first.wait_for()
            here.check(name.lower().replace(" ", "-"))
        page.get_by_role("link", name="SQL", exact=True).click()
        page.get_by_role("link", name="Labels of each principle").click()
        page.locator(".result tbody tr").first.wait_for()
        here.check("sql")
        page.get_by_role("link", name="Runs", exact=True).click()
        page.get_by_role("link", name="demo", exact=True).click()
        page.get_by_role("heading", name="Who made its records").wait_for()
        page.get_by_label("Compare with").select_option("hostile")
        page.get_by_role("heading", name="What they differ in").wait_for()
        here.check("run")


@pytest.mark.parametrize("width", [1440, 390])
def test_hostile_texts_are_inert(visit, width):
    with visit(width) as here:
        page = here.open("/stories?run=hostile")
        addresses = [link.get_attribute("href") for link in page.locator(".stories a").all()]
        assert len(addresses) == len(HOSTILE_TEXTS)
        here.check("hostile-stories")
        for number, path in enumerate(addresses):
            here.open(path).locator(".messages").wait_for()
            assert page.title().endswith("Charter")
            here.check(f"hostile-story-{number}")
        shown = here.open("/stories?run=hostile&q=onmouseover").locator(".stories .text").inner_text()
        assert "<b onmouseover=alert(1)>" in shown


def test_a_page_is_merged_with_what_has_come(visit, settings, tmp_path):
    """A new prompt shows without a reload."""
    from playwright.sync_api import expect

    with visit() as here:
        page = here.open("/")
        page.evaluate("window.stays = 1")
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
        assert page.evaluate("window.stays") == 1
        page.locator("#live").click()
        assert page.locator("#live").get_attribute("data-state") == "paused"


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_a_report_in_the_browser(visit, settings, tmp_path, width, theme):
    file = tmp_path / "report.html"
    done = CliRunner().invoke(cli, ["report", "--data", str(settings.folder), "--run", "demo", str(file)])
    assert done.exit_code == 0, done.output
    with visit(width, theme) as here:
        here.address = file.as_uri().removesuffix("/report.html")
        here.open("/report.html").get_by_role("heading", name="Before and after").wait_for()
        assert here.page.locator("svg.chart").count() >= 5
        here.check("report")


def test_search_by_keyboard(visit):
    with visit() as here:
        page = here.open("/stories")
        page.keyboard.press("/")
        page.keyboard.type("onmouseover")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=onmouseover**")
        assert page.locator(".stories li").count() == 1
        page.get_by_role("link", name="Clear search and filters").click()
        page.wait_for_url("**/stories")
        page.get_by_label("Policy").select_option("1")
        page.wait_for_url("**policy=1**")
        assert page.locator(".stories li").count() > 0


def test_sql_from_the_keyboard(visit):
    with visit() as here:
        page = here.open("/sql")
        page.get_by_label("Query").fill("SELECT 6 * 7 AS answer")
        page.keyboard.press("Control+Enter")
        page.locator(".result").wait_for()
        assert page.locator(".result td").inner_text().strip() == "42"
        page.get_by_label("Query").fill("DROP TABLE raw.prompts")
        page.get_by_role("button", name="Run").click()
        page.get_by_role("alert").wait_for()


def test_the_theme_is_chosen_and_kept(visit):
    with visit(theme="light") as here:
        page = here.open("/runs")
        for name in ("Light", "Dark"):
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == name
        here.theme = "dark"
        page.reload()
        here.check("runs")


def test_stats_views_under_the_pointer(visit):
    with visit() as here:
        page = here.open("/training?run=demo")
        chart = page.locator("figure", has_text="Policy loss").locator("svg")
        chart.scroll_into_view_if_needed()
        chart.locator("circle").first.hover(force=True)
        page.locator(".tip").wait_for()
        assert page.locator(".tip").inner_text().startswith("step ")


def test_a_dead_letter_is_tried_again_by_its_button(visit):
    with visit() as here:
        page = here.open("/dead-letters")
        page.locator(".letters a", has_text="").first.click()
        page.locator(".letters .step").first.wait_for()
        here.check("dead-letter")
        page.get_by_role("button", name="Try").first.click()
        page.get_by_text("back on the log").wait_for()


def test_everything_can_be_read_without_the_script(visit):
    with visit(java_script_enabled=False) as here:
        page = here.open("/")
        page.get_by_role("link", name="Stories", exact=True).click()
        page.get_by_role("searchbox").fill("onmouseover")
        page.get_by_role("button", name="Search").click()
        assert page.locator(".stories li").count() == 1
        page.get_by_label("Run").select_option("demo")
        page.get_by_role("button", name="Show").click()
        assert "run=demo" in page.url
