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

from charter.dashboard import (
    dead_letters_view,
    pipeline_view,
    preferences_view,
    runs_view,
    sql_view,
    traces_view,
    training_view,
)
from charter.dashboard.lag_monitor import LagMonitor
from charter.dashboard.query_cache import CachedResult, QueryCache
from charter.dashboard.rendering import create_template_environment, to_json_value
from charter.dashboard.security import SecurityMiddleware
from engine.errors import CharterError

if TYPE_CHECKING:
    from engine.settings import Settings

STATIC_FOLDER = Path(__file__).with_name("static")
_MAX_FORM_BYTES = 16 * 1024
_NAVIGATION = (
    ("/", "Pipeline"),
    ("/stories", "Stories"),
    ("/preferences", "Preferences"),
    ("/training", "Training"),
    ("/dead-letters", "Dead letters"),
    ("/sql", "SQL"),
    ("/runs", "Runs"),
)


@dataclass(frozen=True)
class _View:
    """What one request shows: `data` of the database (None: it cannot be read, see `trouble`), and what is `beside` it."""

    template: str
    title: str
    data: dict[str, Any] | None
    error: CharterError | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    status_code: int = 200

    def to_dict(self) -> dict[str, Any]:
        """The view as JSON."""
        return to_json_value({"view": self.template, "data": self.data, "trouble": error_to_dict(self.error), **self.extra})


def error_to_dict(error: CharterError | None) -> dict[str, str] | None:
    return None if error is None else {"what": error.what, "why": error.why, "fix": error.fix}


def _make_view(template: str, title: str, result: CachedResult, *, not_found: bool = False, **beside: Any) -> _View:
    return _View(template, title, result.data, result.error, beside, 404 if not_found else 200)


_ViewFunction = Callable[[Request], _View]


