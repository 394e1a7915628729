"""Strict, frozen values and `--set`."""

import math
from typing import Literal

import pytest
from pydantic import model_validator

from orchestrator.errors import InputError, did_you_mean
from orchestrator.schema import Schema, override


class Inner(Schema):
    learning_rate: float = 1e-3
    """How fast."""
    kind: Literal["a", "b"] = "a"


class Outer(Schema):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: list[Inner] = []
    named: dict[str, Inner] = {}

    @model_validator(mode="after")
    def _not_forbidden(self):
        if self.name == "forbidden":
            raise ValueError("the name 'forbidden' is taken; choose another")
        return self


def test_a_value_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="x").name = "y"  # type: ignore[misc]


def test_json_round_trip_keeps_infinities_and_nan():
    value = Inner(learning_rate=math.inf)
    assert Inner.parse(value.to_json()) == value
    assert math.isnan(Inner.parse(Inner(learning_rate=math.nan).to_json()).learning_rate)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"name": "x", "iner": {}}, "job.yaml: unknown key 'iner'. Did you mean 'inner'?"),
        ({"name": "x", "inner": {"learning_rat": 1}}, "job.yaml: unknown key 'inner.learning_rat'. Did you mean 'learning_rate'?"),
        ({"name": "x", "maybe": {"kid": "a"}}, "job.yaml: unknown key 'maybe.kid'. Did you mean 'kind'?"),
        ({"name": "x", "many": [{}, {"kid": "a"}]}, "job.yaml: unknown key 'many.1.kid'. Did you mean 'kind'?"),
        ({"name": "x", "named": {"one": {"kid": "a"}}}, "job.yaml: unknown key 'named.one.kid'. Did you mean 'kind'?"),
        ({"name": "x", "inner": {"zzz": 1}}, "job.yaml: unknown key 'inner.zzz'. inner has 'learning_rate', 'kind'."),
        ({}, "job.yaml: 'name' is missing."),
        ({"name": "forbidden"}, "job.yaml: the name 'forbidden' is taken; choose another."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(value, sentence):
    with pytest.raises(InputError) as caught:
        Outer.parse(value, "job.yaml")
    assert str(caught.value) == sentence


def test_a_wrong_value_names_the_field_and_what_stood_there():
    with pytest.raises(InputError, match=r"inner\.learning_rate: .*number.* \(given: 'fast'\)\."):
        Outer.parse({"name": "x", "inner": {"learning_rate": "fast"}})
    with pytest.raises(InputError, match=r"many\.1\.kind: .*'a' or 'b'.* \(given: 'c'\)\."):
        Outer.parse({"name": "x", "many": [{}, {"kind": "c"}]})


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(InputError) as caught:
        Outer.parse({"inner": {"kind": "c"}, "other": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_a_docstring_under_a_field_is_its_description():
    assert Inner.model_json_schema()["properties"]["learning_rate"]["description"] == "How fast."


@pytest.mark.parametrize(
    ("assignment", "result"),
    [
        ("inner.learning_rate=3e-5", {"name": "x", "inner": {"learning_rate": "3e-5"}}),
        ("inner.kind=b", {"name": "x", "inner": {"kind": "b"}}),
        ("name=a=b", {"name": "a=b"}),
        ("many=[{kind: b}]", {"name": "x", "many": [{"kind": "b"}]}),
        ("maybe=null", {"name": "x", "maybe": None}),
        ("maybe.kind=b", {"name": "x", "maybe": {"kind": "b"}}),
        ("name=", {"name": None}),
        (" name =y", {"name": "y"}),
    ],
)
def test_override(assignment, result):
    value = {"name": "x"}
    assert override(value, [assignment]) == result
    assert value == {"name": "x"}


def test_the_last_override_wins():
    assert override({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_a_task_named_by_a_word_can_be_given_keys():
    assert override({"task": "text-classification"}, ["task.problem=regression"]) == {
        "task": {"name": "text-classification", "problem": "regression"}
    }


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [("learning_rate", "path=value"), ("=3", "path=value"), ("a=[1", "not YAML"), ("name.first=x", "name is 'x', not a section")],
)
def test_an_override_that_cannot_be_is_a_sentence(assignment, sentence):
    with pytest.raises(InputError, match=sentence):
        override({"name": "x"}, [assignment])


def test_names_far_from_all_get_the_list():
    assert did_you_mean("zzz", ["epochs", "seed"]) == " There is 'epochs', 'seed'."
    assert did_you_mean("zzz", []) == ""
