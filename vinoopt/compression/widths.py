"""Widths of pruning groups as choices of the search: which are offered, and what each damages."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from vinoopt.accuracy.datasets import Dataset
from vinoopt.compression.contractions import index_contractions
from vinoopt.compression.folding import Branch, StandIn, find_branches, fit_stand_ins, folded
from vinoopt.compression.groups import Coupling, find_groups
from vinoopt.compression.kept import Learnt, packed, unpacked
from vinoopt.compression.refit import (
    Aims,
    RefitSettings,
    correct_bias,
    mean_outputs,
    refit_local,
    refit_sequential,
)
from vinoopt.compression.saliency import Statistics, UnitOrder, collect_statistics, order_units
from vinoopt.compression.surgery import PrunedModel, apply_pruning, verify_pruning, zeroed_reference
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import GroupWidth, PruningGroup
from vinoopt.store import Store, digest

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]

MAX_CALLS = 1000
"""Calibration calls that statistics and refit use."""
MAX_BYTES = 512 << 20
"""Of calibration inputs held in memory for them."""
MIN_CALLS = 32
_KEPT_GROUNDS = 8
_MOST_KEPT = 512 << 20
"""Bytes of statistics that are worth their place on disk."""
_PROVING, _PROVEN = 2, 1e-3
"""Calls on which surgery is proven, and the relative difference that rounding may cause, in deep networks too."""
_LEAST_LASTING = 0.02
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ground:
    """A model that widths are taken from: the source, or the source with stand-ins for some branches."""

    model: ov.Model
    coupling: Coupling
    statistics: Statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningKit:
    """What pruning needs of one model: its groups, statistics of its activations, and the order units leave in.

    Widths are numbers of units that stay. A negative one, -k, says that none do, and that one layer with a window
    of k stands for the branch that they belong to.
    """

    source: ov.Model
    coupling: Coupling
    statistics: Statistics
    orders: Mapping[str, UnitOrder]
    others: Mapping[str, UnitOrder]
    """The same by another criterion, for groups where that may serve better; see `with_best_orders`."""
    branches: Mapping[str, Branch]
    """Group -> the residual branch that one layer can stand for when the group's units all go."""
    stand_ins: Mapping[tuple[str, int], StandIn]
    """(last layer of a branch, kernel) -> that layer."""
    samples: Sequence[Sample]
    ignored: frozenset[str]
    """Layers that keep their weights."""
    seed: int
    grounds: OrderedDict[tuple[tuple[str, int], ...], Ground] = field(default_factory=OrderedDict)
    """Branches with stand-ins -> that model; kept while there is room."""
    aims: Aims = field(default_factory=Aims)
    """Of the thorough refits."""

    def cut(self, widths: Sequence[GroupWidth]) -> PrunedModel:
        """The model with the other units removed; weights as they were, stand-ins as they were fitted."""
        ground, rest = self._parted(widths)
        means = mean_outputs(ground.model, ground.statistics)
        return apply_pruning(ground.model, ground.coupling, rest, means=means)

    def roughly(self, widths: Sequence[GroupWidth]) -> ov.Model:
        """Removed and refitted from the float model's statistics alone: quick, for damage tables."""
        ground, _ = self._parted(widths)
        return refit_local(ground.model, self.cut(widths), ground.statistics)

    def proven(self, widths: Sequence[GroupWidth]) -> float:
        """How far the cut model, before any refit, is from the whole one with the same units zeroed at their readers.

        Relative, on real inputs; `CompressionError` beyond what rounding explains: then the surgery was wrong.
        """
        ground, rest = self._parted(widths)
        smaller = apply_pruning(ground.model, ground.coupling, rest).model
        reference = zeroed_reference(ground.model, ground.coupling, rest)
        difference = verify_pruning(smaller, reference, self.samples[:_PROVING])
        if difference > _PROVEN:
            raise CompressionError(
                f"the smaller model differs from the whole one with the same channels at zero by {difference:.2g} of "
                f"its outputs, where rounding gives less than {_PROVEN:g}: one of its operators was not cut right"
            )
        return difference

    def thoroughly(self, widths: tuple[GroupWidth, ...], *, calls: int | None = None) -> ov.Model:
        """Removed and refitted layer by layer on the pruned model's own activations, of so many calibration calls."""
        settings = RefitSettings(seed=self.seed, ignored=self.ignored)
        begun = replace(self.cut(widths), model=self.roughly(widths))
        return refit_sequential(self.source, begun, self.samples[:calls], settings=settings, aims=self.aims)

    def corrected(self, widths: tuple[GroupWidth, ...], quantized: ov.Model) -> ov.Model:
        """The quantized pruned model with biases moved so that mean outputs are the whole float model's."""
        cut = self.cut(widths)
        kept_rows = {layer.name: layer.kept_rows for layer in (*cut.consumers, *cut.producers)}
        stand_ins = [self.branches[width.group].end for width in widths if width.stand_in]
        layers = list(dict.fromkeys([*stand_ins, *(layer.name for layer in cut.consumers)]))
        settings = RefitSettings(seed=self.seed)
        return correct_bias(
            self.source, quantized, self.samples, layers, kept_rows=kept_rows, settings=settings, aims=self.aims
        )

    def widths(self, kept: Mapping[str, int]) -> tuple[GroupWidth, ...]:
        """The plan that keeps so many units of each group; groups that keep all are left out.

        What lies inside a branch that has a stand-in goes with it.
        """
        gone = {
            inner
            for group, width in kept.items()
            if width < 0
            for inner in self.branches[group].inner
            if inner != group
        }
        return tuple(
            GroupWidth(group=group.name, kept=(), stand_in=-width)
            if width < 0
            else GroupWidth(group=group.name, kept=self.orders[group.name].kept(width))
            for group in self.coupling.groups
            if (width := kept.get(group.name, group.units)) < group.units and group.name not in gone
        )

    def _parted(self, widths: Sequence[GroupWidth]) -> tuple[Ground, list[GroupWidth]]:
        """The model with the stand-ins that `widths` ask for, and the widths that are left to take from it."""
        folds = tuple((width.group, width.stand_in) for width in widths if width.stand_in)
        rest = [width for width in widths if not width.stand_in]
        if not folds:
            return Ground(model=self.source, coupling=self.coupling, statistics=self.statistics), rest
        if folds not in self.grounds:
            self.grounds[folds] = self._with_stand_ins(folds)
            while len(self.grounds) > _KEPT_GROUNDS:
                self.grounds.popitem(last=False)
        self.grounds.move_to_end(folds)
        return self.grounds[folds], rest

    def _with_stand_ins(self, folds: Sequence[tuple[str, int]]) -> Ground:
        unknown = [group for group, _ in folds if group not in self.branches]
        if unknown:
            raise PlanError(f'no layer can stand for the branch of group "{unknown[0]}"')
        pairs = [(self.branches[group], kernel) for group, kernel in folds]
        model = folded(self.source, pairs, lambda end, kernel: self.stand_ins[end, kernel])
        left = index_contractions(model)
        names = {node.get_friendly_name() for node in model.get_ops()}
        moments = {name: each for name, each in self.statistics.moments.items() if name in left}
        moments |= {branch.end: self.stand_ins[branch.end, kernel].moments for branch, kernel in pairs}
        return Ground(
            model=model,
            coupling=find_groups(model, ignored=sorted(self.ignored & names)),
            statistics=Statistics(moments=moments),
        )


