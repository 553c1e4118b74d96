from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vinoopt.compression.refusal import find_refused

BLOCKS = [f"block {number}" for number in range(20)]


@given(st.sets(st.sampled_from(BLOCKS), max_size=6), st.integers(0, 6))
def test_the_blocks_that_are_refused_are_found_in_few_questions(culprits: set[str], most: int):
    asked = 0

    def accepts(floats: set[str]) -> bool:
        nonlocal asked
        asked += 1
        return culprits <= floats

    found = find_refused(BLOCKS, accepts, most=most)
    assert found == (frozenset(culprits) if len(culprits) <= most else None)
    assert asked <= (len(culprits) + 1) * (math.ceil(math.log2(len(BLOCKS))) + 1)


def test_a_refusal_that_is_no_blocks_fault_ends():
    assert find_refused(BLOCKS, lambda floats: False, most=4) is None
