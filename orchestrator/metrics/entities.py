"""Scores of entities, which are right where start, end and label are: those of seqeval (and so of conlleval)."""

from typing import Any

import datasets
import evaluate
import seqeval.metrics

DESCRIPTION = """\
precision, recall and F1 over all entities (micro), F1 as the mean over labels (macro, and weighted by their number), and each
per label. Without any entity in predictions and references they are 0.
"""

INPUTS = """\
    predictions: for each text a list of tags in the scheme BIO
    references: as predictions
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Entities(evaluate.Metric):
    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        if not any(tag != "O" for tags in (*predictions, *references) for tag in tags):
            return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
        options: Any = {"output_dict": True, "zero_division": 0}
        report: Any = seqeval.metrics.classification_report(references, predictions, **options)
        averages = {name: report.pop(name + " avg") for name in ("micro", "macro", "weighted")}
        result = {kind: float(averages["micro"][name]) for kind, name in _KINDS.items()}
        result |= {"f1_" + name: float(averages[name]["f1-score"]) for name in ("macro", "weighted")}
        for label, scores in report.items():
            result |= {kind + "/" + label: float(scores[name]) for kind, name in _KINDS.items()}
        return result


_KINDS = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
