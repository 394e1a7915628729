"""Lists of the likeliest of many, cut at some length: how far two of them are apart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping


def difference(one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> float:
    """The largest difference of a probability; what one list lacks is at most as likely there as the last that it has.

    So two lists whose ends changed places are not far apart.
    """
    most = 0.0
    for here, there in ((one, other), (other, one)):
        least = min(there.values(), default=0.0)
        for name, score in here.items():
            most = max(most, abs(score - there[name]) if name in there else max(0.0, score - least))
    return most
