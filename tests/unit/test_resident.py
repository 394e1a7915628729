"""Rows that stay in memory are those of the stream, in its order; what is kept between trials is as if it were loaded anew."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchestrator import models, processors
from orchestrator.config import ModelSection
from orchestrator.data import resident, stream
from orchestrator.data.resident import Resident, ResidentRows, ResidentStream
from orchestrator.data.stream import Encoding, Part, RankStream, SplitRows
from orchestrator.loop import Share
from orchestrator.search import warm
from orchestrator.tasks.text_classification import TextClassification
from tests.fixtures.tiny import text_base
from tests.ray.conftest import WORDS, write_reviews

FILES, VALIDATION = [90, 0, 41, 60], 31


def in_this_process(encoding: Encoding, parts: Iterable[Part], *, with_rows: bool = False, **_: Any) -> Iterator[pa.Table]:
    """What the pipeline of Ray Data yields, without Ray."""
    every = list(parts)
    yield from stream._run_part(pa.table({"item": list(range(len(every)))}), encoding=encoding, parts=every, with_rows=with_rows)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "pipeline", in_this_process)
    monkeypatch.setattr(TextClassification, "rows_at_once", 16)
    warm.forget()
    yield
    warm.forget()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_base(tmp_path_factory.mktemp("base"), WORDS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = write_reviews(tmp_path_factory.mktemp("reviews"), FILES, VALIDATION)
    return made.model_copy(update={"task": made.task.model_copy(update={"max_length": 8})})


def batches(shares: Iterable[Share]) -> list[Share]:
    return [Share(share.step, share.row_ids, [dict(example) for example in share.examples], share.borrowed) for share in shares]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch", [7, 16, 500])
def test_batches_are_those_of_the_stream_from_any_step_on(base: str, prepared: Any, batch: int, grouped: bool) -> None:
    order = {"seed": 3, "global_batch": batch, "group_by_length": grouped}
    encoding = Encoding.of(prepared, "train", processors.load(base, "text"), rank=0, world=1, **order)
    split = warm.split(prepared, "train", ModelSection(base=base))
    for epoch, start in ((0, 0), (2, 0), (1, 3 if batch < 100 else 0)):
        streamed = RankStream(encoding, total_steps=(epoch + 1) * encoding.plan(0).steps)
        kept = ResidentStream(split, **order)
        assert (kept.rows, kept.steps_per_epoch) == (streamed.rows, streamed.steps_per_epoch) == (191, -(-191 // batch))
        expected = batches(streamed.steps(epoch, start))
        assert batches(kept.steps(epoch, start)) == expected
        assert len(expected) == kept.steps_per_epoch - start
        assert (kept.encoded, kept.truncated) == (streamed.encoded, streamed.truncated)
        assert kept.truncated
        streamed.close()


def test_what_is_done_to_examples_is_not_seen_by_the_next_trial(base: str, prepared: Any) -> None:
    split = warm.split(prepared, "train", ModelSection(base=base))
    order = {"seed": 3, "global_batch": 16, "group_by_length": True}
    before = batches(ResidentStream(split, **order).steps(0, 0))
    for share in ResidentStream(split, **order).steps(0, 0):
        for example in share.examples:
            example["input_ids"].clear()
            example.pop("labels")
    assert batches(ResidentStream(split, **order).steps(0, 0)) == before
    assert warm.split(prepared, "train", ModelSection(base=base)) is split


def test_validation_rows_are_those_of_the_stream(base: str, prepared: Any) -> None:
    streamed = SplitRows(Encoding.of(prepared, "validation", processors.load(base, "text"), rank=0, world=1))
    kept = ResidentRows(warm.split(prepared, "validation", ModelSection(base=base), with_rows=True))
    assert list(kept) == list(streamed)
    assert list(kept) == list(kept)
    assert [len(chunk) for chunk in kept] == [16, 15]
    assert kept.rows == VALIDATION


@pytest.mark.parametrize(("bound", "says"), [("RESIDENT_ROWS", "191 rows are more than the 10 "), ("RESIDENT_BYTES", "MB of encoded rows")])
def test_what_is_too_large_is_not_kept_and_the_log_says_so(
    base: str, prepared: Any, bound: str, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resident, bound, 10)
    assert warm.split(prepared, "train", ModelSection(base=base)) is None
    assert says in caplog.text
    assert "train" in caplog.text
    assert isinstance(Resident.read(Encoding.of(prepared, "train", processors.load(base, "text"), rank=0, world=1)), str)


@pytest.mark.parametrize("lora", [None, {"r": 4}, {"r": 8, "dropout": 0.1}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kept_model_is_the_loaded_one_to_the_bit(
    base: str, prepared: Any, lora: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    section = ModelSection.parse({"base": base, "lora": lora})
    expected = models.load(prepared.task, section, precision=precision, seed=7)
    first = warm.model(prepared.task, section, precision=precision, seed=7)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    monkeypatch.setattr(type(prepared.task), "model", lambda *_, **__: pytest.fail("it was loaded again"))
    torch.manual_seed(12345)
    again = warm.model(prepared.task, section, precision=precision, seed=7)
    assert [name for name, _ in again.named_modules()] == [name for name, _ in expected.named_modules()]
    assert again.training == expected.training
    assert str(getattr(again, "config", None)) == str(getattr(expected, "config", None))
    mine, theirs = dict(again.named_parameters()), dict(expected.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert torch.equal(mine[name], parameter), name
        assert (mine[name].dtype, mine[name].requires_grad) == (parameter.dtype, parameter.requires_grad)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_other_adapters_share_the_weights_and_another_seed_has_its_own_head(base: str, prepared: Any) -> None:
    import torch

    loads: list[int] = []
    kept = warm.Kept(2)
    for key in ("a", "b", "a", "c", "a", "b"):
        kept.get(key, lambda: loads.append(1))
    assert len(loads) == 4  # a stays, b is the one that was not asked for
    heads = [warm.model(prepared.task, ModelSection(base=base), precision="fp32", seed=seed).classifier.weight for seed in (1, 2, 1)]  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


def test_a_large_model_is_not_kept(base: str, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MODEL_BYTES", 1000)
    loads: list[int] = []
    real = models.without_adapters

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(models, "without_adapters", counted)
    for _ in range(2):
        warm.model(prepared.task, ModelSection(base=base), precision="fp32", seed=1)
    assert len(loads) == 2


def test_the_files_are_read_once_a_process(base: str, prepared: Any, tmp_path: Path) -> None:
    made = write_reviews(tmp_path, [20], 5)
    first = warm.split(made, "train", ModelSection(base=base))
    (tmp_path / "train" / "part-00000.parquet").unlink()
    assert warm.split(made, "train", ModelSection(base=base)) is first
