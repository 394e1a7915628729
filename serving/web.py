"""The HTTP application of a replica: the dialects' routes and the operational ones, around one served model."""

from __future__ import annotations

import importlib.resources
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.config import ServingSection
from orchestrator.tasks.base import Row, Task
from serving import body, dialects
from serving.auth import Keys
from serving.batcher import Answer, BadItem, Batcher, Closed, Late, Overloaded
from serving.dialects import Dialect, Route
from serving.metrics import CONTENT_TYPE, Metrics
from serving.problem import Problem, from_batcher

logger = logging.getLogger("serving")

MAX_SENTENCE = 1000
"""Characters of an error's sentence: it may quote what the client sent."""
TIMEOUT_HEADER = "x-request-timeout-seconds"
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass
class ServedModel:
    """One model and what answers for it; what dialects see as `dialects.Model`."""

    name: str
    version: int | None
    digest: str
    task: Task
    section: ServingSection
    keys: Keys
    batcher: Batcher
    metrics: Metrics
    info: dict[str, Any]
    """What `/info` tells everyone."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """What `/info` tells those with a key as well."""
    probe_rows: Sequence[Row] = ()
    stuck_after_s: float = 120.0
    unhealthy: str | None = None
    """Why the last health check failed; None: it did not."""

    @property
    def version_text(self) -> str:
        return str(self.version) if self.version is not None else self.digest[:12]

    async def check(self) -> None:
        """Raises `RuntimeError` where this replica does not work."""
        try:
            await self.batcher.check(self.probe_rows, stuck_after_s=self.stuck_after_s)
            self.unhealthy = None
        except RuntimeError as error:
            self.unhealthy = str(error)
            raise

    async def json(self, request: Request) -> Any:
        return await body.read_json(request, self.section.max_body_bytes)

    async def predict(self, request: Request, rows: Sequence[Row]) -> Answer:
        if len(rows) > self.section.max_inputs:
            sentence = (
                f"The request has {len(rows):,} inputs; this endpoint takes {self.section.max_inputs:,} at once (serving.max_inputs)."
            )
            raise Problem(413, "too_large", sentence)
        try:
            answer = await self.batcher.submit(rows, timeout_s=self._timeout_s(request))
        except (Overloaded, Late, Closed, BadItem) as error:
            if isinstance(error, BadItem):
                logger.warning("request %s: %s", request_id(request.scope), error, exc_info=error.__cause__)
            raise from_batcher(error) from None
        self.metrics.answered(len(rows), answer.tokens, answer.timings)
        request.scope["timings"] = answer.timings
        return answer

    def _timeout_s(self, request: Request) -> float:
        """The endpoint's limit, or the client's where it is shorter: Serve ends the request at that moment, so a little before."""
        given = request.headers.get(TIMEOUT_HEADER)
        if given is None:
            return self.section.request_timeout_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = float("nan")
        if not seconds > 0:
            raise Problem(400, "validation", f"{TIMEOUT_HEADER} is {given[:40]!r}; it must be a number of seconds above 0.")
        return min(self.section.request_timeout_s, 0.9 * seconds)


def request_id(scope: Scope) -> str:
    return scope.get("request_id", "")


def build(model: ServedModel, *, adds_request_id: bool) -> ASGIApp:
    """The application. `adds_request_id`: nothing in front of it (as Ray Serve is) adds the X-Request-Id header to answers."""
    app = FastAPI(
        title=f"{model.name} {model.version_text}",
        version=model.version_text,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    loaded = dialects.load()
    spoken = []
    default = loaded[0]
    for dialect in loaded:
        routes = dialect.routes(model)
        spoken += [dialect.name] if routes else []
        for route in routes:
            _add(app, model, dialect, route)
    model.info["dialects"] = spoken
    for route in _operational(app, model):
        _add(app, model, default, route)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            problem = Problem(405, "method_not_allowed", f"{request.method} is not allowed here; {allowed} is.", {"Allow": allowed})
        elif error.status_code == 404:
            problem = Problem(404, "not_found", "There is nothing at this path; POST / predicts, GET /docs shows what there is.")
        else:
            problem = Problem(error.status_code, "http", str(error.detail))
        return _failed(model, default, problem)

    app.add_exception_handler(HTTPException, refuse)
    return _Outermost(app, model, default, adds_request_id=adds_request_id)


def _add(app: FastAPI, model: ServedModel, dialect: Dialect, route: Route) -> None:
    async def endpoint(request: Request) -> Response:
        try:
            if not route.public:
                model.keys.check(request.headers)
            return await route.handler(request)
        except Problem as problem:
            return _failed(model, dialect, problem)

    app.add_api_route(
        route.path,
        endpoint,
        methods=[route.method],
        response_class=Response,
        response_model=None,
        include_in_schema=bool(route.operation),
        openapi_extra={**route.operation, **({} if route.public or not model.keys else {"security": [{"key": []}]})},
        operation_id=f"{dialect.name}_{route.method}_{re.sub(r'[^a-z]+', '_', route.path)}".lower(),
    )


def _failed(model: ServedModel, dialect: Dialect, problem: Problem) -> Response:
    if len(problem.sentence) > MAX_SENTENCE:
        problem = Problem(problem.status, problem.kind, problem.sentence[:MAX_SENTENCE] + "…", problem.headers)
    model.metrics.errors.labels(problem.kind).inc()
    return JSONResponse(dialect.error(problem), problem.status, headers=problem.headers)


def _operational(app: FastAPI, model: ServedModel) -> list[Route]:
    async def health(request: Request) -> Response:
        await _healthy(model)
        return JSONResponse({"status": "ok", "model": model.name, "version": model.version_text})

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def info(request: Request) -> Response:
        try:
            model.keys.check(request.headers)
        except Problem:
            return JSONResponse(model.info)
        return JSONResponse({**model.info, "lineage": model.lineage})

    async def metrics(request: Request) -> Response:
        return Response(model.metrics.text(), media_type=CONTENT_TYPE)

    async def docs(request: Request) -> Response:
        return HTMLResponse(page)

    async def openapi(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        return JSONResponse({**spec, "servers": [{"url": root or "/"}]})

    async def to_docs(request: Request) -> Response:
        return RedirectResponse("docs")

    async def favicon(request: Request) -> Response:
        return PlainTextResponse("", 204)

    def operation(summary: str, media_type: str = "application/json", *codes: str) -> dict[str, Any]:
        answers = {
            "200": {"description": "OK", "content": {media_type: {"schema": {}}}},
            **{code: {"description": "Not ready"} for code in codes},
        }
        return {"summary": summary, "tags": ["Operations"], "responses": answers}

    page = importlib.resources.files("serving").joinpath("docs.html").read_text(encoding="utf-8").replace("{{title}}", app.title)
    routes = [
        Route("/", health, operation("The same as /health", "application/json", "503"), "GET", public=True),
        Route("/health", health, operation("Can it answer? 503 says why not", "application/json", "503"), "GET", public=True),
        Route("/readyz", health, operation("The same as /health", "application/json", "503"), "GET", public=True),
        Route("/livez", live, operation("Is the process there?"), "GET", public=True),
        Route("/info", info, operation("Model, version, task, limits; with a key also the lineage"), "GET", public=True),
        Route("/metrics", metrics, operation("Prometheus metrics of one replica", "text/plain"), "GET", public=True),
        Route("/openapi.json", openapi, operation("This description"), "GET", public=True),
        Route("/docs", docs, {}, "GET", public=True),
        Route("/redoc", to_docs, {}, "GET", public=True),
        Route("/favicon.ico", favicon, {}, "GET", public=True),
    ]
    spec: dict[str, Any] = {}

    def describe() -> None:
        spec.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
        if model.keys:
            spec.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}

    app.state.describe = describe
    return routes


async def _healthy(model: ServedModel) -> None:
    """`Problem` 503 where the replica does not work; cheap, so the model is not run: Serve's own checks do that."""
    if model.unhealthy is not None:
        raise Problem(503, "unhealthy", f"Not ready: {model.unhealthy}.", {"Retry-After": "5"})


