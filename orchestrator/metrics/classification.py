"""Scores of a classifier, one label a row (config `single-label`) or any number of them (`multi-label`)."""

import datasets
import evaluate
import numpy as np
import sklearn.metrics

DESCRIPTION = """\
accuracy (of whole rows), precision, recall and F1 (macro, micro, weighted, and per label), ROC AUC (one label against the rest, macro)
and Matthews' correlation (for several labels over all row-label pairs). Macro averages are over the labels that occur in
predictions or references. A score that has no value is left out: ROC AUC where no label has rows with and without it,
Matthews' correlation where the references are all the same.
"""

INPUTS = """\
    predictions: label index, or a list of 0 and 1 for each label
    prediction_scores: a score for each label
    references: as predictions
    labels: names of the labels
    wanted: names of scores; those that take long are left out unless they are among them. None: all
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Classification(evaluate.Metric):
    def _info(self):
        answer = datasets.Sequence(datasets.Value("int8")) if self.config_name == "multi-label" else datasets.Value("int32")
        scores = datasets.Sequence(datasets.Value("float64"))
        features = datasets.Features({"predictions": answer, "prediction_scores": scores, "references": answer})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, prediction_scores, references, labels, wanted=None):
        several = self.config_name == "multi-label"
        given, right, scores = np.asarray(predictions), np.asarray(references), np.asarray(prediction_scores)
        columns = np.arange(len(labels))
        has = right.astype(bool) if several else right[:, None] == columns
        says = given.astype(bool) if several else given[:, None] == columns
        occurs = has.any(axis=0) | says.any(axis=0)

        hits, said, true = (has & says).sum(axis=0), says.sum(axis=0), has.sum(axis=0)
        each = _ratios(hits, said, true)
        micro = _ratios(hits.sum(), said.sum(), true.sum())
        result = {"accuracy": float((has == says).all(axis=1).mean())}
        for kind, per_label in each.items():
            result[kind + "_macro"] = float(per_label[occurs].mean()) if occurs.any() else 0.0
            result[kind + "_micro"] = float(micro[kind])
            result[kind + "_weighted"] = float(np.average(per_label, weights=true)) if true.any() else 0.0
            for name, value in zip(labels, per_label, strict=True):
                result[kind + "/" + name] = float(value)

        split = [column for column in columns if 0 < has[:, column].sum() < len(has)]
        if split and (wanted is None or "roc_auc" in wanted):
            result["roc_auc"] = float(np.mean([sklearn.metrics.roc_auc_score(has[:, column], scores[:, column]) for column in split]))
        pairs = (right.ravel(), given.ravel())
        if (wanted is None or "mcc" in wanted) and len(np.unique(pairs[0])) > 1:
            result["mcc"] = float(sklearn.metrics.matthews_corrcoef(*pairs))
        return result


def _ratios(hits, said, true):
    """Precision, recall and F1 from counts, 0 where there is nothing to divide by."""
    return {
        "precision": hits / np.maximum(said, 1),
        "recall": hits / np.maximum(true, 1),
        "f1": 2 * hits / np.maximum(said + true, 1),
    }
