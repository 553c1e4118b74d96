"""Which branches go: the least damage that saves enough, exactly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vinoopt.compression.depth import lightest_subsets

DAMAGES = {("a", 0): 0.6, ("b", 0): 0.9, ("c", 0): 1.3, ("d", 0): 1.4}
SAVINGS = {("a", 0): 8.0, ("b", 0): 9.0, ("c", 0): 12.0, ("d", 0): 12.5}


def test_the_least_damage_that_saves_enough_comes_first() -> None:
    found = ["".join(name for name, _ in items) for items in lightest_subsets(DAMAGES, SAVINGS, 20.0, count=3)]
    assert found == ["ac", "ad", "bc"]


def test_a_branch_goes_in_one_way_only() -> None:
    damages = {("a", 0): 0.5, ("a", -1): 0.1, ("b", 0): 0.7}
    savings = {("a", 0): 6.0, ("a", -1): 4.0, ("b", 0): 6.0}
    found = list(lightest_subsets(damages, savings, 9.0, count=2))
    assert found == [(("a", -1), ("b", 0)), (("a", 0), ("b", 0))]


@pytest.mark.parametrize("need", [0.0, 50.0])
def test_nothing_where_nothing_is_needed_or_all_is_too_little(need: float) -> None:
    assert not list(lightest_subsets(DAMAGES, SAVINGS, need, count=2))


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.1, 10)), min_size=1, max_size=8), st.floats(0.1, 20)
)
@settings(max_examples=40, deadline=None)
def test_no_other_set_is_better(pairs: list[tuple[float, float]], need: float) -> None:
    damages = {(str(n), 0): damage for n, (damage, _) in enumerate(pairs)}
    savings = {(str(n), 0): saving for n, (_, saving) in enumerate(pairs)}
    found = next(lightest_subsets(damages, savings, need, count=1), None)
    every = itertools.chain.from_iterable(itertools.combinations(damages, n) for n in range(1, len(pairs) + 1))
    costs = [sum(damages[n] for n in names) for names in every if sum(savings[n] for n in names) >= need + 1e-6]
    if found is None:
        assert not costs
    else:
        assert sum(savings[n] for n in found) >= need - 1e-5
        assert sum(damages[n] for n in found) <= min(costs, default=float("inf")) + 1e-5
