"""The Hugging Face dialect and the application around it, called in process, with an engine of fixed answers."""

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from orchestrator.config import ServingSection
from orchestrator.tasks import create
from serving import auth, web
from serving.auth import Keys
from serving.batcher import Batcher
from serving.metrics import Metrics

KEY = "a-key-of-many-characters"
TASK = create({"name": "text-classification", "labels": ["bad", "good"]})


class Engine:
    """Logits of a text: how often it says bad, and how often good."""

    task = TASK

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[{"input_ids": f"{row['text']} {row.get('text_pair') or ''}".split()}] for row in rows]

    def infer(self, examples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        if any("explode" in example["input_ids"] for example in examples):
            raise RuntimeError("secret path /srv/models/x")
        return [np.array([example["input_ids"].count("bad"), example["input_ids"].count("good")], dtype="float32") for example in examples]

    def decode(self, row: dict[str, Any], outputs: Sequence[Any]) -> dict[str, Any]:
        return TASK.decode(row, outputs)


def served(*keys: str, **settings: Any) -> web.ServedModel:
    section = ServingSection.parse({"max_body_bytes": 10_000, "max_inputs": 10, **settings})
    batcher = Batcher(Engine(), max_batch_tokens=1000, max_queue=section.max_queue)
    return web.ServedModel(
        name="reviews",
        version=3,
        digest="d" * 64,
        task=TASK,
        section=section,
        keys=Keys([auth.hashed(key) for key in keys]),
        batcher=batcher,
        metrics=Metrics(model="reviews", version="3", replica="r1", queued_rows=lambda: batcher.queued_rows),
        info={"model": "reviews", "version": 3},
        lineage={"lineage": {"data": "abc"}},
    )


class Client:
    """The application behind a blocking client."""

    def __init__(self, model: web.ServedModel):
        self.model = model
        self.app = web.build(model, adds_request_id=True)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, body: Any = None, path: str = "/", **options: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)


@pytest.fixture
def client() -> Iterator[Client]:
    model = served()
    yield Client(model)
    model.batcher.close()


@pytest.fixture
def locked() -> Iterator[Client]:
    model = served(KEY)
    yield Client(model)
    model.batcher.close()


def failed(answer: httpx.Response, status: int, kind: str = "validation") -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type"}
    assert body["error_type"] == kind
    assert answer.headers["x-request-id"]
    return body["error"]


# ---- answers -------------------------------------------------------------------------------------------------
def test_a_text_is_answered_with_a_nested_list_likeliest_first(client: Client) -> None:
    answer = client.post({"inputs": "good good"})
    assert answer.status_code == 200
    ((first, second),) = answer.json()
    assert (first["label"], second["label"]) == ("good", "bad")
    assert first["score"] == pytest.approx(np.exp(2) / (np.exp(2) + 1))
    assert first["score"] + second["score"] == pytest.approx(1)


def test_a_list_is_answered_with_a_list_a_row(client: Client) -> None:
    answer = client.post({"inputs": ["good", {"text": "bad", "text_pair": "bad"}], "parameters": {"top_k": 1}})
    assert [[entry["label"] for entry in entries] for entries in answer.json()] == [["good"], ["bad"]]


def test_parameters_are_the_tasks(client: Client) -> None:
    answer = client.post({"inputs": "good", "parameters": {"function_to_apply": "none"}})
    assert answer.json() == [[{"label": "good", "score": 1.0}, {"label": "bad", "score": 0.0}]]
    assert client.post({"inputs": "good", "parameters": None}).status_code == 200
    assert "top_k" in failed(client.post({"inputs": "good", "parameters": {"topk": 1}}), 400)
    assert "parameters" in failed(client.post({"inputs": "good", "parameters": [1]}), 400)


def test_the_model_may_be_named(client: Client) -> None:
    assert client.post({"inputs": "good"}, "/models/reviews").status_code == 200
    assert "'reviews'" in failed(client.post({"inputs": "good"}, "/models/review"), 404, "not_found")
    assert failed(client.post({"inputs": "good"}, "/models/org/other"), 404, "not_found")