def prepare(
    model: ov.Model,
    calibration: Dataset,
    *,
    ignored: Sequence[str],
    seed: int,
    say: Callable[[str], None],
    store: Store | None = None,
) -> PruningKit | None:
    """The kit for `model`, from the calibration part; None where the model has no group to prune.

    With a `store`, which must be the model's and the data's, what takes long is computed once for all runs.
    Raises `CompressionError` where the model's activations are not finite on these data.
    """
    coupling = find_groups(model, ignored=ignored)
    if not coupling.groups:
        return None
    samples = [calibration[index] for index in range(refit_calls(calibration))]
    branches = {branch.group: branch for branch in find_branches(model, coupling)}

    def learn() -> dict[str, Array]:
        readers = sorted({units.name for group in coupling.groups for units in coupling.columns[group.name]})
        say(f"activations of {len(readers)} layers on {len(samples)} calibration calls")
        statistics = collect_statistics(model, readers, samples, seed=seed)
        for name, moments in statistics.moments.items():
            if not np.isfinite(moments.mean).all():
                raise CompressionError(f'what "{name}" reads is not finite on the calibration data')
        if branches:
            say(f"layers that could stand for {len(branches)} branches")
        stand_ins = fit_stand_ins(model, list(branches.values()), samples, seed=seed) if branches else {}
        say(f"importance of the channels of {len(coupling.groups)} groups")
        orders = order_units(model, coupling, statistics)
        others = order_units(model, coupling, statistics, criterion="energy")
        return packed(Learnt(statistics=statistics, stand_ins=stand_ins, orders=orders, others=others))

    name = f"pruning-{digest(sorted(ignored), seed, len(samples))[:16]}"
    learnt = unpacked(learn() if store is None else store.arrays(name, learn, most_bytes=_MOST_KEPT))
    return PruningKit(
        source=model,
        coupling=coupling,
        statistics=learnt.statistics,
        orders=learnt.orders,
        others=learnt.others,
        branches=branches,
        stand_ins=learnt.stand_ins,
        samples=samples,
        ignored=frozenset(ignored),
        seed=seed,
    )


