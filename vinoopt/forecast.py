"""How long a run will still take: stages, what each was expected to take, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_LEAST_LEFT = 0.1
"""Of a stage that is not over, the share of its time that is at least still to come."""


@dataclass(kw_only=True)
class Forecast:
    """Expected seconds per stage, corrected as stages begin and end; the order of stages does not matter."""

    deadline: float | None = None
    """When stages that can be cut short are, in `clock` seconds."""
    end: float | None = None
    """When the whole run is to be over, further targets included."""
    clock: Callable[[], float] = time.monotonic
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of the stages that are over."""
    _expected: dict[str, float] = field(default_factory=dict)
    _uncut: set[str] = field(default_factory=set)
    _since: dict[str, float] = field(default_factory=dict)

    def expect(self, stage: str, seconds: float, *, is_cut: bool = True) -> None:
        """What `stage` will take from its beginning; `is_cut` says that the deadline ends it."""
        self._expected[stage] = max(seconds, 0.0)
        (self._uncut.discard if is_cut else self._uncut.add)(stage)

    def still(self, stage: str, seconds: float) -> None:
        """What a stage that runs will still take from now on."""
        began = self._since.get(stage)
        if began is not None:
            self.expect(stage, self.clock() - began + seconds, is_cut=stage not in self._uncut)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The stage, from its beginning to its end, however it ends."""
        self._since[name] = self.clock()
        try:
            yield
        finally:
            self.took[name] = self.clock() - self._since.pop(name)
            self._expected.pop(name, None)

    def remaining_s(self) -> float | None:
        """Seconds until all is done; None before anything is expected."""
        if not self._expected:
            return None
        left = {name: self._left(name, seconds) for name, seconds in self._expected.items()}
        cut = sum(seconds for name, seconds in left.items() if name not in self._uncut)
        if self.deadline is not None:
            cut = min(cut, max(self.deadline - self.clock(), 0.0))
        total = cut + sum(seconds for name, seconds in left.items() if name in self._uncut)
        return total if self.end is None else min(total, max(self.end - self.clock(), 0.0))

    def _left(self, name: str, seconds: float) -> float:
        began = self._since.get(name)
        if began is None:
            return seconds
        elapsed = self.clock() - began
        return max(seconds - elapsed, _LEAST_LEFT * elapsed)