def test_keys_that_change_nothing_are_named_in_a_header(client: Client) -> None:
    answer = client.post({"inputs": "good", "options": {"wait_for_model": True}, "temperature": 1})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-keys"] == "temperature"


def test_headers_tell_version_id_and_times(client: Client) -> None:
    answer = client.post({"inputs": "good"}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-model-version"] == "3"
    assert answer.headers["x-request-id"] == "mine-1"
    assert re.fullmatch(r"queue;dur=[\d.]+, tokenise;dur=[\d.]+, inference;dur=[\d.]+, total;dur=[\d.]+", answer.headers["server-timing"])
    assert client.post({"inputs": "good"}, headers={"x-request-id": "no\tgood"}).headers["x-request-id"] != "no\tgood"


def test_packed_bodies_are_unpacked(client: Client) -> None:
    body = json.dumps({"inputs": "good"}).encode()
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        assert client.post(content=packed, headers={"content-type": "application/json", "content-encoding": encoding}).status_code == 200


# ---- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not JSON"),
        (b"{'inputs': 1}", "not JSON"),
        (b'{"inputs": "a"} x', "not JSON"),
        (b"[]", "a list"),
        (b"null", "null"),
        (b"3", "a number"),
        (b'"text"', "a string"),
        (b"{}", 'no "inputs"'),
        (b'{"input": "good"}', "Did you mean 'inputs'"),
        (b'{"inputs": null}', "inputs"),
        (b'{"inputs": []}', "empty list"),
        (b'{"inputs": [[]]}', "inputs[0]"),
        (b'{"inputs": {"txt": "a"}}', "txt"),
        (b'{"inputs": {"text": 3}}', "inputs.text"),
        (b'{"inputs": NaN}', "NaN"),
        (b'{"inputs": -Infinity}', "Infinity"),
        (b'{"inputs": 1e999999}', "inputs"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"inputs": "\xff\xfe"}', "not UTF-8 at byte 12"),
        (b'{"inputs": "\\ud800"}', "surrogate"),
        (b'{"inputs": "a\x00b"}', "not JSON"),
        (b"[" * 5000 + b"]" * 5000, "levels deep"),
        (b'{"inputs":' + b'{"a":' * 500 + b"1" + b"}" * 501, "levels deep"),
        (b'"' + b'\\"' * 4000, "not JSON"),
        (b'{"inputs": "a", "parameters": {"top_k": 0}}', "top_k"),
        (b'{"inputs": "a", "parameters": {"top_k": 1e400}}', "top_k"),
    ],
)
def test_a_body_of_another_shape_is_400_and_says_what_is_wrong(client: Client, content: bytes, says: str) -> None:
    assert says in failed(client.post(content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("inputs", ["", "  \n", ["good", ""], {"text": ""}])
def test_what_is_well_formed_but_empty_is_422(client: Client, inputs: Any) -> None:
    assert "empty" in failed(client.post({"inputs": inputs}), 422)


def test_odd_texts_are_answered(client: Client) -> None:
    odd = ["a\x00b", "\ufeffgood", "😀" * 50, "\u202egood", "[CLS] [SEP] [MASK]", "é\u0301", "\ud83d\ude00"]
    for text in odd[:-1]:
        assert client.post({"inputs": text}).status_code == 200, ascii(text)
    pair = client.post(content=b'{"inputs": "\\ud83d\\ude00"}', headers={"content-type": "application/json"})
    assert pair.status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", "json"]
)
def test_other_content_types_are_415(client: Client, content_type: str) -> None:
    assert "application/json" in failed(client.post(content=b'{"inputs": "a"}', headers={"content-type": content_type}), 415)


def test_content_types_that_are_json_are_taken(client: Client) -> None:
    for content_type in ("application/json; charset=utf-8", "APPLICATION/JSON", 'application/vnd.x+json;charset="UTF-8"'):
        assert client.post(content=b'{"inputs": "a"}', headers={"content-type": content_type}).status_code == 200
    assert client.post(content=b'{"inputs": "a"}').status_code == 200
    assert "charset" in failed(client.post(content=b"{}", headers={"content-type": "application/json; charset=utf-16"}), 415)
    assert "Content-Encoding" in failed(client.post(content=b"{}", headers={"content-encoding": "br"}), 415)


def test_a_body_over_the_limit_is_413_declared_streamed_or_packed(client: Client) -> None:
    large = json.dumps({"inputs": "good " * 4000}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) > 10_000
    small_bomb = gzip.compress(b" " * 5_000_000)
    assert len(small_bomb) < 10_000
    for options in (
        {"content": large},
        {"content": chunks()},
        {"content": bomb, "headers": {"content-encoding": "gzip"}},
        {"content": small_bomb, "headers": {"content-encoding": "gzip"}},
        {"content": b"{}", "headers": {"content-length": "9" * 30}},
    ):
        assert "10,000 bytes" in failed(client.post(**options), 413, "too_large")


def test_broken_packing_is_400(client: Client) -> None:
    packed = gzip.compress(b'{"inputs": "a"}')
    assert "Content-Encoding" in failed(client.post(content=b"not gzip", headers={"content-encoding": "gzip"}), 400)
    assert "middle" in failed(client.post(content=packed[:-9], headers={"content-encoding": "gzip"}), 400)


def test_too_many_inputs_are_413(client: Client) -> None:
    assert "takes 10 at once" in failed(client.post({"inputs": ["good"] * 11}), 413, "too_large")


def test_a_long_sentence_about_a_long_input_is_cut(client: Client) -> None:
    assert len(failed(client.post({"inputs": "good", "parameters": {"top_k": "x" * 9000}}), 400)) < 1100


def test_unknown_paths_are_404_and_other_methods_405(client: Client) -> None:
    failed(client.post({"inputs": "a"}, "/nothing"), 404, "not_found")
    failed(client.get("/docs/"), 404, "not_found")
    answer = client.request("PUT", "/")
    assert "POST" in failed(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


def test_a_full_queue_is_429_with_retry_after() -> None:
    model = served(max_queue=5)
    try:
        model.batcher._rows = 5
        answer = Client(model).post({"inputs": ["good"] * 2})
        failed(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        model.batcher.close()


def test_no_answer_in_time_is_504_and_the_client_may_ask_for_less_time(client: Client) -> None:
    failed(client.post({"inputs": "good"}, headers={"x-request-timeout-seconds": "0.0000001"}), 504, "timeout")
    assert client.post({"inputs": "good"}, headers={"x-request-timeout-seconds": "5"}).status_code == 200
    for wrong in ("soon", "-1", "nan", "0"):
        assert "seconds above 0" in failed(client.post({"inputs": "good"}, headers={"x-request-timeout-seconds": wrong}), 400)


def test_a_closed_batcher_is_503(client: Client) -> None:
    client.model.batcher.close()
    failed(client.post({"inputs": "good"}), 503, "unhealthy")


def test_a_defect_is_500_without_its_insides_and_the_next_request_is_answered(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = failed(client.post({"inputs": ["good", "explode"]}), 500, "internal")
    assert "inputs[1]" in sentence
    assert "secret" not in sentence

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("secret path")

    with monkeypatch.context() as patch:
        patch.setattr(type(TASK), "answer", broken)
        sentence = failed(client.post({"inputs": "good"}, headers={"x-request-id": "abc"}), 500, "internal")
    assert "secret" not in sentence
    assert "abc" in sentence
    assert client.post({"inputs": "good"}).status_code == 200


# ---- keys ----------------------------------------------------------------------------------------------------
def test_predictions_need_the_key_and_operations_do_not(locked: Client) -> None:
    answer = locked.post({"inputs": "good"})
    failed(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    failed(locked.post(content=b"{", headers={"authorization": "Bearer wrong-key-wrong-key"}), 401, "unauthorized")
    failed(locked.post({"inputs": "good"}, "/models/reviews"), 401, "unauthorized")
    assert locked.post({"inputs": "good"}, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert locked.post({"inputs": "good"}, headers={"x-api-key": KEY}).status_code == 200
    for path in ("/", "/health", "/livez", "/readyz", "/info", "/metrics", "/docs", "/openapi.json"):
        assert locked.get(path).status_code == 200, path


def test_lineage_is_told_with_a_key_only(locked: Client, client: Client) -> None:
    assert "lineage" not in locked.get("/info").json()
    assert locked.get("/info", headers={"authorization": f"Bearer {KEY}"}).json()["lineage"] == {"lineage": {"data": "abc"}}
    assert "lineage" in client.get("/info").json()


# ---- operations ----------------------------------------------------------------------------------------------
def test_health_says_why_not(client: Client) -> None:
    assert client.get("/health").json()["status"] == "ok"
    client.model.unhealthy = "the inference thread has died"
    for path in ("/", "/health", "/readyz"):
        assert "the inference thread has died" in failed(client.get(path), 503, "unhealthy")
    assert client.get("/livez").status_code == 200


def test_the_health_check_notices_a_batcher_that_does_not_work(client: Client) -> None:
    client.model.probe_rows = [{"text": "explode"}]
    with pytest.raises(RuntimeError, match="probe"):
        asyncio.run(client.model.check())
    assert "probe" in failed(client.get("/health"), 503, "unhealthy")
    client.model.probe_rows = [{"text": "good"}]
    asyncio.run(client.model.check())
    assert client.get("/health").status_code == 200


def test_metrics_count_requests_rows_tokens_and_errors(client: Client) -> None:
    client.post({"inputs": ["good", "bad bad"]})
    client.post({"inputs": ""})
    client.post({"inputs": "a"}, "/nothing")
    text = client.get("/metrics").text
    for line in (
        'orchestrator_requests_total{code="200",route="/"} 1.0',
        'orchestrator_requests_total{code="422",route="/"} 1.0',
        'orchestrator_requests_total{code="404",route="other"} 1.0',
        'orchestrator_errors_total{kind="validation"} 1.0',
        "orchestrator_rows_total 2.0",
        "orchestrator_tokens_total 3.0",
        "orchestrator_queue_rows 0.0",
        'orchestrator_request_seconds_count{stage="total"} 1.0',
        'orchestrator_request_seconds_count{stage="inference"} 1.0',
        'orchestrator_model_info{model="reviews",replica="r1",version="3"} 1.0',
    ):
        assert line in text, text


def test_the_description_has_the_tasks_schemas_and_its_example_works(client: Client, locked: Client) -> None:
    spec = client.get("/openapi.json").json()
    operation = spec["paths"]["/"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["inputs"] == TASK.inputs_schema()
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == TASK.answer_schema()
    assert client.post(schema["example"]).status_code == 200
    assert {"/", "/models/{model}", "/health", "/info", "/metrics"} <= {path.replace(":path", "") for path in spec["paths"]}
    assert "security" not in operation
    assert locked.get("/openapi.json").json()["paths"]["/"]["post"]["security"]


def test_the_documentation_page_needs_no_other_server(client: Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "reviews 3" in page.text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page.text)
    assert "@import" not in page.text


def test_under_a_prefix_the_root_is_found_with_and_without_a_slash(client: Client) -> None:
    async def ask(path: str) -> int:
        statuses: list[int] = []
        body = json.dumps({"inputs": "good"}).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "/reviews",
            "query_string": b"", "headers": [], "scheme": "http", "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
        }  # fmt: skip
        await client.app(scope, receive, send)
        return statuses[0]

    assert [asyncio.run(ask(path)) for path in ("/reviews", "/reviews/", "/reviews/models/reviews", "/reviews/nothing")] == [
        200,
        200,
        200,
        404,
    ]