class _Outermost:
    """Around everything: the request's id, headers of every answer, counts, and no traceback to any client."""

    def __init__(self, app: FastAPI, model: ServedModel, dialect: Dialect, *, adds_request_id: bool):
        self.app, self.model, self.dialect, self.adds_request_id = app, model, dialect, adds_request_id
        app.state.describe()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 499
        if scope.get("root_path") and scope["path"] == scope["root_path"]:
            scope["path"] += "/"  # Under a prefix, http://host/NAME is the root too.
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        scope["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                headers.append((b"x-model-version", self.model.version_text.encode()))
                headers.append((b"server-timing", _server_timing(scope, time.perf_counter() - started)))
                if self.adds_request_id:
                    headers.append((b"x-request-id", scope["request_id"].encode()))
            await send(message)

        self.model.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, answer)
        except ClientDisconnect:
            logger.info("request %s: the client went away", scope["request_id"])
        except Exception:
            # The one place for defects: logged whole, told by their request's id alone.
            logger.exception("request %s failed", scope["request_id"])
            if status != 499:
                raise
            problem = Problem(500, "internal", f"The server failed to answer; its log has more under the request id {scope['request_id']}.")
            await _failed(self.model, self.dialect, problem)(scope, receive, answer)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.model.metrics.in_flight.dec()
            self.model.metrics.requests.labels(path, str(status)).inc()
            if "timings" in scope:
                self.model.metrics.stages.labels("total").observe(time.perf_counter() - started)


def _server_timing(scope: Scope, total: float) -> bytes:
    timings = scope.get("timings")
    parts = [] if timings is None else [("queue", timings.queue), ("tokenise", timings.tokenise), ("inference", timings.inference)]
    return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in [*parts, ("total", total)]).encode()
