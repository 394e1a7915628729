"""What a user may be told went wrong. The command line prints the sentence and nothing else.

`InputError`: what the user gave cannot be used as it stands (exit status 2). `StageError`: the input was fine and
something failed on the way (exit status 1). Every message is a whole sentence naming the file, line, field or node,
what stood there, and what would have been right.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The job, the data or an argument cannot be used as given."""


class StageError(RuntimeError):
    """A stage failed although its input was accepted."""


class Diverged(StageError):
    """Training left the finite numbers: with the same settings it would again."""


def nearest(wrong: str, right: Iterable[str]) -> list[str]:
    """The names in `right`, most similar to `wrong` first."""
    return sorted(right, key=lambda name: -difflib.SequenceMatcher(None, wrong.lower(), name.lower()).ratio())


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """` Did you mean 'x'?` where some name in `right` is close to `wrong`, else the list of what there is."""
    names = nearest(wrong, right)
    if names and difflib.SequenceMatcher(None, wrong.lower(), names[0].lower()).ratio() >= 0.6:
        return f" Did you mean {names[0]!r}?"
    return f" There is {', '.join(repr(name) for name in names)}." if names else ""
