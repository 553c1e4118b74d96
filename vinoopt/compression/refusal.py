"""Which blocks a target's compiler cannot take in INT8, found by asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_refused(
    blocks: Sequence[str], accepts: Callable[[set[str]], bool], *, most: int
) -> frozenset[str] | None:
    """Blocks that have to stay in float for the model to be accepted; None where more than `most` would have to.

    `accepts(floats)` asks the compiler with all other blocks in INT8; it is taken to accept the model with every
    block in float. Each block is found by bisection over the order of `blocks`, in about log2 of their number
    questions.
    """
    floats: set[str] = set()
    while not accepts(floats):
        if len(floats) == most:
            return None
        low, high = 0, len(blocks)  # INT8 in the first `low` is accepted, in the first `high` refused
        while high - low > 1:
            middle = (low + high) // 2
            if accepts(floats | set(blocks[middle:])):
                low = middle
            else:
                high = middle
        if blocks[high - 1] in floats:
            return None  # it does not depend on the blocks
        floats.add(blocks[high - 1])
    return frozenset(floats)
