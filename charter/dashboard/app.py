"""The dashboard as an ASGI application: every view has a URL, and a JSON twin under /api.

A view that cannot be read now says why in the error's own three lines and is a page all the same. Pages carry an ETag, so that
asking again costs nothing while nothing has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from charter.dashboard import letters, pipeline, preferences, runs, sql, stories, training
from charter.dashboard.desk import Desk, Look
from charter.dashboard.guard import Guard
from charter.dashboard.log import LogWatch
from charter.dashboard.page import environment, plain
from engine.errors import CharterError

if TYPE_CHECKING:
    from engine.settings import Settings

STATIC = Path(__file__).with_name("static")
LONGEST_FORM = 16 * 1024
NAVIGATION = (
    ("/", "Pipeline"),
    ("/stories", "Stories"),
    ("/preferences", "Preferences"),
    ("/training", "Training"),
    ("/dead-letters", "Dead letters"),
    ("/sql", "SQL"),
    ("/runs", "Runs"),
)


@dataclass(frozen=True)
class View:
    """What one request shows: `data` of the database (None: it cannot be read, see `trouble`), and what is `beside` it."""

    template: str
    title: str
    data: dict[str, Any] | None
    trouble: CharterError | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    status: int = 200

    def twin(self) -> dict[str, Any]:
        """The view as JSON."""
        return plain({"view": self.template, "data": self.data, "trouble": told(self.trouble), **self.beside})


def told(error: CharterError | None) -> dict[str, str] | None:
    return None if error is None else {"what": error.what, "why": error.why, "fix": error.fix}


def seen(template: str, title: str, look: Look, *, missing: bool = False, **beside: Any) -> View:
    return View(template, title, look.data, look.trouble, beside, 404 if missing else 200)


Find = Callable[[Request], View]


class Dashboard:
    """The views of one data folder and one log."""

    def __init__(self, settings: Settings) -> None:
        from charter.pipeline import store_of

        self.settings = settings
        self.desk = Desk(store_of(settings))
        self.log = LogWatch(settings, self.desk)
        self.pages = environment()

    def app(self, token: str | None = None) -> ASGIApp:
        """The guarded application; `token` is what visitors need, None on loopback."""
        views: dict[str, Find] = {
            "/": self.pipeline,
            "/stories": self.stories,
            "/stories/{prompt}": self.story,
            "/preferences": self.preferences,
            "/training": self.training,
            "/dead-letters": self.letters,
            "/sql": self.sql,
            "/runs": self.runs,
            "/runs/{run:path}": self.card,
        }
        twins = [Route("/api" + ("/pipeline" if path == "/" else path), self.twin(find)) for path, find in views.items()]
        pages = [Route(path, self.page(find)) for path, find in views.items()]
        acting = Route("/dead-letters/retry", self.retry, methods=["POST"])

        @asynccontextmanager
        async def lifespan(_: Starlette) -> Any:
            yield
            await run_in_threadpool(self.log.close)

        starlette = Starlette(
            routes=[acting, *twins, *pages, Mount("/static", StaticFiles(directory=STATIC))],
            exception_handlers={HTTPException: self.lost},
            lifespan=lifespan,
        )
        return Guard(starlette, token)

    # The views

    def pipeline(self, request: Request) -> View:
        run = request.query_params.get("run", "")
        look = self.desk.look(("pipeline", run), lambda ask: pipeline.gather(ask, run))
        watched = run or next(iter(self.run_names()), self.settings.run.id)
        found = self.log.lags(watched)
        return seen(
            "pipeline",
            "Pipeline",
            look,
            log=found | {"run": watched, "stages": pipeline.stages_of(found["rows"])},
            reads=readers(self.settings.judge.pairing),
        )

    def stories(self, request: Request) -> View:
        wanted = dict(request.query_params)
        run = wanted.get("run", "")
        key = ("stories", tuple(sorted(wanted.items())))
        look = self.desk.look(key, lambda ask: stories.search(ask, run, wanted))
        facets = self.desk.look(("facets", run), lambda ask: stories.facets(ask, run))
        return seen("stories", "Stories", look, facets=facets.data or {}, wanted=wanted, scopes=stories.SCOPES)

    def story(self, request: Request) -> View:
        prompt = request.path_params["prompt"]
        look = self.desk.look(("story", prompt), lambda ask: stories.story(ask, prompt))
        return seen("story", f"Story {prompt[:8]}", look, missing=look.data is not None and look.data["prompt"] is None)

    def preferences(self, request: Request) -> View:
        run = request.query_params.get("run", "")
        return seen(
            "preferences", "Preferences", self.desk.look(("preferences", run), lambda ask: preferences.gather(ask, run))
        )

    def training(self, request: Request) -> View:
        run = request.query_params.get("run", "")
        return seen("training", "Training", self.desk.look(("training", run), lambda ask: training.gather(ask, run)))

    def letters(self, request: Request) -> View:
        wanted = dict(request.query_params)
        run, key = wanted.get("run", ""), ("letters", tuple(sorted(wanted.items())))
        look = self.desk.look(key, lambda ask: letters.gather(ask, run, wanted))
        return seen("letters", "Dead letters", look, retried=wanted.get("retried"))

    def sql(self, request: Request) -> View:
        statement = request.query_params.get("q", "").strip()
        tables = self.desk.look(("tables",), sql.tables)
        look = sql.answered(self.desk.store, statement) if statement else Look(None, tables.trouble)
        return seen(
            "sql", "SQL", look, statement=statement, documented=sql.documented(), tables=(tables.data or {}).get("tables", [])
        )

    def runs(self, request: Request) -> View:
        look = self.desk.look(("listed",), lambda ask: {"listed": runs.listed(ask)})
        return seen("runs", "Runs", look, here=runs.here(self.settings))

    def card(self, request: Request) -> View:
        run, wanted = request.path_params["run"], dict(request.query_params)
        key = ("card", run, wanted.get("with", ""))
        look = self.desk.look(key, lambda ask: runs.card(ask, run, wanted))
        missing = look.data is not None and look.data["manifest"] is None
        return seen("card", f"Run {run}", look, missing=missing, here=runs.here(self.settings))

    def run_names(self) -> list[str]:
        found = self.desk.look(("runs",), runs.names).data
        return found["runs"] if found else []

    # As pages, as JSON

    def page(self, find: Find) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            view = find(request)
            return sent(request, self.render(request, view), "text/html", view.status)

        return answer

    def twin(self, find: Find) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            view = find(request)
            body = json.dumps(view.twin(), ensure_ascii=False, indent=1, allow_nan=False)
            status = 503 if view.trouble and view.data is None and view.trouble.exit_code == 3 else view.status
            return sent(request, body, "application/json", status)

        return answer

    def render(self, request: Request, view: View) -> str:
        run, names = request.query_params.get("run", ""), self.run_names()
        return self.pages.get_template(f"{view.template}.html").render(
            view=view,
            data=plain(view.data),
            trouble=told(view.trouble),
            **plain(view.beside),
            path=request.url.path,
            navigation=NAVIGATION,
            run=run,
            run_names=names,
            run_is_missing=bool(run and names and run not in names),
            folder=str(self.settings.folder),
            twin=link("/api" + ("/pipeline" if request.url.path == "/" else request.url.path), **dict(request.query_params)),
            link=link,
            link_here=lambda target, **more: link(target, run=run, **more),
        )

    async def lost(self, request: Request, error: Exception) -> Response:
        """An address where nothing is, or a method that it does not take."""
        assert isinstance(error, HTTPException)
        trouble = CharterError(f"there is nothing at {request.url.path}", str(error.detail), "choose a page above")
        view = View("plain", "Not here", None, trouble, status=error.status_code)
        body = await run_in_threadpool(self.render, request, view)
        return sent(request, body, "text/html", error.status_code)

    # The one thing that acts

    async def retry(self, request: Request) -> Response:
        """Put the dead letters that a form names back on their topics."""
        form = dict(parse_qsl((await limited_body(request)).decode("utf-8", "replace"), keep_blank_values=True))
        return await run_in_threadpool(self.retried, request, form)

    def retried(self, request: Request, form: dict[str, str]) -> Response:
        look = self.desk.once(lambda ask: letters.chosen(ask, form))
        try:
            if look.trouble or look.data is None:
                raise look.trouble or CharterError(
                    "there are no dead letters", "the database has none of these", "look at the page of dead letters"
                )
            count = letters.retry(self.settings, look.data["letters"])
        except CharterError as error:
            status = 503 if error.exit_code == 3 else 400
            return sent(
                request, self.render(request, View("plain", "Dead letters", None, error, status=status)), "text/html", status
            )
        return RedirectResponse(link("/dead-letters", run=form.get("run", ""), retried=str(count)), 303)


def readers(pairing: str) -> dict[str, list[str]]:
    from charter.pipeline import readers_of

    return {stage: list(topics) for stage, topics in readers_of(pairing).items()}


async def limited_body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            raise HTTPException(413, "the form is too long")
    return body


def link(path: str, /, **parameters: Any) -> str:
    """An address of this server, without the parameters that are empty."""
    from urllib.parse import quote

    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    return quote(path) + (f"?{urlencode(given)}" if given else "")


def sent(request: Request, body: str, kind: str, status: int) -> Response:
    """The body, or word that it is what the browser has already."""
    content = body.encode("utf-8", "replace")
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-store"}
    if status == 200 and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, status, headers, media_type=f"{kind}; charset=utf-8")
