"""What pruning learns of a model before its first cut, as arrays that a store keeps for later runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vinoopt.compression.folding import StandIn
from vinoopt.compression.saliency import Moments, Statistics, UnitOrder

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Learnt:
    """From the calibration part alone, the same for every target."""

    statistics: Statistics
    stand_ins: Mapping[tuple[str, int], StandIn]
    """(last layer of a branch, kernel) -> the layer that may take the branch's place."""
    orders: Mapping[str, UnitOrder]
    others: Mapping[str, UnitOrder]
    """The same by another criterion."""


def packed(learnt: Learnt) -> dict[str, Array]:
    """As arrays of numbers by name, and one of text, which says what belongs where."""
    arrays: dict[str, Array] = {}
    places: dict[int, int] = {}

    def place_of(moments: Moments) -> int:
        """Where the moments are; what several layers share is there once."""
        if id(moments) not in places:
            places[id(moments)] = place = len(places)
            for part in ("mean", "second", "sampled"):
                if (array := getattr(moments, part)) is not None:
                    arrays[f"moments {place} {part}"] = array
            arrays[f"moments {place} rows"] = np.array(moments.rows)
        return places[id(moments)]

    stand_ins: list[list[str | int]] = []
    for (end, kernel), each in learnt.stand_ins.items():
        arrays[f"stand-in {len(stand_ins)} weights"] = each.weights
        arrays[f"stand-in {len(stand_ins)} bias"] = each.bias
        stand_ins.append([end, kernel, place_of(each.moments)])
    for kind, orders in (("orders", learnt.orders), ("others", learnt.others)):
        for place, order in enumerate(orders.values()):
            arrays[f"{kind} {place} order"] = np.array(order.order)
            arrays[f"{kind} {place} damage"] = order.damage
    index = {
        "layers": {name: place_of(each) for name, each in learnt.statistics.moments.items()},
        "stand-ins": stand_ins,
        "orders": list(learnt.orders),
        "others": list(learnt.others),
    }
    return {"index": np.array(json.dumps(index)), **arrays}


def unpacked(arrays: Mapping[str, Array]) -> Learnt:
    """What `packed` was given."""
    index = json.loads(str(arrays["index"]))
    moments: dict[int, Moments] = {}

    def moments_at(place: int) -> Moments:
        if place not in moments:
            found = {part: arrays.get(f"moments {place} {part}") for part in ("second", "sampled")}
            rows, mean = int(arrays[f"moments {place} rows"]), arrays[f"moments {place} mean"]
            moments[place] = Moments(rows=rows, mean=mean, **found)
        return moments[place]

    def orders_of(kind: str) -> dict[str, UnitOrder]:
        return {
            group: UnitOrder(
                group=group,
                order=tuple(arrays[f"{kind} {place} order"].tolist()),
                damage=arrays[f"{kind} {place} damage"],
            )
            for place, group in enumerate(index[kind])
        }

    return Learnt(
        statistics=Statistics(moments={name: moments_at(place) for name, place in index["layers"].items()}),
        stand_ins={
            (end, kernel): StandIn(
                weights=arrays[f"stand-in {number} weights"],
                bias=arrays[f"stand-in {number} bias"],
                moments=moments_at(place),
            )
            for number, (end, kernel, place) in enumerate(index["stand-ins"])
        },
        orders=orders_of("orders"),
        others=orders_of("others"),
    )
