"""Scores of predicted numbers."""

import datasets
import evaluate
import numpy as np
import scipy.stats

DESCRIPTION = """\
Pearson's and Spearman's correlation, mean squared and mean absolute error, and R2. A correlation with predictions that are
all the same is 0. Correlations and R2 are left out where the references are all the same, since they have no value then.
"""

INPUTS = """\
    predictions: a number
    references: a number
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Regression(evaluate.Metric):
    def _info(self):
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        said, right = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        error = said - right
        result = {"mse": float(np.mean(error**2)), "mae": float(np.mean(np.abs(error)))}
        if np.ptp(right) > 0:
            constant = np.ptp(said) == 0
            for name, correlate in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
                result[name] = 0.0 if constant else float(np.asarray(correlate(said, right))[0])
            result["r2"] = float(1 - np.sum(error**2) / np.sum((right - right.mean()) ** 2))
        return result
