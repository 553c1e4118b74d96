"""What a search may do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from vinoopt.records import CompressionPlan, QuantizationPlan

ROUNDS = {"fast": 1, "balanced": 2, "thorough": 10}
"""How often tables are corrected and the frontier searched again, by effort; less where that brings nothing new."""
DISTILL = "distill"
"""The effort that trains candidates after a balanced search."""
EFFORTS = (*ROUNDS, DISTILL)


def without_training(effort: str) -> str:
    """The effort of everything but distillation."""
    return "balanced" if effort == DISTILL else effort


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What the search may do."""

    base: QuantizationPlan
    """NNCF's recipe, with layers that must stay float."""
    quantize: bool = True
    prune: bool = True
    max_pruning: float = 0.5
    channel_multiple: int = 16
    seed: int = 0
    effort: str = "balanced"
    deadline: float | None = None
    """In `time.monotonic` seconds."""
    anchor_deadline: float | None = None
    """Of the baselines, which may use time that is else kept for choosing among candidates; None: `deadline`."""
    memory_bytes: float = math.inf
    """Memory that may be taken beyond what is held already."""

    def allows(self, plan: CompressionPlan) -> bool:
        """Whether the search may come by such a plan."""
        is_float = plan.quantization is None and plan.weights is None
        return (self.quantize or is_float) and (self.prune or not plan.widths)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def table_deadline(self) -> float | None:
        """A table may use half of the time that is left: the other half is for judging candidates."""
        return self.deadline_of(0.5)

    def deadline_of(self, share: float) -> float | None:
        """When this share of the time that is left will have passed, in `time.monotonic` seconds."""
        if self.deadline is None:
            return None
        now = time.monotonic()
        return now + share * max(self.deadline - now, 0.0)
