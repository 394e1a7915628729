"""How a sweep ends where nothing came of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import tuning
from orchestrator.errors import StageError
from orchestrator.progress import Silent
from orchestrator.records import TrialRecord


def test_what_no_trial_can_score_is_said_with_the_most_common_cause() -> None:
    trials = [
        TrialRecord.parse({"id": f"{number}", "number": number, "sample": {}, "status": "failed", "error": error}, "trial")
        for number, error in enumerate(["the disk is full", "the loss became nan at step 3", "the loss became nan at step 14"])
    ]
    sweep: Any = SimpleNamespace(space=SimpleNamespace(objectives=(("accuracy", True),)))
    driver: Any = SimpleNamespace(ledger=SimpleNamespace(records=trials))
    with pytest.raises(StageError, match=r"None of the 3 trials has a score to compare by\. Most failed so: the loss became nan at step 3"):
        tuning._finish(sweep, driver, Silent())
