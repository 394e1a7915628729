"""Micro-batches: which examples go through a model together, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices into `lengths`, each once, in groups whose padded size (longest x number) is at most `tokens`.

    The groups are cut from the order of length, longest first: if one does not fit in memory, the first step says so.
    An example longer than `tokens` is a group of its own. Equal lengths keep their order.
    """
    if tokens < 1:
        raise ValueError(f"a micro-batch of {tokens} tokens holds nothing")
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = max(lengths[index], 1)
        groups[-1].append(index)
    return groups
