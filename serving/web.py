"""The HTTP application of a replica: the dialects' routes and the operational ones, around one served model."""

from __future__ import annotations

import html
import importlib.resources
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route as StarletteRoute
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

MOST_BODY_BYTES = {"text": 2_000_000, "image": 20_000_000, "audio": 50_000_000}
"""Of a request, by what the model reads, where the job does not say."""
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
        return await body.read_json(request, self.max_body_bytes)

    async def content(self, request: Request) -> bytes:
        return await body.read(request, self.max_body_bytes)

    @property
    def max_body_bytes(self) -> int:
        return self.section.max_body_bytes or MOST_BODY_BYTES[self.task.modality]

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
    spoken = {dialect: routes for dialect in dialects.load() if (routes := dialect.routes(model))}
    default = next(iter(spoken))
    model.info["dialects"] = [dialect.name for dialect in spoken]
    routes = [(dialect, route) for dialect, routes in spoken.items() for route in routes]
    routes += [(default, route) for route in _operational(model)]
    routes += [(default, route) for route in _described(model, [route for _, route in routes])]

    async def refuse(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        if status == 405:
            allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
            problem = Problem(405, "method_not_allowed", f"{request.method} is not allowed here; {allowed} is.", {"Allow": allowed})
        else:
            problem = Problem(404, "not_found", "There is nothing at this path; POST / predicts, GET /docs shows what there is.")
        return _failed(model, default, problem)

    by_path: dict[str, dict[str, tuple[Dialect, Route]]] = {}
    for dialect, route in routes:
        by_path.setdefault(route.path, {})[route.method] = (dialect, route)
    app = Starlette(
        routes=[_mounted(model, path, methods) for path, methods in by_path.items()], exception_handlers={404: refuse, 405: refuse}
    )
    app.router.redirect_slashes = False
    return _Outermost(app, model, adds_request_id=adds_request_id)


def _mounted(model: ServedModel, path: str, methods: dict[str, tuple[Dialect, Route]]) -> StarletteRoute:
    async def endpoint(request: Request) -> Response:
        dialect, route = methods["GET" if request.method == "HEAD" else request.method]
        try:
            if not route.public:
                model.keys.check(request.headers)
            return await route.handler(request)
        except Problem as problem:
            return _failed(model, dialect, problem)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            id_ = request_id(request.scope)
            logger.exception("request %s failed", id_)
            sentence = f"The server failed to answer; its log has more under the request id {id_}."
            return _failed(model, dialect, Problem(500, "internal", sentence))

    return StarletteRoute(path, endpoint, methods=list(methods), name=path)


def _failed(model: ServedModel, dialect: Dialect, problem: Problem) -> Response:
    if len(problem.sentence) > MAX_SENTENCE:
        problem = Problem(problem.status, problem.kind, problem.sentence[:MAX_SENTENCE] + "…", problem.headers)
    model.metrics.errors.labels(problem.kind).inc()
    return JSONResponse(dialect.error(problem), problem.status, headers=problem.headers)


def _operational(model: ServedModel) -> list[Route]:
    async def health(request: Request) -> Response:
        if model.unhealthy is not None:  # As Serve's health checks found it; asking costs nothing, so anyone may ask often.
            raise Problem(503, "unhealthy", f"Not ready: {model.unhealthy}.", {"Retry-After": "5"})
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

    ready = {"200": {"description": "It can"}, "503": {"description": "It can't; the error says why"}}
    return [
        _get("/", health, "The same as /health", ready),
        _get("/health", health, "Can it answer?", ready),
        _get("/readyz", health, "The same as /health", ready),
        _get("/livez", live, "Is the process there?"),
        _get("/info", info, "Model, version, task and limits; with a key the lineage as well"),
        _get("/metrics", metrics, "Prometheus metrics of the replica that answers"),
    ]


def _get(path: str, handler: Any, summary: str, responses: dict[str, Any] | None = None) -> Route:
    operation = {"summary": summary, "tags": ["Operations"], "responses": responses or {"200": {"description": "OK"}}}
    return Route(path, handler, operation, "GET", public=True)


def _described(model: ServedModel, routes: Sequence[Route]) -> list[Route]:
    """The routes that describe the others: OpenAPI, and a page made from it that needs no other server."""
    title = f"{model.name} {model.version_text}"
    spec: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": title, "version": model.version_text}, "paths": {}}
    for route in routes:
        operation = route.operation if route.public or not model.keys else {**route.operation, "security": [{"key": []}]}
        spec["paths"].setdefault(route.path.replace(":path}", "}"), {})[route.method.lower()] = operation
    if model.keys:
        spec["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    page = importlib.resources.files("serving").joinpath("docs.html").read_text(encoding="utf-8").replace("{{title}}", html.escape(title))

    async def openapi(request: Request) -> Response:
        return JSONResponse({**spec, "servers": [{"url": request.scope.get("root_path") or "/"}]})

    async def docs(request: Request) -> Response:
        return HTMLResponse(page)

    return [_get("/openapi.json", openapi, "OpenAPI description"), _get("/docs", docs, "A page to read and try it")]


class _Outermost:
    """Around everything: the request's id, headers of every answer, and counts."""

    def __init__(self, app: ASGIApp, model: ServedModel, *, adds_request_id: bool):
        self.app, self.model, self.adds_request_id = app, model, adds_request_id

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
