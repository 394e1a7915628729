"""The shipped metric modules: the numbers of scikit-learn and scipy, what has no value left out, and no network."""

import json
import math
import random
import re

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from orchestrator import metrics
from orchestrator.errors import InputError
from orchestrator.tasks import create


def task(**fields):
    return create({"name": "text-classification", **fields})


def single(rng, count, labels):
    rows = [{"label": rng.choice(labels)} for _ in range(count)]
    predictions = []
    for _ in rows:
        weights = np.array([rng.random() for _ in labels])
        scores = dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))
        predictions.append({"label": max(scores, key=scores.get), "scores": scores})
    return predictions, rows


def test_single_label_scores_are_scikit_learns():
    labels = ("a", "b", "c")
    predictions, rows = single(random.Random(0), 200, labels)
    one = task(labels=labels)
    found = one.score(predictions, rows, one.metrics())
    right, given = [row["label"] for row in rows], [prediction["label"] for prediction in predictions]
    scores = np.array([[prediction["scores"][name] for name in labels] for prediction in predictions])
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(right, given))
    for average in ("macro", "micro", "weighted"):
        for name in ("precision", "recall", "f1"):
            assert found[f"{name}_{average}"] == pytest.approx(getattr(sklearn.metrics, f"{name}_score")(right, given, average=average))
    assert found["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(right, scores, multi_class="ovr", labels=labels))
    assert found["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(right, given))
    assert [found[f"f1/{name}"] for name in labels] == pytest.approx(
        list(sklearn.metrics.f1_score(right, given, average=None, labels=labels))
    )
    assert found.keys() == set(one.metrics())


def test_multi_label_scores_are_scikit_learns():
    rng, labels = random.Random(0), ("a", "b", "c")
    truth = np.array([[rng.random() < 0.4 for _ in labels] for _ in range(100)])
    scores = np.array([[rng.random() for _ in labels] for _ in range(100)])
    rows = [{"label": [name for name, has in zip(labels, line, strict=True) if has]} for line in truth]
    predictions = [
        {
            "labels": [name for name, score in zip(labels, line, strict=True) if score >= 0.5],
            "scores": dict(zip(labels, line.tolist(), strict=True)),
        }
        for line in scores
    ]
    several = task(problem="multi-label", labels=labels)
    found = several.score(predictions, rows, several.metrics())
    given = scores >= 0.5
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, given))
    for average in ("macro", "micro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(sklearn.metrics.f1_score(truth, given, average=average))
    assert found["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores, average="macro"))
    assert found["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth.ravel(), given.ravel()))
    table = several.tables(predictions, rows)
    assert [line["rows"] for line in table["per_class"]] == truth.sum(axis=0).tolist()
    assert [line["predicted"] for line in table["per_class"]] == given.sum(axis=0).tolist()
    assert "confusion_matrix" not in table


def test_regression_scores_are_scipys():
    rng = random.Random(0)
    right = [rng.gauss(3, 2) for _ in range(50)]
    said = [value + rng.gauss(0, 1) for value in right]
    one = task(problem="regression")
    found = one.score([{"value": value} for value in said], [{"label": value} for value in right])
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(said, right).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(said, right).statistic)
    assert found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(right, said))
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(right, said))
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(right, said))
    assert one.objective == "pearson"
    assert not one.higher_is_better("mse")


def test_what_has_no_value_is_left_out_and_nothing_is_nan():
    one = task(labels=["a", "b"])
    right = {"label": "a", "scores": {"a": 0.9, "b": 0.1}}
    found = one.score([right] * 3, [{"label": "a"}] * 3, one.metrics())
    assert "roc_auc" not in found
    assert "mcc" not in found
    assert found["f1_macro"] == 1.0  # over the labels that occur
    json.dumps(found, allow_nan=False)

    number = task(problem="regression")
    constant = number.score([{"value": 2.0}] * 3, [{"label": 1.0}, {"label": 2.0}, {"label": 3.0}])
    assert constant["pearson"] == constant["spearman"] == 0.0
    assert all(math.isfinite(value) for value in constant.values())
    assert number.score([{"value": 2.0}, {"value": 1.0}], [{"label": 1.0}] * 2).keys() == {"mse", "mae"}
    assert number.score([], []) == {}
    assert one.tables([], []) == {}
    several = task(problem="multi-label", labels=["a", "b"])
    none = {"labels": [], "scores": {"a": 0.1, "b": 0.1}}
    assert several.score([none], [{"label": []}])["accuracy"] == 1.0


def test_the_tables_count_every_row():
    labels = ("a", "b", "c")
    predictions, rows = single(random.Random(2), 60, labels)
    tables = task(labels=labels).tables(predictions, rows)
    matrix = np.array([[line[f"predicted {name}"] for name in labels] for line in tables["confusion_matrix"]])
    reference = sklearn.metrics.confusion_matrix([row["label"] for row in rows], [one["label"] for one in predictions], labels=labels)
    assert (matrix == reference).all()
    assert [line["label"] for line in tables["per_class"]] == list(labels)
    assert [line["rows"] for line in tables["per_class"]] == matrix.sum(axis=1).tolist()


def test_a_single_label_that_may_be_given_or_not():
    one = task(problem="multi-label", labels=["spam"])
    said = [{"labels": ["spam"] if score >= 0.5 else [], "scores": {"spam": score}} for score in (0.9, 0.6, 0.2, 0.1)]
    found = one.score(said, [{"label": ["spam"]}, {"label": []}, {"label": []}, {"label": ["spam"]}], one.metrics())
    assert found["precision/spam"] == found["recall/spam"] == found["f1_macro"] == found["f1_micro"] == found["accuracy"] == 0.5
    assert found["roc_auc"] == 0.5


def test_predictions_and_rows_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        task(problem="regression").score([{"value": 1.0}], [{"label": 1.0}, {"label": 2.0}])


def test_a_metric_that_there_is_not_is_a_sentence(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    predictions, rows = single(random.Random(0), 4, ("a", "b"))
    with pytest.raises(InputError, match=r"evaluation\.metrics: 'acuracy' .*Did you mean 'accuracy'\?"):
        task(labels=["a", "b"]).score(predictions, rows, ["acuracy"])


def test_a_metric_module_of_ones_own_is_used_by_its_path(tmp_path):
    (tmp_path / "hits.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass Hits(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('int32'), 'references': datasets.Value('int32')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'hits': sum(p == r for p, r in zip(predictions, references))}\n",
        encoding="utf-8",
    )
    predictions, rows = single(random.Random(0), 30, ("a", "b"))
    name = str(tmp_path / "hits.py")
    found = task(labels=["a", "b"]).score(predictions, rows, ["accuracy", name])
    assert found == {"accuracy": pytest.approx(found[name] / 30), name: found[name]}
    with pytest.raises(InputError, match="can't score this task"):
        task(problem="multi-label", labels=["a", "b"]).score(
            [{"labels": ["a"], "scores": {"a": 1.0, "b": 0.0}}], [{"label": ["a"]}], [name]
        )


def test_modules_are_loaded_once_and_import_one_name_a_line():
    assert metrics.load("regression") is metrics.load("regression")
    for file in metrics.HERE.glob("*.py"):
        if file.name != "__init__.py":
            imports = [line for line in file.read_text(encoding="utf-8").splitlines() if re.match(r"(import|from) ", line)]
            assert all("," not in line for line in imports), file.name
