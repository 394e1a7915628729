"""The predictor: order, padding, precision, threads, and the golden check."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orchestrator import bundle, models, processors
from orchestrator.errors import InputError, StageError
from orchestrator.predictor import Predictor, check_golden, forward
from orchestrator.storage import Folder
from orchestrator.tasks import create
from tests.fixtures.tiny import text_base

TEXTS = [" ".join(["good", "bad", "camera", "the"][(place + step) % 4] for step in range(1 + place * 7 % 40)) for place in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = text_base(tmp_path_factory.mktemp("base"), TEXTS)
    task = create({"name": "text-classification", "labels": ["a", "b"]})
    torch.manual_seed(0)
    folder = Folder(str(tmp_path_factory.mktemp("bundle") / "b"))
    model = task.model(base, dtype=torch.float32)
    bundle.write(folder, model=model, processor=processors.load(base, "text"), task=task, job={"name": "j"}, lineage={}, metrics={})
    return folder


@pytest.fixture
def predictor(folder):
    return Predictor(bundle.load(folder.uri), precision="fp32")


def test_answers_come_in_order_whatever_the_batches(predictor):
    rows = [{"text": text} for text in TEXTS]
    alone = [predictor([row])[0] for row in rows]
    for tokens in (1, 50, 10_000):
        predictor.tokens_per_batch = tokens
        together = predictor(rows)
        for one, other in zip(alone, together, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert predictor([]) == []
    assert predictor.infer([]) == []


def test_targets_in_rows_change_nothing(predictor):
    assert predictor([{"text": "good camera", "label": "not a label", "row_id": "7"}]) == predictor([{"text": "good camera"}])


def test_forward_leaves_the_model_as_it_was(predictor):
    examples = [example for [example] in predictor.encode([{"text": "good"}])]
    for training in (True, False):
        predictor.model.train(training)
        forward(predictor.task, predictor.model, predictor.processor, examples, tokens=100, precision="fp32")
        assert predictor.model.training is training
        assert not any(parameter.is_inference() for parameter in predictor.model.parameters())


def test_precisions_agree_and_answer_in_fp32(folder, predictor):
    lower = Predictor(bundle.load(folder.uri), precision="bf16")
    rows = [{"text": text} for text in TEXTS[:6]]
    for one, other in zip(predictor(rows), lower(rows), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=0.02)
    examples = [example for group in lower.encode(rows) for example in group]
    assert all(output.dtype == "float32" for output in lower.infer(examples))
    # Casting the weights once is what autocast does in every forward pass.
    by_autocast = forward(predictor.task, predictor.model, predictor.processor, examples, tokens=4096, precision="bf16")
    assert all((one == other).all() for one, other in zip(by_autocast, lower.infer(examples), strict=True))
    assert Predictor(bundle.load(folder.uri)).precision == models.hardware_precision("auto")


def test_threads_are_set_on_purpose(folder):
    before = torch.get_num_threads()
    try:
        Predictor(bundle.load(folder.uri), threads=1)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        Predictor(bundle.load(folder.uri))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_many_threads_may_use_one_predictor(predictor):
    """A fast tokenizer whose settings change while another thread encodes raises "Already borrowed"."""
    rows = [{"text": text} for text in TEXTS]
    wanted = predictor(rows)
    fresh = Predictor(predictor.bundle, precision="fp32")
    fresh.processor.backend_tokenizer.enable_truncation(8)  # as some published tokenizers come
    fresh.processor.backend_tokenizer.enable_padding()
    start = threading.Barrier(8)

    def ask(worker):
        start.wait(timeout=30)
        return [fresh(rows[worker:]) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for worker, answers in enumerate(pool.map(ask, range(8))):
            for answer in answers:
                assert all(predictor.task.agree(one, other, 1e-5) for one, other in zip(answer, wanted[worker:], strict=True))


def test_the_golden_check_finds_a_changed_model(folder, predictor, tmp_path):
    with pytest.raises(InputError, match="no golden rows"):
        check_golden(predictor)
    rows = [{"text": text} for text in TEXTS[:5]]
    predictions = predictor(rows)
    bundle.complete(folder, metrics={}, golden=[{"row": row, "prediction": one} for row, one in zip(rows, predictions, strict=True)])
    completed = Predictor(bundle.load(folder.uri), precision="fp32")
    assert check_golden(completed, 1e-5) <= 1e-5
    with torch.no_grad():
        completed.model.classifier.bias += torch.tensor([0.0, 3.0])
    with pytest.raises(
        StageError, match=r"does not predict what it did when it was evaluated: for the row .* \(difference 0\.\d+, allowed 0\.02\)"
    ):
        check_golden(completed)
