"""The endpoint for real: a tiny bundle behind HAProxy and Ray Serve, asked over HTTP. Serve starts once for this file."""

import asyncio
import gzip
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from orchestrator import bundle as bundles
from orchestrator.config import ServingSection
from orchestrator.errors import InputError, StageError
from orchestrator.predictor import Predictor
from orchestrator.progress import Silent
from orchestrator.storage import Folder
from orchestrator.tasks import create
from serving import app, auth, haproxy
from serving.app import Endpoint
from serving.replay import ask, replay

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using extra keyword arguments on `Field` is deprecated:DeprecationWarning"
)  # ray.serve 2.60

TEXTS = [
    "good camera", "the phone is not very good", "hate it", "a great great great screen", "bad",
    "love the camera and the phone and the screen very very much " * 4, "fine", "poor 7 awful 3",
]  # fmt: skip
ROWS = [{"text": text, "row_id": f"reviews.csv:{number}"} for number, text in enumerate(TEXTS)]
KEY = "the-key-of-team-one-0123456789"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_bundle(folder: Path, base: str, seed: int) -> str:
    """A bundle with golden rows and a head of random weights."""
    import torch
    from transformers import AutoTokenizer

    task = create({"name": "text-classification", "labels": ["bad", "good"]})
    torch.manual_seed(seed)
    model = task.model(base, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # so that texts get scores that differ
    bundles.write(
        Folder(str(folder)), model=model, processor=AutoTokenizer.from_pretrained(base), task=task, job={"name": "reviews"},
        lineage={"data": "abc"}, metrics={},
    )  # fmt: skip
    predictor = Predictor(bundles.load(str(folder)), threads=1)
    golden = [{"row": {"text": row["text"]}, "prediction": prediction} for row, prediction in zip(ROWS, predictor(ROWS), strict=True)]
    bundles.complete(Folder(str(folder)), metrics={"test": {"accuracy": 0.5}}, golden=golden)
    return str(folder)


@pytest.fixture(scope="module")
def bundle(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bundle(tmp_path_factory.mktemp("serving") / "bundle", tiny_model, seed=1)


@pytest.fixture(scope="module")
def other_bundle(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bundle(tmp_path_factory.mktemp("serving") / "other", tiny_model, seed=2)


@pytest.fixture(scope="module")
def section() -> ServingSection:
    return ServingSection.parse(
        {"port": free_port(), "cpus_per_replica": 0.25, "max_body_bytes": 100_000, "max_inputs": 200, "auth": "none"}
    )


def test_a_port_in_use_is_said_before_anything_starts(ray_session: Any, bundle: str, section: ServingSection) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", section.port))
        taken.listen()
        with pytest.raises(InputError, match=rf"serving\.port: {section.port} on 127\.0\.0\.1 is in use by process {os.getpid()}"):
            app.deploy(bundle, section, name="reviews", version=1)
    assert app.status() == {}


def test_an_open_host_without_keys_is_refused_before_anything_starts(
    ray_session: Any, bundle: str, section: ServingSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    with pytest.raises(InputError, match=r"serving\.host is 0\.0\.0\.0.*no API keys"):
        app.deploy(bundle, section.model_copy(update={"host": "0.0.0.0", "auth": "auto"}), name="reviews", version=1)
    assert app.status() == {}


def test_what_is_no_bundle_is_refused_before_anything_starts(ray_session: Any, tmp_path: Path, section: ServingSection) -> None:
    with pytest.raises(InputError, match="not a bundle"):
        app.deploy(str(tmp_path), section, name="reviews", version=1)
    assert app.status() == {}


@pytest.fixture(scope="module")
def endpoint(ray_session: Any, bundle: str, section: ServingSection) -> Iterator[Endpoint]:
    yield app.deploy(bundle, section, name="reviews", version=3, timeout_s=120)
    app.shutdown()


@pytest.fixture(scope="module")
def predictor(bundle: str) -> Predictor:
    return Predictor(bundles.load(bundle), threads=1)


def expected(predictor: Predictor, text: str) -> list[list[dict[str, Any]]]:
    task = predictor.task
    return task.answer(predictor([{"text": text}]), task.parameters(), single=True)


def test_answers_are_the_predictors(endpoint: Endpoint, predictor: Predictor) -> None:
    assert endpoint.url == f"http://127.0.0.1:{httpx.URL(endpoint.url).port}"
    assert (endpoint.name, endpoint.version) == ("reviews", 3)
    for text in TEXTS:
        answer = httpx.post(endpoint.url, json={"inputs": text})
        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "3"
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert "inference;dur=" in answer.headers["server-timing"]
        assert predictor.task.answer_difference(answer.json(), expected(predictor, text)) < 1e-5
    together = httpx.post(f"{endpoint.url}/models/reviews", json={"inputs": TEXTS})
    alone = [expected(predictor, text)[0] for text in TEXTS]
    assert predictor.task.answer_difference(together.json(), alone) < 1e-5


def test_the_hugging_face_client_works_unmodified(endpoint: Endpoint, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import _detect_agent

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # it would not ask this machine either
    monkeypatch.setattr(_detect_agent, "_registry", {})  # which it would look up at huggingface.co
    for url in (endpoint.url, f"{endpoint.url}/models/reviews"):
        client = InferenceClient(model=url)
        elements = client.text_classification(TEXTS[1])
        found = [[{"label": element.label, "score": element.score} for element in elements]]
        assert predictor.task.answer_difference(found, expected(predictor, TEXTS[1])) < 1e-5
        assert len(client.text_classification(TEXTS[1], top_k=1)) == 1
    with pytest.raises(HfHubHTTPError, match="empty"):
        client.text_classification("")


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
        (400, {"json": {"text": "good"}}),
        (404, {"url": "/nothing", "json": {}}),
        (404, {"url": "/models/other", "json": {"inputs": "good"}}),
        (405, {"method": "DELETE"}),
        (413, {"json": {"inputs": "good " * 50_000}}),
        (413, {"content": gzip.compress(b" " * 5_000_000), "headers": {"content-encoding": "gzip", "content-type": "application/json"}}),
        (413, {"content": (b"x" * 1000 for _ in range(200)), "headers": {"content-type": "application/json"}}),
        (413, {"json": {"inputs": ["good"] * 201}}),
        (415, {"content": b"inputs=good", "headers": {"content-type": "application/x-www-form-urlencoded"}}),
        (422, {"json": {"inputs": " "}}),
        (504, {"json": {"inputs": "good"}, "headers": {"x-request-timeout-seconds": "0.00001"}}),
    ],
)
def test_errors_are_json_also_through_the_proxy(endpoint: Endpoint, status: int, request_: dict[str, Any]) -> None:
    options = {"method": "POST", **request_, "url": endpoint.url + request_.get("url", "/")}
    answer = httpx.request(**options)
    if "x-request-timeout-seconds" in request_.get("headers", {}):
        # Serve ends the request at the moment the client names, we a little before: with so little time either may come first.
        assert answer.status_code in (504, 408)
        return
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "error_type"}
    assert not [part for part in ("Traceback", ".py", "site-packages", str(Path.cwd())) if part in answer.text]


def test_hostile_bodies_are_refused_and_leave_it_unharmed(endpoint: Endpoint) -> None:
    bodies = [
        b"[" * 90_000,
        b'{"inputs":' * 9_000,
        b"\x00" * 100,
        b"\xff" * 100,
        b'{"inputs": "\\ud800"}',
        b'{"inputs": 1e99999}',
        b'"' + b'\\"' * 40_000,
    ]
    bodies += [b'{"inputs": ' + b"9" * 90_000 + b"}", json.dumps({"inputs": ["\x00", "\u202e" * 500, "😀" * 500]}).encode()]
    with httpx.Client() as client:
        for body in bodies:
            answer = client.post(endpoint.url, content=body, headers={"content-type": "application/json"})
            assert answer.status_code < 500, (body[:40], answer.text)
        assert client.post(endpoint.url, json={"inputs": "good"}).status_code == 200


def test_64_clients_at_once_are_answered_each_with_its_own(endpoint: Endpoint, predictor: Predictor) -> None:
    answers = {text: expected(predictor, text) for text in TEXTS}

    async def client(http: httpx.AsyncClient, number: int) -> None:
        for turn in range(8):
            text = TEXTS[(number + turn) % len(TEXTS)]
            answer = await http.post(endpoint.url, json={"inputs": text})
            assert answer.status_code == 200, answer.text
            assert predictor.task.answer_difference(answer.json(), answers[text]) < 1e-4

    async def all_clients() -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as http:
            await asyncio.gather(*[client(http, number) for number in range(64)])

    asyncio.run(all_clients())


def test_the_rows_of_a_request_go_through_the_model_together(endpoint: Endpoint) -> None:
    def large_batches() -> float:
        metrics = httpx.get(f"{endpoint.url}/metrics").text
        every, small = (
            float(metrics.split(f"{name} ")[1].split()[0])
            for name in ("orchestrator_batch_examples_count", 'orchestrator_batch_examples_bucket{le="4.0"}')
        )
        return every - small

    before = large_batches()
    assert httpx.post(endpoint.url, json={"inputs": ["good camera"] * 8}).status_code == 200
    assert large_batches() == before + 1


def test_what_it_says_of_itself(endpoint: Endpoint) -> None:
    info = httpx.get(f"{endpoint.url}/info").json()
    assert (info["model"], info["version"], info["task"], info["labels"]) == ("reviews", 3, "text-classification", ["bad", "good"])
    assert info["digest"] == endpoint.digest
    assert info["lineage"]["lineage"] == {"data": "abc"}
    assert info["limits"]["max_inputs"] == 200
    for path in ("/", "/health", "/readyz", "/livez", "/metrics", "/docs", "/openapi.json"):
        assert httpx.get(endpoint.url + path).status_code == 200, path
    (status,) = app.status().values()
    assert status["status"] == "RUNNING"
    assert status["replicas"] == {"RUNNING": 1}


def test_nothing_of_it_listens_beyond_this_machine(endpoint: Endpoint) -> None:
    port = httpx.URL(endpoint.url).port
    listening = [connection for connection in psutil.net_connections("tcp") if connection.status == psutil.CONN_LISTEN]
    proxy = next(connection.pid for connection in listening if connection.laddr.port == port)
    if haproxy.environment():  # its metrics and statistics ports are closed
        assert psutil.Process(proxy).name() == "haproxy"
        assert [tuple(one.laddr) for one in listening if one.pid == proxy] == [("127.0.0.1", port)]
    replica = replica_pid("reviews")
    assert {one.laddr.ip for one in listening if one.pid == replica and 30_000 <= one.laddr.port <= 31_000} <= {"127.0.0.1"}


def test_the_replay_agrees_and_tells_where_it_does_not(endpoint: Endpoint, predictor: Predictor) -> None:
    predictions = predictor(ROWS)
    replayed = replay(endpoint.url, predictor.task, ROWS, predictions, 0.001)
    assert replayed.rows == len(ROWS)
    assert 0 <= replayed.largest_difference < 1e-4
    wrong = [*predictions[:5], {**predictions[5], "scores": {"bad": 0.25, "good": 0.75}}, *predictions[6:]]
    with pytest.raises(StageError, match=r"row 'reviews\.csv:5' .*0\.75.* was expected and .* came"):
        replay(endpoint.url, predictor.task, ROWS, wrong, 0.001)
    ((inputs, answer),) = ask(endpoint.url, predictor.task, ROWS[:1])
    assert inputs == TEXTS[0]
    assert {entry["label"] for entry in answer[0]} == {"bad", "good"}


def replica_pid(name: str) -> int:
    (replica,) = [
        replica for replica in app.details()["applications"][name]["deployments"]["replica"]["replicas"] if replica["state"] == "RUNNING"
    ]
    return replica["pid"]


class Load:
    """Two clients that ask all the time, and what they got: (status, version) -> how often."""

    def __init__(self, url: str):
        self.url, self.seen, self._stop = url, Counter[tuple[int, str]](), threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                answer = client.post(self.url, json={"inputs": "good camera"})
                self.seen[answer.status_code, answer.headers.get("x-model-version", "")] += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def break_weights(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content)


def break_answers(folder: Path) -> None:
    golden = json.loads((folder / "golden.json").read_text())
    golden[0]["prediction"]["scores"] = {"bad": 0.5, "good": 0.5}
    metrics = json.loads((folder / "metrics.json").read_text())
    bundles.complete(Folder(str(folder)), metrics=metrics, golden=golden)


def test_a_model_that_no_longer_answers_as_when_it_was_scored_does_not_take_over(
    endpoint: Endpoint, bundle: str, section: ServingSection, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "broken")
    break_answers(tmp_path / "broken")
    with Load(endpoint.url) as load, pytest.raises(StageError, match=r"could not be deployed: .* does not predict what it did") as failed:
        app.deploy(str(tmp_path / "broken"), section, name="reviews", version=5, timeout_s=120)
    assert "Traceback" not in str(failed.value)
    assert {status for status, _ in load.seen} == {200}, load.seen
    assert {version for _, version in load.seen} == {"3"}
    app.deploy(bundle, section, name="reviews", version=3, timeout_s=120)


def test_an_altered_bundle_is_refused(endpoint: Endpoint, bundle: str, section: ServingSection, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "altered")
    break_weights(tmp_path / "altered")
    with pytest.raises(InputError, match=r"model\.safetensors differs from its manifest"):
        app.deploy(str(tmp_path / "altered"), section, name="reviews", version=5)
    assert httpx.post(endpoint.url, json={"inputs": "good"}).headers["x-model-version"] == "3"


def test_a_deployment_that_the_cluster_has_no_room_for_says_so(endpoint: Endpoint, bundle: str, section: ServingSection) -> None:
    with pytest.raises(StageError, match=r"did not come up within 3 s .*of 2 CPUs"):
        app.deploy(
            bundle, section.model_copy(update={"cpus_per_replica": 64.0, "request_timeout_s": 1.0}), name="huge", version=1, timeout_s=3
        )
    wait_for(lambda: "huge" not in app.status(), 30)


class Interrupting(Silent):
    """Asks this process to stop once the endpoint says that it serves."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
        if sentence.startswith("Serving"):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_keys_are_asked_for_and_another_model_answers_beside_the_first(
    endpoint: Endpoint, bundle: str, predictor: Predictor, section: ServingSection, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"# team one\n{KEY}\n")
    locked = section.model_copy(update={"auth": str(tmp_path / "keys")})
    beside = app.deploy(bundle, locked, name="locked", version=1, timeout_s=120)
    try:
        assert beside.url == f"{endpoint.url}/locked"
        refused = httpx.post(beside.url, json={"inputs": "good"})
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert refused.json()["error_type"] == "unauthorized"
        assert httpx.post(beside.url, json={"inputs": "good"}, headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert httpx.post(f"{beside.url}/models/locked", json={"inputs": "good"}, headers={"x-api-key": KEY}).status_code == 200
        assert replay(beside.url, predictor.task, ROWS, predictor(ROWS), 0.001, api_key=app.a_key(locked)).rows == len(ROWS)
        assert httpx.get(f"{beside.url}/health").status_code == 200
        assert httpx.post(endpoint.url, json={"inputs": "good"}).status_code == 200
        assert KEY not in str(app.details())
        assert auth.hashed(KEY) != KEY
        app.hold(beside, Interrupting())  # takes its own endpoint down and no other
        assert set(app.status()) == {"reviews"}
    finally:
        app.delete("locked")
    assert httpx.post(endpoint.url, json={"inputs": "good"}).status_code == 200


def test_autoscaling_is_as_the_job_says(endpoint: Endpoint, bundle: str, section: ServingSection) -> None:
    scaled = ServingSection.parse({**section.to_json(), "replicas": {"min": 1, "max": 3, "target": 7}})
    app.deploy(bundle, scaled, name="scaled", version=1, timeout_s=120)
    try:
        deployed = app.details()["applications"]["scaled"]["deployments"]["replica"]["deployment_config"]
        scaling = deployed["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 3, 7)
        assert deployed["max_surge_percent"] == 100
    finally:
        app.delete("scaled")


def test_a_killed_replica_is_replaced(endpoint: Endpoint) -> None:
    before = replica_pid("reviews")
    os.kill(before, signal.SIGKILL)
    seen = Counter[int]()

    def answered() -> bool:
        answer = httpx.post(endpoint.url, json={"inputs": "good"}, timeout=30)
        seen[answer.status_code] += 1
        if answer.status_code != 200:
            assert answer.json().keys() == {"error", "error_type"}, answer.text
        return answer.status_code == 200

    wait_for(lambda: answered() and replica_pids("reviews") not in ([], [before]), 60)
    assert seen.keys() <= {200, 503}


def replica_pids(name: str) -> list[int]:
    replicas = app.details()["applications"][name]["deployments"]["replica"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_new_version_takes_over_without_a_failed_request(endpoint: Endpoint, other_bundle: str, section: ServingSection) -> None:
    with Load(endpoint.url) as load:
        newer = app.deploy(other_bundle, section, name="reviews", version=4, timeout_s=120)
        assert newer.url == endpoint.url
        assert httpx.get(f"{endpoint.url}/info").json()["digest"] == newer.digest
        time.sleep(haproxy.DRAIN_S + 2)
        assert httpx.post(endpoint.url, json={"inputs": "good"}).headers["x-model-version"] == "4"
    assert {status for status, _ in load.seen} == {200}, load.seen
    assert {version for _, version in load.seen} == {"3", "4"}


def test_holding_ends_with_sigterm_and_takes_the_endpoint_down(endpoint: Endpoint) -> None:
    handler, display = signal.getsignal(signal.SIGTERM), Interrupting()
    app.hold(endpoint, display)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert display.said[0] == f"Serving reviews at {endpoint.url} until Ctrl-C."
    assert app.status() == {}
    with pytest.raises(httpx.TransportError):
        httpx.get(endpoint.url)
