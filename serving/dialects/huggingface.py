"""The Hugging Face Inference dialect: `{"inputs": …, "parameters": …}` to `/` or `/models/NAME`.

As `huggingface_hub.InferenceClient(model=URL)`, the JavaScript client and Inference Endpoints speak it; the answer's shape
is the task's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Row
from serving.dialects import Model, Route
from serving.problem import Problem, wrong_input

ERROR_SCHEMA = {
    "type": "object",
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
    "required": ["error", "error_type"],
}
_IGNORED = {"options", "model", "stream"}
"""Top-level keys that clients send and that change nothing here."""


class HuggingFace:
    name = "huggingface"

    def error(self, problem: Problem) -> Any:
        return {"error": problem.sentence, "error_type": problem.kind}

    def routes(self, model: Model) -> list[Route]:
        async def answer(request: Request) -> Response:
            return await _answer(model, request)

        async def answer_named(request: Request) -> Response:
            named = request.path_params["model"]
            if named != model.name:
                sentence = f"There is no model {named[:200]!r} here.{did_you_mean(named[:200], [model.name])}"
                raise Problem(404, "not_found", sentence)
            return await _answer(model, request)

        operation = _operation(model)
        by_name = {
            **operation,
            "summary": f"{operation['summary']}, by the model's name",
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [model.name]}}],
        }
        return [Route("/", answer, operation), Route("/models/{model:path}", answer_named, by_name)]


async def _answer(model: Model, request: Request) -> Response:
    body = {"inputs": await model.content(request)} if _is_media(model, request) else await model.json(request)
    if not isinstance(body, dict):
        raise Problem(400, "validation", f'The body is {_kind(body)}; send an object: {{"inputs": …, "parameters": …}}.')
    if "inputs" not in body:
        hint = did_you_mean(next(iter(body)), ["inputs"]) if len(body) == 1 else ""
        raise Problem(
            400, "validation", f'The body has no "inputs"; send {{"inputs": …, "parameters": …}}.{hint if "mean" in hint else ""}'
        )
    inputs = body["inputs"]
    try:
        given = {} if body.get("parameters") is None else body["parameters"]
        beside = {key: body[key] for key in body.keys() & model.task.parameters.model_fields.keys() if body[key] is not None}
        if isinstance(given, dict):  # Some of Hugging Face's clients write a task's parameters beside `inputs`.
            given = {**beside, **given}
        parameters = model.task.parameters.parse(given, "parameters")
        rows = await _rows(model, inputs, parameters)
    except InputError as error:
        raise wrong_input(error) from None
    answer = await model.predict(request, rows)
    content = model.task.answer(answer.predictions, parameters, single=not isinstance(inputs, list))
    response = JSONResponse(content)
    ignored = sorted(key[:40] for key in body.keys() - {"inputs", "parameters"} - _IGNORED - model.task.parameters.model_fields.keys())[:10]
    if ignored:
        response.headers["X-Ignored-Keys"] = ", ".join(key for key in ignored if key.isascii() and key.isprintable())
    return response


async def _rows(model: Model, inputs: Any, parameters: Any) -> list[Row]:
    """Images and sounds are decoded to see that they are some, which takes too long for the event loop."""
    if model.task.modality == "text":
        return model.task.rows_from(inputs, parameters)
    return await asyncio.to_thread(model.task.rows_from, inputs, parameters)


def _is_media(model: Model, request: Request) -> bool:
    """Is the body itself the image or sound? Clients name its type, or nothing where they don't know it; JSON says that it is JSON."""
    return model.task.modality != "text" and "json" not in request.headers.get("content-type", "").lower()


def _operation(model: Model) -> dict[str, Any]:
    task = model.task
    inputs, parameters = task.inputs_schema(), task.parameters.model_json_schema()
    request = {
        "type": "object",
        "properties": {"inputs": inputs, "parameters": {"anyOf": [parameters, {"type": "null"}]}},
        "required": ["inputs"],
        "example": {"inputs": task.inputs_example()},
    }
    contents: dict[str, Any] = {"application/json": {"schema": request}}
    if task.modality != "text":
        contents |= {f"{task.modality}/*": {"schema": {"type": "string", "format": "binary"}}}
    errors = {
        "400": "The body is not JSON or of another shape than the schema",
        "401": "No API key, or one that isn't known",
        "404": "No such model or route",
        "413": "The body or the number of inputs is over the limit",
        "415": "The body is not application/json",
        "422": "Well-formed inputs that cannot be used, such as an empty text",
        "429": "The queue is full; Retry-After says when there will be room",
        "500": "A defect of the server",
        "503": "Starting or shutting down",
        "504": "No answer within the time limit",
    }
    failed = {"application/json": {"schema": ERROR_SCHEMA}}
    return {
        "summary": f"Hugging Face Inference: {task.key}",
        "tags": ["Hugging Face Inference"],
        "requestBody": {"required": True, "content": contents},
        "responses": {
            "200": {"description": "The answers", "content": {"application/json": {"schema": task.answer_schema()}}},
            **{code: {"description": text, "content": failed} for code, text in errors.items()},
        },
    }


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
