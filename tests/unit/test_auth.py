"""API keys: where they come from, what is refused before anything starts, and what a request must carry."""

from pathlib import Path

import pytest

from orchestrator.config import ServingSection
from orchestrator.errors import InputError
from serving import auth
from serving.auth import Keys
from serving.problem import Problem

KEY, OTHER = "k" * 24, "o" * 24


def section(**settings: object) -> ServingSection:
    return ServingSection.parse(settings)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", f" {KEY}, {OTHER},")
    assert auth.keys(section()) == [KEY, OTHER]
    assert auth.keys(section(host="0.0.0.0")) == [KEY, OTHER]
    assert auth.keys(section(auth="none")) == []


def test_keys_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", "x" * 20)
    file = tmp_path / "keys"
    file.write_text(f"# team A\n{KEY}\n\n  {OTHER}  \n")
    assert auth.keys(section(auth=str(file))) == [KEY, OTHER]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    assert auth.keys(section(host=host)) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-1.example"])
def test_other_hosts_need_a_key_unless_the_job_says_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    with pytest.raises(InputError, match=r"serving\.host is .* no API keys.*ORCHESTRATOR_API_KEYS"):
        auth.keys(section(host=host))
    assert auth.keys(section(host=host, auth="none")) == []


def test_bad_keys_are_refused_without_being_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", f"{KEY},hunter2")
    with pytest.raises(InputError, match=r"key 2 of ORCHESTRATOR_API_KEYS must have at least 16") as short:
        auth.keys(section())
    assert "hunter2" not in str(short.value)
    with pytest.raises(InputError, match=r"key file .*missing.* can't be read: No such file"):
        auth.keys(section(auth=str(tmp_path / "missing")))
    (tmp_path / "empty").write_text("# nothing yet\n")
    with pytest.raises(InputError, match="has no keys"):
        auth.keys(section(auth=str(tmp_path / "empty")))
    (tmp_path / "spaces").write_text("a key with spaces in it\n")
    with pytest.raises(InputError, match="no space"):
        auth.keys(section(auth=str(tmp_path / "spaces")))


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY} "}, {"x-api-key": OTHER}],
)
def test_a_known_key_is_let_in(headers: dict[str, str]) -> None:
    Keys([auth.hashed(KEY), auth.hashed(OTHER)]).check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": "Bearer \xff\xfe"},
        {"x-api-key": auth.hashed(KEY)},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
    ],
)
def test_anything_else_is_401_and_says_how(headers: dict[str, str]) -> None:
    with pytest.raises(Problem) as refused:
        Keys([auth.hashed(KEY)]).check(headers)
    assert refused.value.status == 401
    assert refused.value.headers["WWW-Authenticate"].startswith("Bearer")
    assert KEY not in str(refused.value)


def test_an_open_endpoint_lets_everyone_in() -> None:
    Keys([]).check({})


def test_what_replicas_are_told_has_hashes_only() -> None:
    from serving.deployment import Spec

    spec = Spec(bundle="/b", name="m", version=1, section=section(), key_hashes=(auth.hashed(KEY),))
    assert KEY not in str(spec.to_json())
    assert Keys(Spec.model_validate(spec.to_json()).key_hashes)
