"""Define the ASGI application of the dashboard. Each view has a page, and a JSON version under /api.

If the data of a view cannot be read, the page shows the three lines of the error (what happened, why, what to type). Each
response has an ETag. If a browser requests an unchanged page again, the response is 304 without a body.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from charter.connect import open_store
from charter.dashboard import (
    dead_letters_view,
    evaluation_view,
    labels_view,
    pipeline_view,
    preferences_view,
    runs_view,
    sql_view,
    traces_view,
    training_view,
)
from charter.dashboard.lag_monitor import LagMonitor
from charter.dashboard.query_cache import CachedResult, QueryCache
from charter.dashboard.rendering import create_template_environment, error_to_dict, to_json_value
from charter.dashboard.security import SecurityMiddleware
from charter.label_quality import LabelQuality, judge_labels, read_label_quality
from charter.stages import get_stage_inputs
from engine.budget import parse_prices
from engine.errors import CharterError
from engine.server_waits import list_server_waits
from engine.settings import Settings
from engine.store import QueryFunction

STATIC_FOLDER = Path(__file__).with_name("static")
_MAX_FORM_BYTES = 16 * 1024
_LABELER_COOKIE = "charter_labeler"
_COOKIE_AGE_S = 365 * 86_400
_NAVIGATION = (
    ("/", "Pipeline"),
    ("/traces", "Traces"),
    ("/preferences", "Preferences"),
    ("/labels", "Labels"),
    ("/training", "Training"),
    ("/evaluation", "Evaluation"),
    ("/dead-letters", "Dead letters"),
    ("/sql", "SQL"),
    ("/runs", "Runs"),
)


@dataclass(frozen=True)
class _View:
    """Holds the content of one page. `data` comes from the database, or is None if the database cannot be read."""

    template: str
    title: str
    data: dict[str, Any] | None
    error: CharterError | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    status_code: int = 200

    def to_dict(self) -> dict[str, Any]:
        """Return the view as JSON values."""
        return to_json_value({"view": self.template, "data": self.data, "error": error_to_dict(self.error), **self.extra})


def _make_view(template: str, title: str, result: CachedResult, *, not_found: bool = False, **extra: Any) -> _View:
    return _View(template, title, result.data, result.error, extra, 404 if not_found else 200)


_ViewFunction = Callable[[Request], _View]
_FormAction = Callable[[dict[str, str]], Response]


class Dashboard:
    """Serves the views of one data folder and one event log."""

    def __init__(self, settings: Settings) -> None:

        self.settings = settings
        self.query_cache = QueryCache(open_store(settings))
        self.lag_monitor = LagMonitor(settings, self.query_cache)
        self.pending_labels = labels_view.PendingLabels(settings, self.query_cache.store)
        self.templates = create_template_environment()

    def build_app(self, token: str | None = None) -> ASGIApp:
        """Return the application with its security checks. If `token` is None (on loopback), requests do not need a token."""
        views: dict[str, _ViewFunction] = {
            "/": self.show_pipeline,
            "/traces": self.show_traces,
            "/traces/{prompt}": self.show_trace,
            "/preferences": self.show_preferences,
            "/labels": self.show_labels,
            "/training": self.show_training,
            "/evaluation": self.show_evaluation,
            "/dead-letters": self.show_dead_letters,
            "/sql": self.show_sql,
            "/runs": self.show_runs,
            "/runs/{run:path}": self.show_run,
        }
        json_routes = [
            Route(_get_json_path(path), self.make_json_endpoint(view_function)) for path, view_function in views.items()
        ]
        page_routes = [Route(path, self.make_page_endpoint(view_function)) for path, view_function in views.items()]
        form_routes = [
            Route("/dead-letters/retry", self.make_form_endpoint("Dead letters", self.retry_dead_letters), methods=["POST"]),
            Route("/labels", self.make_form_endpoint("Labels", self.save_label), methods=["POST"]),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> Any:
            yield
            await run_in_threadpool(self.lag_monitor.close)

        starlette = Starlette(
            routes=[*form_routes, *json_routes, *page_routes, Mount("/static", StaticFiles(directory=STATIC_FOLDER))],
            exception_handlers={HTTPException: self.handle_http_error},
            lifespan=lifespan,
        )
        return SecurityMiddleware(starlette, token)

    # The views

    def show_pipeline(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        result = self.query_cache.get_or_run(("pipeline", run), lambda query: pipeline_view.load_pipeline(query, run))
        lag_run = self.get_monitored_run(request)
        lag = self.lag_monitor.get_lags(lag_run)
        return _make_view(
            "pipeline",
            "Pipeline",
            result,
            lag=lag | {"run": lag_run, "stages": pipeline_view.group_lags_by_stage(lag["rows"])},
            waits=list_server_waits(self.settings.folder),
            stage_inputs=get_stage_inputs(self.settings),
        )

    def show_traces(self, request: Request) -> _View:
        parameters = dict(request.query_params)
        run = parameters.get("run", "")
        key = ("traces", tuple(sorted(parameters.items())))
        result = self.query_cache.get_or_run(key, lambda query: traces_view.search_traces(query, run, parameters))
        facets = self.query_cache.get_or_run(("facets", run), lambda query: traces_view.load_facets(query, run))
        return _make_view(
            "traces", "Traces", result, facets=facets.data or {}, parameters=parameters, scopes=traces_view.SEARCH_SCOPES
        )

    def show_trace(self, request: Request) -> _View:
        prompt_id = request.path_params["prompt"]
        prices = parse_prices(self.settings.budget.prices)

        def load(query: QueryFunction) -> dict[str, Any]:
            inputs = traces_view.load_inputs(query, prompt_id, prices)
            return {"trace": traces_view.load_trace(query, prompt_id), "inputs": inputs}

        result = self.query_cache.get_or_run(("trace", prompt_id), load)
        if result.data is None:
            return _make_view("trace", f"Trace {prompt_id[:8]}", result)
        # The stages run again with the stored replies after the read session, so they do not delay the sink.
        sent_prompts = {key: value.to_dict() for key, value in result.data["inputs"].sent_prompts.items()}
        data = result.data["trace"] | {"sent_prompts": sent_prompts}
        return _make_view("trace", f"Trace {prompt_id[:8]}", replace(result, data=data), not_found=data["prompt"] is None)

    def show_preferences(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        return _make_view(
            "preferences",
            "Preferences",
            self.query_cache.get_or_run(("preferences", run), lambda query: preferences_view.load_preferences(query, run)),
            verdict=self.judge_labels(),
        )

    def show_labels(self, request: Request) -> _View:
        parameters = request.query_params
        run, identifier = parameters.get("run", ""), parameters.get("id", "")
        try:
            skip, pending = labels_view.parse_skip(parameters.get("skip") or "0"), self.pending_labels.get()
        except CharterError as error:
            return _View("labels", "Labels", None, error)
        # The result is not cached: it must have the label that was just saved.
        result = self.query_cache.run_once(
            lambda query: labels_view.load_labeling(query, run, skip, identifier, pending),
        )
        labeler = unquote(request.cookies.get(_LABELER_COOKIE, ""))
        return _make_view("labels", "Labels", result, labeler=labeler, saved=parameters.get("saved"))

    def judge_labels(self) -> str | None:
        """Return whether the labels of all runs are good enough to train on, or None if the database cannot be read."""
        quality = self.query_cache.get_or_run(("label_quality",), lambda query: asdict(read_label_quality(query))).data
        return str(judge_labels(LabelQuality(**quality), self.settings.label_quality)) if quality else None

    def show_training(self, request: Request) -> _View:
        run = request.query_params.get("run", "")
        return _make_view(
            "training",
            "Training",
            self.query_cache.get_or_run(("training", run), lambda query: training_view.load_training(query, run)),
        )

    def show_evaluation(self, request: Request) -> _View:
        parameters = dict(request.query_params)
        run, key = parameters.get("run", ""), ("evaluation", tuple(sorted(parameters.items())))
        result = self.query_cache.get_or_run(key, lambda query: evaluation_view.load_evaluation(query, run, parameters))
        return _make_view("evaluation", "Evaluation", result)

    def show_dead_letters(self, request: Request) -> _View:
        parameters = dict(request.query_params)
        run, key = parameters.get("run", ""), ("dead_letters", tuple(sorted(parameters.items())))
        result = self.query_cache.get_or_run(key, lambda query: dead_letters_view.load_dead_letters(query, run, parameters))
        return _make_view("dead_letters", "Dead letters", result, retried=parameters.get("retried"))

    def show_sql(self, request: Request) -> _View:
        statement = request.query_params.get("q", "").strip()
        tables = self.query_cache.get_or_run(("tables",), sql_view.load_tables)
        result = (
            sql_view.run_in_subprocess(self.query_cache.store, statement) if statement else CachedResult(None, tables.error)
        )
        return _make_view(
            "sql",
            "SQL",
            result,
            statement=statement,
            example_queries=sql_view.load_example_queries(),
            tables=(tables.data or {}).get("tables", []),
        )

    def show_runs(self, request: Request) -> _View:
        result = self.query_cache.get_or_run(("runs",), lambda query: {"runs": runs_view.load_runs(query)})
        return _make_view("runs", "Runs", result, environment=runs_view.describe_environment(self.settings))

    def show_run(self, request: Request) -> _View:
        run, parameters = request.path_params["run"], dict(request.query_params)
        key = ("run", run, parameters.get("compare_with", ""))
        result = self.query_cache.get_or_run(key, lambda query: runs_view.load_run(query, run, parameters))
        is_missing = result.data is not None and result.data["manifest"] is None
        environment = runs_view.describe_environment(self.settings)
        return _make_view("run", f"Run {run}", result, not_found=is_missing, environment=environment)

    def list_run_ids(self) -> list[str]:
        data = self.query_cache.get_or_run(("run_ids",), runs_view.load_run_ids).data
        return data["run_ids"] if data else []

    def get_monitored_run(self, request: Request) -> str:
        """Return the run whose workers and lag a page shows: the selected run, or the newest run if all runs are selected."""
        return request.query_params.get("run", "") or next(iter(self.list_run_ids()), self.settings.run.id)

    # Endpoints: each view has a page and a JSON version

    def make_page_endpoint(self, view_function: _ViewFunction) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            view = view_function(request)
            return _make_response(request, self.render_page(request, view), "text/html", view.status_code)

        return endpoint

    def make_json_endpoint(self, view_function: _ViewFunction) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            view = view_function(request)
            body = json.dumps(view.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
            status = 503 if view.error and view.data is None and view.error.exit_code == 3 else view.status_code
            return _make_response(request, body, "application/json", status)

        return endpoint

    def render_page(self, request: Request, view: _View) -> str:
        run, run_ids = request.query_params.get("run", ""), self.list_run_ids()
        return self.templates.get_template(f"{view.template}.html").render(
            view=view,
            data=to_json_value(view.data),
            error=error_to_dict(view.error),
            **to_json_value(view.extra),
            path=request.url.path,
            navigation=_NAVIGATION,
            run=run,
            run_ids=run_ids,
            run_is_missing=bool(run and run_ids and run not in run_ids),
            folder=str(self.settings.folder),
            activity=_describe_activity(self.lag_monitor.get_lags(self.get_monitored_run(request))["workers"]),
            json_url=_build_url(_get_json_path(request.url.path), **dict(request.query_params)),
            url=_build_url,
            url_here=lambda target, **more: _build_url(target, run=run, **more),
        )

    async def handle_http_error(self, request: Request, error: Exception) -> Response:
        """Return an error page for an unknown address, an unsupported method, or a form that is too long."""
        assert isinstance(error, HTTPException)
        message = CharterError(
            f"cannot serve {request.method} {request.url.path}", str(error.detail), "choose a page in the navigation bar"
        )
        view = _View("message", "Error", None, message, status_code=error.status_code)
        body = await run_in_threadpool(self.render_page, request, view)
        return _make_response(request, body, "text/html", error.status_code)

    # The actions of the dashboard: the retry of dead letters, and labels. SecurityMiddleware checks the origin of each request

    def make_form_endpoint(self, title: str, action: _FormAction) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that runs an action with the fields of a form. If the action fails, it returns an error page."""

        def run_action(request: Request, form: dict[str, str]) -> Response:
            try:
                return action(form)
            except CharterError as error:
                status = 503 if error.exit_code == 3 else 400
                view = _View("message", title, None, error, status_code=status)
                return _make_response(request, self.render_page(request, view), "text/html", status)

        async def endpoint(request: Request) -> Response:
            body = (await _read_limited_body(request)).decode("utf-8", "replace")
            return await run_in_threadpool(run_action, request, dict(parse_qsl(body, keep_blank_values=True)))

        return endpoint

    def retry_dead_letters(self, form: dict[str, str]) -> Response:
        """Publish the records of the selected dead letters to their source topics again."""
        result = self.query_cache.run_once(lambda query: dead_letters_view.load_selected(query, form))
        if result.error or result.data is None:
            raise result.error or CharterError(
                "there are no dead letters to retry", "the selection is empty", "choose dead letters on their page"
            )
        count = dead_letters_view.retry_dead_letters(self.settings, result.data["dead_letters"])
        return RedirectResponse(_build_url("/dead-letters", run=form.get("run", ""), retried=str(count)), 303)

    def save_label(self, form: dict[str, str]) -> Response:
        """Publish a person's label of a pair, and go to the next pair. The browser keeps the name of the person."""
        result = self.query_cache.run_once(lambda query: {"label": labels_view.make_label(query, form)})
        if result.error or result.data is None:
            raise result.error or CharterError("the label was not saved", "the database has no answer", "try again")
        label = result.data["label"]
        self.pending_labels.publish(label)
        skip = form.get("skip", "")
        address = _build_url("/labels", run=form.get("run", ""), skip="" if skip == "0" else skip, saved=label.parent_ids[0])
        response = RedirectResponse(address, 303)
        response.set_cookie(_LABELER_COOKIE, quote(label.labeler), max_age=_COOKIE_AGE_S, httponly=True, samesite="strict")
        return response


def _describe_activity(workers: list[dict[str, Any]] | None) -> str:
    """Return whether a stage, a sink or a trainer runs now: "running", "stopped", or "unknown" if the log is unreachable."""
    if workers is None:
        return "unknown"
    return "running" if any(row["running"] for row in workers) else "stopped"


async def _read_limited_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, f"the form is longer than {_MAX_FORM_BYTES} bytes")
    return body


def _get_json_path(path: str) -> str:
    """Return the address of the JSON version of a page."""
    return "/api" + ("/pipeline" if path == "/" else path)


def _build_url(path: str, /, **parameters: Any) -> str:
    """Return an address of this server. Omit empty parameters."""
    non_empty = {name: value for name, value in parameters.items() if value not in (None, "")}
    return quote(path) + (f"?{urlencode(non_empty)}" if non_empty else "")


def _make_response(request: Request, body: str, media_type: str, status: int) -> Response:
    """Return the body. Return 304 instead if the ETag of the request shows that the browser already has this body."""
    content = body.encode("utf-8", "replace")
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-store"}
    if status == 200 and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, status, headers, media_type=f"{media_type}; charset=utf-8")