class Dashboard:
    """The views of one data folder and one log."""

    def __init__(self, settings: Settings) -> None:
        from charter.connect import open_store

        self.settings = settings
        self.query_cache = QueryCache(open_store(settings))
        self.lag_monitor = LagMonitor(settings, self.query_cache)
        self.templates = create_template_environment()

    def build_app(self, token: str | None = None) -> ASGIApp:
        """The guarded application; `token` is what visitors need, None on loopback."""
        views: dict[str, _ViewFunction] = {
            "/": self.show_pipeline,
            "/stories": self.show_traces,
            "/stories/{prompt}": self.show_trace,
            "/preferences": self.show_preferences,
            "/training": self.show_training,
            "/dead-letters": self.show_dead_letters,
            "/sql": self.show_sql,
            "/runs": self.show_runs,
            "/runs/{run:path}": self.show_run,
        }
        twins = [
            Route("/api" + ("/pipeline" if path == "/" else path), self.make_json_endpoint(find))
            for path, find in views.items()
        ]
        pages = [Route(path, self.make_page_endpoint(find)) for path, find in views.items()]
        acting = Route("/dead-letters/retry", self.handle_retry_form, methods=["POST"])

        @asynccontextmanager
        async def lifespan(_: Starlette) -> Any:
            yield
            await run_in_threadpool(self.lag_monitor.close)

        starlette = Starlette(
            routes=[acting, *twins, *pages, Mount("/static", StaticFiles(directory=STATIC_FOLDER))],
            exception_handlers={HTTPException: self.handle_http_error},
            lifespan=lifespan,
        )
        return SecurityMiddleware(starlette, token)

    # The views

    def show_pipeline(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        look = self.query_cache.get_or_run(("pipeline", run), lambda ask: pipeline_view.load_pipeline(ask, run))
        watched = run or next(iter(self.list_run_ids()), self.settings.run.id)
        found = self.lag_monitor.get_lags(watched)
        return _make_view(
            "pipeline",
            "Pipeline",
            look,
            log=found | {"run": watched, "stages": pipeline_view.group_lags_by_stage(found["rows"])},
            reads=_get_stage_inputs(self.settings.judge.pairing),
        )

    def show_traces(self, request: Request) -> _View:
        wanted = dict(request.query_params)
        run = wanted.get("run", "")
        key = ("stories", tuple(sorted(wanted.items())))
        look = self.query_cache.get_or_run(key, lambda ask: traces_view.search_traces(ask, run, wanted))
        facets = self.query_cache.get_or_run(("facets", run), lambda ask: traces_view.load_facets(ask, run))
        return _make_view("stories", "Stories", look, facets=facets.data or {}, wanted=wanted, scopes=traces_view.SEARCH_SCOPES)

    def show_trace(self, request: Request) -> _View:
        prompt = request.path_params["prompt"]
        look = self.query_cache.get_or_run(("story", prompt), lambda ask: traces_view.load_trace(ask, prompt))
        return _make_view("story", f"Story {prompt[:8]}", look, not_found=look.data is not None and look.data["prompt"] is None)

    def show_preferences(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        return _make_view(
            "preferences",
            "Preferences",
            self.query_cache.get_or_run(("preferences", run), lambda ask: preferences_view.load_preferences(ask, run)),
        )

    def show_training(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        return _make_view(
            "training",
            "Training",
            self.query_cache.get_or_run(("training", run), lambda ask: training_view.load_training(ask, run)),
        )

    def show_dead_letters(self, request: Request) -> _View:
        wanted = dict(request.query_params)
        run, key = wanted.get("run", ""), ("letters", tuple(sorted(wanted.items())))
        look = self.query_cache.get_or_run(key, lambda ask: dead_letters_view.load_dead_letters(ask, run, wanted))
        return _make_view("letters", "Dead letters", look, retried=wanted.get("retried"))

    def show_sql(self, request: Request) -> _View:
        statement = request.query_params.get("q", "").strip()
        tables = self.query_cache.get_or_run(("tables",), sql_view.load_tables)
        look = sql_view.run_in_subprocess(self.query_cache.store, statement) if statement else CachedResult(None, tables.error)
        return _make_view(
            "sql",
            "SQL",
            look,
            statement=statement,
            documented=sql_view.load_example_queries(),
            tables=(tables.data or {}).get("tables", []),
        )

    def show_runs(self, request: Request) -> _View:
        look = self.query_cache.get_or_run(("listed",), lambda ask: {"listed": runs_view.load_runs(ask)})
        return _make_view("runs", "Runs", look, here=runs_view.describe_environment(self.settings))

    def show_run(self, request: Request) -> _View:
        run, wanted = request.path_params["run"], dict(request.query_params)
        key = ("card", run, wanted.get("with", ""))
        look = self.query_cache.get_or_run(key, lambda ask: runs_view.load_run(ask, run, wanted))
        missing = look.data is not None and look.data["manifest"] is None
        return _make_view("card", f"Run {run}", look, not_found=missing, here=runs_view.describe_environment(self.settings))

    def list_run_ids(self) -> list[str]:
        found = self.query_cache.get_or_run(("runs",), runs_view.load_run_ids).data
        return found["runs"] if found else []

    # As pages, as JSON

    def make_page_endpoint(self, view_function: _ViewFunction) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            view = view_function(request)
            return _make_response(request, self.render_page(request, view), "text/html", view.status_code)

        return answer

    def make_json_endpoint(self, view_function: _ViewFunction) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            view = view_function(request)
            body = json.dumps(view.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
            status = 503 if view.error and view.data is None and view.error.exit_code == 3 else view.status_code
            return _make_response(request, body, "application/json", status)

        return answer

    def render_page(self, request: Request, view: _View) -> str:
        run, names = request.query_params.get("run", ""), self.list_run_ids()
        return self.templates.get_template(f"{view.template}.html").render(
            view=view,
            data=to_json_value(view.data),
            trouble=error_to_dict(view.error),
            **to_json_value(view.extra),
            path=request.url.path,
            navigation=_NAVIGATION,
            run=run,
            run_names=names,
            run_is_missing=bool(run and names and run not in names),
            folder=str(self.settings.folder),
            twin=_build_url(
                "/api" + ("/pipeline" if request.url.path == "/" else request.url.path), **dict(request.query_params)
            ),
            link=_build_url,
            link_here=lambda target, **more: _build_url(target, run=run, **more),
        )

    async def handle_http_error(self, request: Request, error: Exception) -> Response:
        """An address where nothing is, or a method that it does not take."""
        assert isinstance(error, HTTPException)
        trouble = CharterError(f"there is nothing at {request.url.path}", str(error.detail), "choose a page above")
        view = _View("plain", "Not here", None, trouble, status_code=error.status_code)
        body = await run_in_threadpool(self.render_page, request, view)
        return _make_response(request, body, "text/html", error.status_code)

    # The one thing that acts

    async def handle_retry_form(self, request: Request) -> Response:
        """Put the dead letters that a form names back on their topics."""
        form = dict(parse_qsl((await _read_limited_body(request)).decode("utf-8", "replace"), keep_blank_values=True))
        return await run_in_threadpool(self.retry_dead_letters, request, form)

    def retry_dead_letters(self, request: Request, form: dict[str, str]) -> Response:
        look = self.query_cache.run_once(lambda ask: dead_letters_view.load_selected(ask, form))
        try:
            if look.error or look.data is None:
                raise look.error or CharterError(
                    "there are no dead letters", "the database has none of these", "look at the page of dead letters"
                )
            count = dead_letters_view.retry_dead_letters(self.settings, look.data["letters"])
        except CharterError as error:
            status = 503 if error.exit_code == 3 else 400
            return _make_response(
                request,
                self.render_page(request, _View("plain", "Dead letters", None, error, status_code=status)),
                "text/html",
                status,
            )
        return RedirectResponse(_build_url("/dead-letters", run=form.get("run", ""), retried=str(count)), 303)


def _get_stage_inputs(pairing: str) -> dict[str, list[str]]:
    from charter.lag import get_stage_inputs

    return {stage: list(topics) for stage, topics in get_stage_inputs(pairing).items()}


async def _read_limited_body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, "the form is too long")
    return body


def _build_url(path: str, /, **parameters: Any) -> str:
    """An address of this server, without the parameters that are empty."""
    from urllib.parse import quote

    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    return quote(path) + (f"?{urlencode(given)}" if given else "")


def _make_response(request: Request, body: str, media_type: str, status: int) -> Response:
    """The body, or word that it is what the browser has already."""
    content = body.encode("utf-8", "replace")
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-store"}
    if status == 200 and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, status, headers, media_type=f"{media_type}; charset=utf-8")
