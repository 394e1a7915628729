"""Word and character error rates of transcripts."""

import datasets
import evaluate
import jiwer

DESCRIPTION = """\
wer and cer: words (characters) to substitute, delete or insert, as a share of those in all references. And the three kinds of
word errors by themselves: substitutions, deletions and insertions, as such shares. 0 is perfect; above 1 is possible.
"""

INPUTS = """\
    predictions: a transcript
    references: the right transcript, which has a word at least
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Transcription(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        found = jiwer.process_words(list(references), list(predictions))
        words = found.hits + found.substitutions + found.deletions
        return {
            "wer": found.wer,
            "cer": jiwer.cer(list(references), list(predictions)),
            "substitutions": found.substitutions / words,
            "deletions": found.deletions / words,
            "insertions": found.insertions / words,
        }
