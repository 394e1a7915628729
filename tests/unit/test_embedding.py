"""Embedding: what is a negative, the losses by their formulas, scores of a search, requests and answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import bundle, processors
from orchestrator.config import DataSection
from orchestrator.data import sources
from orchestrator.errors import InputError
from orchestrator.predictor import Predictor, forward
from orchestrator.storage import Folder
from orchestrator.tasks import contrastive, create, embedding_scores, vectors
from orchestrator.tasks.base import RowError
from orchestrator.tasks.guessing import guess
from tests.fixtures.tiny import text_base
from tests.unit import live

TEXTS = ["query passage", "a dog runs in the park all day", "the sky is blue", "we close at noon", "bread rises", "Zoë's naïve café 東京"]


def relation(role: int, key: int, target: float = 0.0) -> tuple[int, int, float]:
    return role, key, target


def random_vectors(count: int, size: int = 8) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


# ---- losses --------------------------------------------------------------------------------------------------
def unit(found: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(found, dim=1)


def test_texts_that_are_right_are_no_negatives() -> None:
    """Rows: (q1, p1), (q1, p2), (q2, p2), (q3, q1 as text) with a negative that is p1."""
    relations = [relation(0, 1), relation(1, 11), relation(0, 1), relation(1, 12), relation(0, 2), relation(1, 12), relation(0, 3)]
    relations += [relation(1, 1), relation(2, 11)]
    out = contrastive._not_negatives(relations, [0, 1, 2, 3])
    #            p1     p2     p2     q1     p1
    assert out.tolist() == [
        [False, True, True, True, True],
        [True, False, True, True, True],
        [False, True, False, False, False],
        [False, False, False, False, False],
    ]
    found = unit(random_vectors(9))
    logits = 20 * found[[0, 2, 4, 6]] @ found[[1, 3, 5, 7, 8]].T
    expected = torch.nn.functional.cross_entropy(logits.masked_fill(torch.tensor(out), -1e30), torch.arange(4), reduction="sum")
    assert float(contrastive.in_batch_negatives(found, relations, scale=20.0)) == pytest.approx(float(expected), rel=1e-5)


def test_one_row_alone_has_nothing_to_be_told_from() -> None:
    found = random_vectors(2).requires_grad_()
    loss = contrastive.in_batch_negatives(unit(found), [relation(0, 1), relation(1, 2)], scale=20.0, label_smoothing=0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert found.grad is not None and torch.isfinite(found.grad).all()


def test_label_smoothing_is_torchs_where_all_candidates_count() -> None:
    found = unit(random_vectors(6))
    relations = [relation(place % 2, place) for place in range(6)]
    expected = torch.nn.functional.cross_entropy(5 * found[0::2] @ found[1::2].T, torch.arange(3), reduction="sum", label_smoothing=0.2)
    loss = contrastive.in_batch_negatives(found, relations, scale=5.0, label_smoothing=0.2)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_cosent_by_its_formula_and_without_pairs_to_compare() -> None:
    found = unit(random_vectors(6))
    scores = [3.0, 1.0, 1.0]
    cosines = [float(found[place] @ found[place + 1]) for place in (0, 2, 4)]
    terms = [np.exp(2 * (cosines[j] - cosines[i])) for i in range(3) for j in range(3) if scores[i] > scores[j]]
    relations = [relation(place % 2, place, scores[place // 2]) for place in range(6)]
    assert float(contrastive.cosent(found, relations, scale=2.0)) == pytest.approx(3 * np.log(1 + sum(terms)), rel=1e-5)
    even = [(role, key, 1.0) for role, key, _ in relations]
    assert float(contrastive.cosent(found, even, scale=20.0)) == 0


def test_contrastive_and_cosine_losses_by_their_formulas() -> None:
    found = unit(random_vectors(4))
    first, second = float(found[0] @ found[1]), float(found[2] @ found[3])
    relations = [relation(0, 1, 1), relation(1, 2, 1), relation(0, 3, 0), relation(1, 4, 0)]
    expected = 0.5 * ((1 - first) ** 2 + max(0.0, 1.5 - (1 - second)) ** 2)
    assert float(contrastive.contrastive(found, relations, margin=1.5)) == pytest.approx(expected, rel=1e-5)
    assert float(contrastive.cosine_error(found, relations)) == pytest.approx((first - 1) ** 2 + second**2, rel=1e-5)


def test_sizes_add_their_losses() -> None:
    found, relations = random_vectors(6), [relation(place % 2, place) for place in range(6)]
    losses = [create({"name": "embedding", "matryoshka_dims": sizes}).joint_loss(found, relations)[0] for sizes in ([8], [4], [4, 8])]
    assert float(losses[2]) == pytest.approx(float(losses[0] + losses[1]), rel=1e-5)


# ---- data ----------------------------------------------------------------------------------------------------
def fit(given: dict[str, Any], rows: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None) -> Any:
    task = create({"name": "embedding", **given})
    splits = {"train": rows, "validation": validation or []}
    return task.fit({split: task.observe([task.clean(row) for row in some]) for split, some in splits.items()})


@pytest.mark.parametrize(
    ("given", "rows", "validation", "says"),
    [
        ({}, [], None, "no rows"),
        ({}, [{"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": " x "}], None, "same `positive`"),
        ({"problem": "scored-pairs"}, [{"text_a": "a", "text_b": "b", "score": 2}] * 2, None, "same `score`"),
        (
            {"problem": "scored-pairs", "score_loss": "cosine"},
            [{"text_a": "a", "text_b": "b", "score": 5}, {"text_a": "a", "text_b": "c", "score": 0}],
            None,
            "1 of 2 rows of the train split have a `score` beyond -1 to 1",
        ),
        ({"problem": "labelled-pairs"}, [{"text_a": "a", "text_b": "b", "label": 1}], None, "have the label 1"),
        (
            {"problem": "labelled-pairs"},
            [{"text_a": "a", "text_b": "b", "label": 1}, {"text_a": "a", "text_b": "c", "label": 0}],
            [{"text_a": "a", "text_b": "b", "label": 0}],
            "validation split have the label 0",
        ),
    ],
)
def test_what_can_not_be_learnt_or_scored_is_said(given: Any, rows: Any, validation: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit(given, rows, validation)


def test_scores_may_be_on_any_scale_for_their_order() -> None:
    rows = [{"text_a": "a", "text_b": "b", "score": 5}, {"text_a": "a", "text_b": "c", "score": 0}]
    assert fit({"problem": "scored-pairs"}, rows).problem == "scored-pairs"


def test_a_row_to_predict_needs_one_of_its_texts() -> None:
    task = create({"name": "embedding"})
    assert task.clean({"positive": "a passage"}) == {"positive": "a passage"}
    assert task.clean({"text": "a text", "other": 1}) == {"text": "a text"}
    assert task.clean({"anchor": "a", "positive": "b", "text": "a column that happens to be there"}) == {"anchor": "a", "positive": "b"}
    with pytest.raises(RowError, match="'anchor'"):
        task.clean({})


def test_negatives_may_be_a_list_as_json_text() -> None:
    task = create({"name": "embedding", "problem": "triplets"})
    for given, texts in (('["b", "c"]', ["b", "c"]), ("[b] or c", ["[b] or c"]), ("[1]", ["[1]"]), ("b", ["b"]), (["b"], ["b"])):
        assert task.clean({"anchor": "a", "positive": "p", "negative": given})["negative"] == texts


def test_questions_and_passages_are_anchors_and_positives() -> None:
    columns = create({"name": "embedding"}).columns()
    assert {role: found.column for role, found in guess(columns, [{"passage": "a long text", "question": "short?"}] * 9).items()} == {
        "anchor": "question",
        "positive": "passage",
    }
    section = DataSection(train="x.csv", columns={"anchor": "passage"})
    with pytest.raises(InputError, match="'positive'"):  # its other name is of a column that is the anchor
        sources.map_columns(section, columns, ["passage", "id"])


def test_prediction_asks_for_one_text_column_and_training_for_all() -> None:
    columns = create({"name": "embedding"}).columns()
    section = DataSection(train="x.csv", columns={"anchor": "question", "positive": "passage"})
    assert sources.map_columns(section, columns, ["passage", "id"], targets=False) == {"positive": "passage"}
    with pytest.raises(InputError, match="'question'"):
        sources.map_columns(section, columns, ["id", "body"], targets=False)
    with pytest.raises(InputError, match="'question'"):
        sources.map_columns(section, columns, ["passage", "id"])


def test_settings_that_can_not_be() -> None:
    for wrong, says in (
        ({"matryoshka_dims": []}, "matryoshka_dims"),
        ({"matryoshka_dims": [0]}, "matryoshka_dims"),
        ({"pooling": "max"}, "pooling"),
    ):
        with pytest.raises(InputError, match=says):
            create({"name": "embedding", **wrong})
    assert create({"name": "embedding", "matryoshka_dims": [64, 384, 64]}).matryoshka_dims == (384, 64)


# ---- model ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_base(tmp_path_factory.mktemp("base"), TEXTS)


def test_pooling_reads_the_tokens_that_are_there() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    right, left = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert vectors.pool(hidden, right, "mean")[0].tolist() == [1.5, 2.5, 3.5]
    assert vectors.pool(hidden, right, "last")[0].tolist() == [3, 4, 5]
    assert vectors.pool(hidden, left, "cls")[0].tolist() == [6, 7, 8]
    assert vectors.pool(hidden, left, "last").tolist() == [[9, 10, 11], [21, 22, 23]]
    assert vectors.pool(hidden.to(torch.bfloat16), right, "mean").dtype == torch.float32


def test_the_base_must_have_vectors_of_tokens(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have only 32 numbers"):
        create({"name": "embedding", "matryoshka_dims": [64]}).check_base(base)
    with pytest.raises(InputError, match="only 64 positions"):
        create({"name": "embedding", "max_length": 65}).check_base(base)
    for name, config in (("t5", {"model_type": "t5"}), ("vit", {"model_type": "vit"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="no vector for each token"):
            create({"name": "embedding"}).check_base(str(tmp_path / name))


def test_another_pooling_than_the_bases_is_said(base: str, caplog: pytest.LogCaptureFixture) -> None:
    place = Path(base) / "1_Pooling"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    create({"name": "embedding", "pooling": "cls"}).model(base)
    assert not caplog.text
    create({"name": "embedding"}).model(base)
    assert "task.pooling: cls" in caplog.text


def test_a_text_has_its_vector_whatever_side_the_tokenizer_pads(base: str) -> None:
    task = create({"name": "embedding", "pooling": "last"})
    processor, model = processors.load(base, "text"), task.model(base)
    examples = [example for its in task.encode([{"text": text} for text in TEXTS], processor) for example in its]
    found = forward(task, model, processor, examples, tokens=1000, precision="fp32")
    processor.padding_side = "left"
    assert np.allclose(found, forward(task, model, processor, examples, tokens=1000, precision="fp32"), atol=1e-6)
    half = forward(task, model, processor, examples, tokens=1000, precision="bf16")
    assert all(vector.dtype == np.float32 for vector in half)
    assert max(vectors.difference(one.tolist(), other.tolist()) for one, other in zip(found, half, strict=True)) < 0.02


# ---- scores --------------------------------------------------------------------------------------------------
def row(anchor: str, positive: str) -> dict[str, Any]:
    return {"anchor": anchor, "positive": positive}


def test_a_search_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """q1 finds p1 first; q2 finds p1, then p2 and p3, which are both right; the search goes in blocks of one query."""
    monkeypatch.setattr(embedding_scores, "BLOCK", 1)
    where = {"q1": [1, 0], "q2": [0.8, 0.6], "p1": [1, 0.1], "p2": [0, 1], "p3": [0.1, 1]}
    rows = [row("q1", "p1"), row("q2", "p2"), row("q2", "p3")]
    predictions = [{role: where[text] for role, text in one.items()} for one in rows]
    found = embedding_scores.score("pairs", predictions, rows, embedding_scores.METRICS["pairs"])
    gain = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert found == pytest.approx(
        {"ndcg_at_10": (1 + gain) / 2, "mrr_at_10": 0.75, "recall_at_1": 0.5, "recall_at_5": 1, "recall_at_10": 1}
    )


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    rows = [row(f"q{place}", f"p{place}") for place in range(50)]
    found = embedding_scores.score("pairs", [{"anchor": [1.0, 0.0], "positive": [1.0, 0.0]}] * 50, rows, ["recall_at_1", "mrr_at_10"])
    assert found["recall_at_1"] == pytest.approx(1 / 50)


def test_a_text_is_not_found_by_itself() -> None:
    """Of duplicate questions: each asks for the other and stands in the corpus itself."""
    rows = [row("a", "b"), row("b", "a")]
    predictions = [{"anchor": [1.0, 0.0], "positive": [0.9, 0.1]}, {"anchor": [0.9, 0.1], "positive": [1.0, 0.0]}]
    assert embedding_scores.score("pairs", predictions, rows, ["recall_at_1"]) == {"recall_at_1": 1.0}


def test_smaller_vectors_are_counted_and_scored() -> None:
    rng = np.random.default_rng(0)
    right = rng.normal(size=(60, 64))
    rows = [row(f"q{place}", f"p{place}") for place in range(60)]
    predictions = [{"anchor": (one + 0.5 * rng.normal(size=64)).tolist(), "positive": one.tolist()} for one in right]
    lines = embedding_scores.sizes("pairs", predictions, rows, [64, 8])
    assert [(line["dimensions"], line["precision"], line["bytes_per_vector"]) for line in lines] == [
        (64, "float32", 256), (64, "int8", 64), (64, "ubinary", 8), (8, "float32", 32), (8, "int8", 8), (8, "ubinary", 1)
    ]  # fmt: skip
    scores = {(line["dimensions"], line["precision"]): line["ndcg_at_10"] for line in lines}
    assert scores[64, "float32"] == pytest.approx(scores[64, "int8"], abs=0.02)
    assert scores[64, "float32"] > scores[8, "float32"] > scores[8, "ubinary"] > 0
    assert np.array_equal(vectors.quantised(np.array([0.5, -0.25]), "int8"), [127, -64])
    assert vectors.quantised(np.array([1.0, -1, 1, -1, -1, -1, -1, -1]), "ubinary").tolist() == [0b10100000]
    assert np.isfinite(vectors.comparable(np.zeros((1, 4)), 2, "int8")).all()


def test_the_loss_of_a_split_is_that_of_its_groups_of_rows() -> None:
    task = create({"name": "embedding"})
    found = random_vectors(90).tolist()
    rows = [row(f"q{place}", f"p{place}") for place in range(45)]
    predictions = [{"anchor": found[2 * place], "positive": found[2 * place + 1]} for place in range(45)]
    relations = [relation(place % 2, place) for place in range(90)]
    parts = [task.joint_loss(torch.tensor(found[low:high]), relations[low:high])[0] for low, high in ((0, 64), (64, 90))]
    assert task.split_loss(predictions, rows) == pytest.approx(float(sum(parts)) / 45, rel=1e-4)
    assert task.split_loss([], []) == 0


def test_a_metric_that_there_is_not_is_named() -> None:
    with pytest.raises(InputError, match="recall_at_10"):
        create({"name": "embedding"}).score([], [], ["recall@10"])


# ---- over HTTP -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def predictor(base: str, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    task = create({"name": "embedding", "prompts": {"query": "query ", "passage": "passage "}, "matryoshka_dims": [32, 8], "max_length": 6})
    folder = Folder(str(tmp_path_factory.mktemp("bundle") / "b"))
    torch.manual_seed(0)
    bundle.write(
        folder, model=task.model(base), processor=processors.load(base, "text"), task=task, job={"name": "j"}, lineage={}, metrics={}
    )
    assert not any("pooler" in name for name, _ in Predictor(bundle.load(folder.uri)).model.named_parameters())
    return Predictor(bundle.load(folder.uri), precision="fp32")


@pytest.fixture(scope="module")
def url(predictor: Predictor) -> Iterator[str]:
    with live.endpoint(predictor) as url:
        yield url


def test_hugging_faces_client_gets_vectors_and_similarities(url: str, predictor: Predictor) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=url)
    alone, several = client.feature_extraction(TEXTS[1]), client.feature_extraction(TEXTS[2:])
    assert alone.shape == (1, 32)
    assert several.shape == (4, 32)
    assert np.linalg.norm(several, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert alone[0] == pytest.approx(predictor([{"text": TEXTS[1]}])[0]["text"], abs=1e-5)

    short = client.feature_extraction(TEXTS[2], dimensions=8, normalize=False, truncation_direction="left", encoding_format="float")
    raw = client.feature_extraction(TEXTS[2], normalize=False)
    assert short.shape == (1, 8)
    assert short[0] == pytest.approx(raw[0, :8], abs=1e-5)
    assert np.linalg.norm(raw) != pytest.approx(1, abs=0.1)
    asked = client.feature_extraction(TEXTS[2], prompt_name="query")
    assert asked[0] == pytest.approx(predictor([{"anchor": TEXTS[2]}])[0]["anchor"], abs=1e-5)
    assert not np.allclose(asked, client.feature_extraction(TEXTS[2]), atol=1e-3)

    found = client.sentence_similarity(TEXTS[1], TEXTS[2:])
    query, *others = [next(iter(one.values())) for one in predictor([{"anchor": TEXTS[1]}, *({"positive": text} for text in TEXTS[2:])])]
    assert found == pytest.approx([float(np.dot(query, other)) for other in others], abs=1e-5)


def test_requests_that_the_model_can_not_answer(url: str) -> None:
    import httpx

    def ask(**body: Any) -> tuple[int, Any]:
        answer = httpx.post(url, json=body, trust_env=False)
        return answer.status_code, answer.json()

    long = "the sky is blue " * 4
    for body, status, says in (
        ({"dimensions": 16}, 400, "vectors of 32, 8 numbers"),
        ({"prompt_name": "querry"}, 400, "Did you mean 'query'"),
        ({"encoding_format": "base64"}, 400, "encoding_format"),
        ({"inputs": long, "truncate": False}, 422, "more than 6 tokens"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b", " "]}}, 422, "sentences[1]"),
        ({"inputs": {"source_sentence": 1, "sentences": ["b"]}}, 400, "must be a text"),
        ({"inputs": {"source": "a", "sentences": ["b"]}}, 400, "'source'"),
    ):
        found = ask(**{"inputs": "the sky", **body})
        assert found[0] == status, found
        assert says in found[1]["error"]
    left, right = (ask(inputs=long + "bread rises", truncation_direction=side)[1] for side in ("Left", "right"))
    assert left != right
    assert ask(inputs="the sky", parameters={"precision": "int8", "dimensions": 8})[1][0] != []
    [bits] = ask(inputs="the sky", precision="ubinary")[1]
    assert len(bits) == 4
    assert all(0 <= number <= 255 for number in bits)


def test_many_sentences_are_rows_that_the_limit_counts() -> None:
    task = create({"name": "embedding", "problem": "triplets"})
    assert len(task.rows_from({"source_sentence": "a", "sentences": [f"b{place}" for place in range(65)]})) == 65
    assert len(task.rows_from({"source_sentence": "a", "sentences": ["b", "c"]})) == 1
    assert len(task.rows_from({"source_sentence": "a", "sentences": ["b", "b"]})) == 2