def refit_calls(calibration: Dataset) -> int:
    """How many calls of the calibration data statistics and refits see."""
    size = sum(array.nbytes for array in calibration[0].values())
    return min(len(calibration), MAX_CALLS, max(MAX_BYTES // max(size, 1), MIN_CALLS))


def size_of(width: int) -> float:
    """Orders widths by what is left: units, then stand-ins by their windows, then nothing."""
    return float(width) if width >= 0 else -width / 100


def offered_widths(
    group: PruningGroup, *, multiple: int, max_pruning: float, kernels: Sequence[int] = ()
) -> tuple[int, ...]:
    """Numbers of units worth keeping, falling, without all of them.

    Steps are the target's channel multiple; a group that holds fewer than four of those is cut in finer steps, so
    that it has a choice at all. Where the whole branch may go, `-k` is offered for every kernel k of a stand-in, and
    0; `max_pruning`, the largest share that a group may lose and live, does not bound that, but 0 forbids it too.
    """
    if not max_pruning:
        return ()
    step = multiple if group.kind == "channels" else 1
    while step > 1 and group.units < 4 * step:
        step //= 2
    least = max(math.ceil(group.units * (1 - max_pruning)), 1)
    widths = [w for w in range((group.units - 1) // step * step, 0, -step) if w >= least]
    return (*widths, *(-kernel for kernel in kernels), 0) if group.can_vanish else tuple(widths)


# --------------------------------------------------------------------------- damage


def with_best_orders(
    kit: PruningKit,
    offers: Mapping[str, Sequence[int]],
    probe: Callable[[tuple[GroupWidth, ...]], float],
    *,
    is_late: Callable[[], bool],
) -> PruningKit:
    """The kit in which each group loses its units in that order which damages the model less at its middle width.

    Elimination after optimal brain surgery foresees the refit, activation energy leans less on few samples; which
    serves better differs from group to group.
    """
    orders = dict(kit.orders)
    for name, other in kit.others.items():
        width = middle_width(offers.get(name, (0,)))
        if is_late() or width <= 0 or other.kept(width) == orders[name].kept(width):
            continue
        damages = [
            probe((GroupWidth(group=name, kept=order.kept(width)),)) for order in (orders[name], other)
        ]
        if damages[1] < damages[0]:
            orders[name] = other
    return replace(kit, orders=orders)


def width_damages(
    kit: PruningKit,
    offers: Mapping[str, Sequence[int]],
    probe: Callable[[tuple[GroupWidth, ...]], float],
    *,
    is_late: Callable[[], bool],
) -> dict[str, dict[int, float]]:
    """Group -> width -> output damage of this width alone.

    The model is run at the least and the middle width of every group; between them the damage follows the loss
    of the readers that the order of units predicts, scaled to meet what was seen. Groups are taken by that
    prediction, the least harmful first; those that the time does not reach are left out.
    """
    damages: dict[str, dict[int, float]] = {}
    for name in sorted(offers, key=lambda n: kit.orders[n].damage[max(middle_width(offers[n]), 0)]):
        if is_late():
            break
        seen = {
            width: max(probe(kit.widths({name: width})), 0.0)
            for width in sorted({middle_width(offers[name]), *_ends(offers[name])}, key=size_of)
        }
        finite = {width: damage for width, damage in seen.items() if math.isfinite(damage)}
        least = min((width for width in finite if width > 0), default=math.inf)
        if finite:
            usable = [width for width in offers[name] if width >= least or width in finite]
            damages[name] = _follow(kit.orders[name], usable, finite)
    return damages


def lasting_shares(
    names: Sequence[str], share: Callable[[str], float], *, count: int, is_late: Callable[[], bool]
) -> dict[str, float]:
    """Group -> what of its rough damage is left after the thorough refit, measured at `count` groups along the graph.

    `names` are in graph order; between the groups that were measured the logarithm is interpolated. Nothing where
    the time left for none.
    """
    places = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))
    known: dict[int, float] = {}
    for place in (*places[:1], *places[:0:-1]):  # both ends first
        if is_late():
            break
        if math.isfinite(found := share(names[place])):
            known[int(place)] = math.log(min(max(found, _LEAST_LASTING), 1.0))
    if not known:
        return {}
    at = sorted(known)
    values = np.exp(np.interp(range(len(names)), at, [known[place] for place in at]))
    return dict(zip(names, map(float, values), strict=True))


def middle_width(widths: Sequence[int]) -> int:
    """The one in the middle of those that leave something."""
    partial = [w for w in widths if w > 0] or list(widths)
    return partial[len(partial) // 2]


def _ends(widths: Sequence[int]) -> set[int]:
    """The least number of units, and all that leaves none."""
    return {min((w for w in widths if w > 0), default=widths[-1]), *(w for w in widths if w <= 0)}


def _follow(order: UnitOrder, widths: Sequence[int], seen: Mapping[int, float]) -> dict[int, float]:
    known = sorted(width for width in seen if width > 0)
    scales = [math.log((seen[width] + _TINY) / (float(order.damage[width]) + _TINY)) for width in known]
    result: dict[int, float] = {}
    for width in widths:
        if width in seen:
            result[width] = seen[width]
        else:
            scale = math.exp(float(np.interp(width, known, scales)))
            result[width] = float(order.damage[width]) * scale
    return result
