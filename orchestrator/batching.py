"""Micro-batches: which examples go through a model together, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence

PASS = 128
"""What one more pass through a model costs on a CPU, in tokens; measured with MiniLM on one and two threads. On a GPU it is thousands."""


def micro_batches(lengths: Sequence[int], tokens: int, pass_cost: int = PASS) -> list[list[int]]:
    """Indices into `lengths`, each once, in groups whose padded size (longest x number) is at most `tokens`.

    The groups are runs of the order of length, longest first, so that memory runs out in the first one if at all. Of all
    such cuts it is the cheapest: padded tokens plus `pass_cost` for each group. An example longer than `tokens` is a group
    of its own. Equal lengths keep their order.
    """
    if tokens < 1:
        raise ValueError(f"a micro-batch of {tokens} tokens holds nothing")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # cost[i]: of the cheapest cut of the first i examples, whose last group starts at first[i] (dynamic programming).
    cost, first = [0.0] + [float("inf")] * len(order), [0] * (len(order) + 1)
    for start in range(len(order)):
        longest = max(lengths[order[start]], 1)
        most = max(tokens // longest, 1)
        for end in range(start + 1, min(start + most, len(order)) + 1):
            total = cost[start] + longest * (end - start) + pass_cost
            if total < cost[end]:
                cost[end], first[end] = total, start
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[first[end] : end])
        end = first[end]
    return groups[::-1]
