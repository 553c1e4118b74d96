"""How the values of an output lie: where its channels are, and whether its rows are those of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import openvino as ov

BOX = 4
"""Columns of a box, which come before a detector's scores."""
_TOGETHER = 0.3
"""Highest class score, on average, where the column before them is sure: from there on that one is the objectness. Of
class scores alone, one that is sure leaves little to the others."""
_SCORING = frozenset({"Sigmoid", "Softmax"})
_CUTTING = frozenset({"Gather", "Slice", "Split", "StridedSlice", "VariadicSplit"})
_CARRYING = _CUTTING | {"Convert", "FakeQuantize", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that hand values on as they are, or nearly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detector:
    """Rows of a detector, [B, rows, 4 + ...] or [B, 4 + ..., rows]: a box, scores from column 4 on, then what else
    belongs to the box, as points or coefficients of a mask."""

    channel: int
    """Axis of the columns."""
    end: int
    """Of the scores."""
    has_objectness: bool
    """Whether the first score says how surely there is anything, and the others what."""


def channel_axis(examples: Any, open_axes: frozenset[int] = frozenset()) -> int | None:
    """The shortest axis behind the batch of those whose size is fixed and more than 1; None where there is none."""
    inner = range(1, examples.ndim)
    sizes = {axis: examples.shape[axis] for axis in inner if examples.shape[axis] > 1 and axis not in open_axes}
    return min(sizes, key=lambda axis: sizes[axis], default=None)


def find_detector(result: ov.Node, examples: Any, open_axes: frozenset[int] = frozenset()) -> Detector | None:
    """The layout of a model's result, from its values on some inputs [B, ...]; None where it is no detector's.

    It is one where a sigmoid or softmax makes a part of it, and of three axes the shorter inner one begins with four
    columns that are not all between 0 and 1, and has some that are from the fifth on.
    """
    channel = channel_axis(examples, open_axes)
    if examples.ndim != 3 or channel is None or examples.shape[channel] <= BOX or not examples.numel():
        return None
    if not _is_partly_scores(result):
        return None
    table = examples.movedim(channel, -1).flatten(0, -2)
    are_chances = ((table.amin(0) >= 0) & (table.amax(0) <= 1)).tolist()
    if all(are_chances[:BOX]) or not are_chances[BOX]:
        return None
    end = next((n for n in range(BOX, len(are_chances)) if not are_chances[n]), len(are_chances))
    first, classes = table[:, BOX], table[:, BOX + 1 : end]
    sure = float(first.sum())
    is_together = end > BOX + 1 and sure > 0 and float((first * classes.amax(1)).sum()) / sure > _TOGETHER
    return Detector(channel=channel, end=end, has_objectness=is_together)


def _is_partly_scores(result: ov.Node) -> bool:
    """Whether a softmax or sigmoid makes a part of a result's values."""
    waiting, seen = [result.input_value(0).get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() in _SCORING:
            return True
        if node.get_type_name() == "Concat":
            waiting.extend(value.get_node() for value in node.input_values())
        elif node.get_type_name() in _CARRYING:
            waiting.append(node.input_value(0).get_node())
    return False
