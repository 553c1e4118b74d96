"""The training loop: Adam on weights, biases and ranges together, watched on held-back inputs.

The rate of every weight is relative to the size (root mean square) of its row, the channel it makes, so that one
figure serves networks of any scale (Shazeer & Stern 2018, arXiv 1804.04235, section 8, where it is the tensor's). By
the tensor's size the channels that batch norms have folded small are stirred up: MobileNetV2's depthwise ones differ
a hundredfold, and a rate that suited the large ones tripled the loss. It rises linearly over the first steps and
falls along a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983), by the steps or by the time limit, whichever is
nearer to its end. What is kept is the last state that the held-back inputs do not call worse than the best one by
more than a standard error (Breiman et al. 1984, "Classification and Regression Trees", the 1 SE rule): of a few
inputs the lowest loss is chance, and later states have learned more at lower rates. The first state counts too,
unless others judge what comes out.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vinoopt.distillation.augment import Augment
from vinoopt.distillation.losses import Loss, cross_entropy
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.rules import FOREIGN_ERRORS, failing, first_line, wide
from vinoopt.distillation.weights import Key
from vinoopt.errors import DistillationError

_WARM_UP = 0.08
"""Share of the steps over which the rate rises."""
_LAST_RATE = 0.01
"""Share of the peak rate at the last step."""
_SMALLEST_SIZE, _SMALLEST_ROW = 1e-3, 1e-3
"""Of a tensor, for its rate, and of a row as a share of its tensor's: a bias of zeros must be able to move."""
_PATIENT = 0.75
"""Share of a run before which it is not ended early: while the rate is high no state looks like the best."""
_REPORTS, _FIRST_LOOK = 20, 10
"""In a whole run, at even distances; and the first from which every one looks at the held-back inputs, as none is
best before."""
_EARLY_LOOKS = frozenset({3, 6})
"""Reports that look as well, to tell how a run goes."""
_LEAST_BETTER, _TINY_LOSS = 1e-4, 1e-7
"""Of the best loss, and absolute: what a new best must be below it by. Less is the rounding of sums."""
_BLOCKS = 12
"""Of the held-back inputs, at least, where there are so many: their losses tell what is chance."""
_HALF_NOISE, _OWN_NOISE = 0.01, 0.1
"""Of the student's loss, what teacher and student in bfloat16 may be away from themselves. Contractions take half the
time where the CPU has such arithmetic. The teacher's rounding must not be what is learned; the student's own is noise
beside that of its quantizers, and no look at the held-back inputs has it."""
_WHOLE_STEPS, _LEAST_SHARE = 600, 0.25
"""A shorter run goes more slowly, with the root of its length, down to that of this share: what a high rate stirs up
needs time to settle (a CIFAR ResNet-20 that lost a quarter of its inner channels ended nearer after 150 steps with
0.003 than with 0.01, and after 600 with 0.01). A time limit makes runs short too. Ranges go at one rate: with a
lower one they do not arrive (YOLOX-Nano in INT8 by the mixed preset, 190 steps: divergences .0176 and .0322 before,
.0128 and .0170 after with 0.55 of the rate, .0120 and .0123 with all of it, scales of weights alike)."""
_MEMORY = 20
"""Steps over which the loss is averaged."""
_RISE, _EASING, _FIRST_RISE = 1.4, 0.5, 10
"""How far the averaged loss may rise above its lowest before all rates fall to this share, from this step on. Adam's
steps are as long where nearly nothing is left to learn, and all layers' go the same way: MobileNetV2 in INT8 was at
two thirds of its first loss after 90 steps, and at twice after 140, when its rate had fallen to half."""
_LOOK_GAP = 2.0
"""Between looks, in times of one: on a busy machine they must not take the time of the steps."""
_CHECKPOINT_S = 60.0
TIME_LIMIT, NOT_FINITE = "time limit", "not finite"

Batch = Sequence[Any]
"""One tensor per input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """How a student is trained."""

    steps: int
    batch: int = 64
    peak_rate: float = 0.01
    """Of a weight's change per step, relative to the weights' size."""
    range_rate: float = 0.001
    """Of a range's change per step, relative to its width; of a weight's scale too, where that is no more than the
    peak rate."""
    inner_weight: float = 1.0
    """Of the errors inside the network beside those of its outputs."""
    patience: int = 6
    """Looks at the held-back inputs that are no better than earlier ones before the run is ended early."""
    seed: int = 0
    may_keep_first: bool = True
    """Whether the state before the first step is the result where no later one looks better. A state that earlier
    looks at the same inputs have chosen seems better there than it is: then it must not be compared by them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int
    steps: int
    loss: float
    held_loss: float
    """At the last look."""
    looked_at: int
    """The step of that look."""
    best_loss: float
    first_loss: float
    agreement: float | None
    seconds_left: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended, in losses on the held-back inputs."""

    steps: int
    best_step: int
    first_loss: float
    best_loss: float
    seconds: float
    looking_s: float
    """Of them, beginning and looking at the held-back inputs."""
    reason: str
    """Why it ended: `done`, `no better for a while`, `time limit`, `not finite`."""
    unsaved: str = ""
    """Why the run has no checkpoint any more, where one could not be written."""

    @property
    def step_s(self) -> float:
        """Of a step."""
        return max((self.seconds - self.looking_s) / max(self.steps, 1), 1e-4)

    @property
    def is_cut(self) -> bool:
        """Whether it would have gone on."""
        return self.reason == TIME_LIMIT


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Material:
    """What a run learns from: inputs, and which values are compared."""

    inputs: Sequence[Batch]
    """Calls of the model, of one shape each."""
    held: Sequence[Batch]
    """Calls that are only looked at."""
    student_keys: Sequence[Key]
    """Outputs first, then values inside."""
    teacher_keys: Sequence[Key]
    loss: Loss
    augment: Augment | None
    together: int
    """Calls that may be put into one; 1: each is run on its own."""
    labels: Sequence[Any] | None = None
    """One tensor of class numbers per call, for the first output; None: labels are not looked at."""
    label_weight: float = 0.0


@dataclass(kw_only=True)
class Training:
    """One run, which can be interrupted and taken up again."""

    student: Mirror
    teacher: Mirror
    material: Material
    settings: TrainingSettings
    deadline: float | None = None
    """In `time.monotonic` seconds."""
    checkpoint: Path | None = None
    signature: str = ""
    """What a checkpoint must have been made for."""
    on_progress: Callable[[Progress], None] = lambda progress: None
    _step: int = 0
    _best: list[Any] = field(default_factory=list)
    _best_step: int = 0
    _best_loss: float = math.inf
    _first_loss: float = math.inf
    _held_loss: float = math.inf
    _looked_at: int = 0
    _agreement: float | None = None
    _running: float = 0.0
    _calmest: float = math.inf
    """Lowest averaged loss since the rates were eased."""
    _eased: float = 1.0
    """Share of the rates that is left."""
    _lowest: list[float] = field(default_factory=list)
    """Losses of the best look, block by block."""
    _lowest_since: list[float] = field(default_factory=list)
    """Of all looks behind the first one: what tells whether a run still gets better, from wherever it has been."""
    _stale: int = 0
    _spent: float = 0.0
    _looking: float = 0.0
    _look_s: float = 0.0
    """Of the last look."""
    _looked_until: float = 0.0
    _started: float = 0.0
    _halves: bool = False
    """Whether the teacher computes in bfloat16 while training."""
    _own_halves: bool = False
    """Whether the student does."""
    _before_step: tuple[list[int], Any] | None = None
    """Where order and generator were before the step that is being taken."""
    _is_changing: bool = False
    """Whether parameters are being changed: half of a step is no state to go on from."""
    _unsaved: str = ""

    def run(self) -> Outcome:
        """Train until done, too late, or no better; leaves the best state in the student.

        An interrupt leaves a checkpoint, where one has a place, and goes on its way.
        """
        try:
            with failing("beginning to train"):
                self._begin()
            return self._run()
        except BaseException as exc:
            if not isinstance(exc, Exception):
                self._save_interrupted()
            raise

    def _begin(self) -> None:
        self._started = time.monotonic()
        self._parameters = [*self.student.values, *self.student.scales, *self.student.ranges]
        if not self._parameters:
            raise DistillationError("the model holds no weights that could be trained")
        self._device = self._parameters[0].device
        self._rows = [(p, _row_sizes(p.detach())) for p in self.student.values if _has_rows(p)]
        self._optimizer = self._made_optimizer()
        self._generator = torch.Generator().manual_seed(self.settings.seed)
        self._order: list[int] = []
        self._held_targets = self._targets()
        if not self._resumed():
            self._look()
            self._first_loss = self._held_loss
            self._report()
            if not self.settings.may_keep_first:
                self._best_loss, self._lowest = math.inf, []
            if self._device.type == "cpu" and _has_bf16():
                self._halves, self._own_halves = self._may_halve(), self._student_may_halve()
            self._looking = 0.0
        self._looking += time.monotonic() - self._started

    def _run(self) -> Outcome:
        steps = self.settings.steps
        reason, saved = "done", time.monotonic()
        mark = int(_REPORTS * self._step / steps)
        while self._step < steps:
            began = time.monotonic()
            self._before_step = self._order, self._generator.get_state()
            loss = self._one_step()
            self._step += 1
            self._before_step, self._is_changing = None, False
            step_s = time.monotonic() - began
            if not math.isfinite(loss):
                reason = NOT_FINITE
                break
            self._ease(loss)
            is_late = self.deadline is not None and time.monotonic() + step_s + self._look_s > self.deadline
            is_last = is_late or self._step == steps
            now = int(_REPORTS * self._share() + 1e-9)
            if now > mark or is_last:
                mark = now
                is_due = now >= _FIRST_LOOK or now in _EARLY_LOOKS
                if is_last or (is_due and self._may_look()):
                    self._look()
                self._report()
            if (is_late and self._step < steps) or self._is_stale():
                reason = TIME_LIMIT if is_late else "no better for a while"
                break
            if time.monotonic() - saved > _CHECKPOINT_S:
                self._save()
                saved = time.monotonic()
        if reason != NOT_FINITE:
            self._save()  # until the caller has made sure of the result
        self._restore_best()
        return Outcome(
            steps=self._step,
            best_step=self._best_step,
            first_loss=self._first_loss,
            best_loss=self._best_loss,
            seconds=self._spent + time.monotonic() - self._started,
            looking_s=self._looking,
            reason=reason,
            unsaved=self._unsaved,
        )

    def _ease(self, loss: float) -> None:
        """Average the loss of the last steps, and go more slowly where it has risen."""
        kept = 1 - 1 / _MEMORY
        self._running += (loss - self._running) * (1 - kept) / (1 - kept**self._step)
        if self._step < _FIRST_RISE:
            return
        if self._running > _RISE * self._calmest:
            self._eased *= _EASING
            self._calmest = self._running
        self._calmest = min(self._calmest, self._running)

    def _may_look(self) -> bool:
        """Whether enough time went into steps since the last look, where time is short."""
        return self.deadline is None or time.monotonic() > self._looked_until + _LOOK_GAP * self._look_s

    def _may_halve(self) -> bool:
        """Whether the teacher may be asked in bfloat16."""
        keys = self.material.teacher_keys[: len(self.material.loss.outputs)]
        try:
            halved = self._asked(self._held_chunks()[0], keys, halves=True)
        except DistillationError:  # an operator that PyTorch lacks in this type
            return False
        return self._is_little(halved, self._held_targets[0], _HALF_NOISE)

    def _student_may_halve(self) -> bool:
        """Whether the student may compute in bfloat16, forwards and back."""
        keys = self.material.student_keys[: len(self.material.loss.outputs)]
        chunk = self._held_chunks()[0]
        try:
            with torch.no_grad():
                exact = self.student(chunk, keys)
            halved = self._answered(chunk, keys, halves=True)
            with failing("a step in bfloat16"):
                self.material.loss.of_outputs(halved, self._held_targets[0]).backward()
        except DistillationError:
            return False
        grads = [p.grad for p in self._parameters if p.grad is not None]
        is_finite = all(bool(torch.isfinite(grad).all()) for grad in grads)
        self._optimizer.zero_grad(set_to_none=True)
        return is_finite and self._is_little([value.detach() for value in halved], exact, _OWN_NOISE)

    def _is_little(self, halved: Sequence[Any], exact: Sequence[Any], share: float) -> bool:
        """Whether values are away from exact ones by less than this share of the student's loss."""
        return float(self.material.loss.of_outputs(halved, exact)) < share * self._first_loss

    def _asked(self, inputs: Batch, keys: Sequence[Key], *, halves: bool = False) -> list[Any]:
        """The teacher's values."""
        with torch.no_grad():
            return self._computed(self.teacher, inputs, keys, halves)

    def _answered(self, inputs: Batch, keys: Sequence[Key], *, halves: bool) -> list[Any]:
        """The student's values, with gradients."""
        return self._computed(self.student, inputs, keys, halves)

    def _computed(self, mirror: Mirror, inputs: Batch, keys: Sequence[Key], halves: bool) -> list[Any]:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=halves):
            values = mirror(inputs, keys)
        return [value.float() if halves and value.is_floating_point() else value for value in values]

    def _share(self) -> float:
        """How much of the run is over, by its steps or by its time."""
        by_steps = self._step / self.settings.steps
        if self.deadline is None:
            return by_steps
        whole = max(self.deadline - self._look_s - self._started, 1e-9)
        return min(max(by_steps, (time.monotonic() - self._started) / whole), 1.0)

    def _is_stale(self) -> bool:
        """Whether the rate has fallen far enough for looks to become better, and none has for a while."""
        return self._stale > self.settings.patience and self._share() > _PATIENT

    # ------------------------------------------------------------------ one step

    def _made_optimizer(self) -> Any:
        groups = []
        for p in self.student.values:
            size = max(float(p.detach().square().mean().sqrt()), _SMALLEST_SIZE)
            groups.append({"params": [p], "base": self.settings.peak_rate * size, "is_paced": True})
        range_rate = self.settings.range_rate
        # A scale moves the largest weights as much as itself, and what it clips learns nothing: no faster than they
        # may move. (MobileNetV2 in INT8: loss on 96 images learned from .0105 before, .0044 after 156 steps; with
        # scales as fast as ranges, 0.07 away by then, .0199.)
        scale_rate = min(self.settings.peak_rate, range_rate)
        for factors, rate in ((self.student.scales, scale_rate), (self.student.ranges, range_rate)):
            if len(factors):
                groups.append({"params": list(factors), "base": rate, "is_paced": False})
        for group in groups:
            group["lr"] = 0.0
        fused = self._device.type in ("cpu", "cuda")
        return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, fused=fused)

    def _one_step(self) -> float:
        share, steps = self._share(), self.settings.steps
        length = self._step / share if share else steps  # less than asked for where time is short
        slower = pace(length) / pace(steps)
        rate = self._eased * _rate(share, steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * (slower if group["is_paced"] else 1.0) * rate
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with failing("a step of training"):
            for inputs, labels, weight in self._next_chunks():
                loss = weight * self._loss(inputs, labels, self.settings.inner_weight)
                loss.backward()
                total += float(loss.detach())
            if math.isfinite(total) and self._are_grads_finite():
                self._is_changing = True
                self._change()
        return total

    def _change(self) -> None:
        """Take the step, shorter in small rows."""
        with torch.no_grad():
            old = [p.clone() for p, _ in self._rows]
            self._optimizer.step()
            for (p, sizes), before in zip(self._rows, old, strict=True):
                p.copy_(torch.lerp(before, p, sizes))

    def _are_grads_finite(self) -> bool:
        """Whether a step may be taken: a root of zero, say, has a value, but no slope."""
        sums = [p.grad.sum() for p in self._parameters if p.grad is not None]
        return bool(torch.isfinite(torch.stack(sums)).all()) if sums else True

    def _loss(self, inputs: Batch, labels: Any, inner_weight: float) -> Any:
        material = self.material
        if material.augment is not None:
            inputs = material.augment(inputs, self._generator)
        count = None if inner_weight else len(material.loss.outputs)
        target = self._asked(inputs, material.teacher_keys[:count], halves=self._halves)
        values = self._answered(inputs, material.student_keys[:count], halves=self._own_halves)
        loss = material.loss(values, target, inner_weight=inner_weight)
        if labels is None:
            return loss
        return loss + material.label_weight * cross_entropy(values[0], labels)

    def _next_chunks(self) -> list[tuple[Batch, Any, float]]:
        """The next calls in a random order, with their labels and their share of the step, as few as can be."""
        first = self.material.inputs[0][0]
        own = self.student.own_batch or (first.shape[0] if first.ndim else 1) or 1
        count = min(max(self.settings.batch // own, 1), len(self.material.inputs))
        if len(self._order) < count:
            self._order = torch.randperm(len(self.material.inputs), generator=self._generator).tolist()
        picked, self._order = self._order[:count], self._order[count:]
        chunks, most = [], self.material.together
        for places in (picked[i : i + most] for i in range(0, count, most)):
            labels = None
            if self.material.labels is not None:
                labels = torch.cat([self.material.labels[i] for i in places])
            chunks.append((self._joined([self.material.inputs[i] for i in places]), labels, len(places) / count))
        return chunks

    def _joined(self, calls: Sequence[Batch]) -> Batch:
        """Several calls as one."""
        values = [[wide(x) for x in call] for call in calls]
        joined = values[0] if len(values) == 1 else [torch.cat(list(each)) for each in zip(*values, strict=True)]
        return [x.to(self._device) for x in joined]

    # ------------------------------------------------------------------ held-back inputs

    def _held_chunks(self) -> list[Batch]:
        held = self.material.held
        most = min(self.material.together, math.ceil(len(held) / _BLOCKS))
        return [self._joined(held[i : i + most]) for i in range(0, len(held), most)]

    def _targets(self) -> list[list[Any]]:
        keys = self.material.teacher_keys[: len(self.material.loss.outputs)]
        return [self._asked(chunk, keys) for chunk in self._held_chunks()]

    def _look(self) -> None:
        """Loss and agreement on the held-back inputs now; keeps the state where it is the best so far."""
        began = time.monotonic()
        keys = self.material.student_keys[: len(self.material.loss.outputs)]
        losses, shares, sizes = [], [], []
        with torch.no_grad():
            for chunk, target in zip(self._held_chunks(), self._held_targets, strict=True):
                values = self.student(chunk, keys)
                losses.append(float(self.material.loss.of_outputs(values, target)))
                shares.append(self.material.loss.agreement(values, target))
                sizes.append(chunk[0].shape[0] if chunk[0].ndim else 1)
        loss = sum(each * size for each, size in zip(losses, sizes, strict=True)) / sum(sizes)
        agreeing = [share * size for share, size in zip(shares, sizes, strict=True) if share is not None]
        self._agreement = sum(agreeing) / sum(sizes) if agreeing else None
        self._held_loss = loss = loss if math.isfinite(loss) else math.inf
        self._looked_at = self._step
        is_settling = self._share() >= _FIRST_LOOK / _REPORTS
        if is_settling:
            self._stale = 0 if is_near(losses, self._lowest_since) else self._stale + 1
            if _is_below(losses, self._lowest_since):
                self._lowest_since = losses
        is_lowest = _is_below(losses, self._lowest)
        if not self._best or is_lowest or (is_settling and is_near(losses, self._lowest)):
            self._best_loss, self._best_step = loss, self._step
            self._best = [p.detach().clone() for p in self._parameters]
        if is_lowest:
            self._lowest = losses
        self._looked_until = time.monotonic()
        self._look_s = self._looked_until - began
        self._looking += self._look_s

    def _report(self) -> None:
        steps = self.settings.steps
        spent = time.monotonic() - self._started + self._spent
        left = spent / self._step * (steps - self._step) if self._step else math.nan
        if self.deadline is not None:
            left = min(left, self.deadline - time.monotonic()) if self._step else left
        self.on_progress(
            Progress(
                step=self._step,
                steps=steps,
                loss=self._running if self._step else math.nan,
                held_loss=self._held_loss,
                looked_at=self._looked_at,
                best_loss=self._best_loss,
                first_loss=self._first_loss,
                agreement=self._agreement,
                seconds_left=left,
            )
        )

    def _restore_best(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)

    # ------------------------------------------------------------------ checkpoints

    def _save_interrupted(self) -> None:
        """Save where the last whole step ended; what is saved already stays where that is not known any more."""
        if self._step == 0 or self._is_changing:
            return
        if self._before_step is not None:
            self._order, state = self._before_step
            self._generator.set_state(state)
        self._save()

    def _save(self) -> None:
        """Write the checkpoint; a disk that refuses it ends no run."""
        if self.checkpoint is None or not self._best or self._unsaved:
            return
        part = self.checkpoint.with_suffix(".part")
        state = {
            "signature": self.signature,
            "step": self._step,
            "parameters": [p.detach() for p in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "order": self._order,
            "best": self._best,
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "spent": self._spent + time.monotonic() - self._started,
        }
        try:
            torch.save(state, part)
            part.replace(self.checkpoint)
        except (OSError, RuntimeError) as exc:  # PyTorch's own file writer raises the second
            self._unsaved = first_line(exc)
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _resumed(self) -> bool:
        """Take up the checkpoint where there is one of the same run; all of it, or nothing."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        optimizer, generator = self._made_optimizer(), torch.Generator()
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            if state["signature"] != self.signature or not self._fits(state):
                return False
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
        except (*FOREIGN_ERRORS, AttributeError, EOFError, OSError, pickle.UnpicklingError):
            return False  # cut off, or written by another version: the run begins anew
        with torch.no_grad():
            for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self._optimizer, self._generator = optimizer, generator
        self._order, self._best = state["order"], [value.to(self._device) for value in state["best"]]
        self._step, self._spent = state["step"], state["spent"]
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self._lowest_since, self._stale = [], 0  # with more time the rate is high again
        return True

    def _fits(self, state: Mapping[str, Any]) -> bool:
        """Whether what a checkpoint holds can all be taken over."""
        shapes = [p.shape for p in self._parameters]
        tensors = [[value.shape for value in state[name]] == shapes for name in ("parameters", "best")]
        moments = [value for each in state["optimizer"]["state"].values() for value in each.values()]
        return (
            all(tensors)
            and all(value.numel() == 1 or value.shape in shapes for value in moments)
            and set(state["numbers"]) == set(_NUMBERS)
            and 0 <= state["step"] <= self.settings.steps
            and all(0 <= place < len(self.material.inputs) for place in state["order"])
        )


_NUMBERS = (
    "_best_step", "_best_loss", "_first_loss", "_held_loss", "_looked_at", "_agreement", "_running", "_looking",
    "_look_s", "_halves", "_own_halves", "_lowest", "_calmest", "_eased",
)  # fmt: skip
"""Of a run, kept in its checkpoint: numbers, and what was settled at its beginning."""


def _has_bf16() -> bool:
    """Whether the CPU has arithmetic in bfloat16, rather than imitating it."""
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones do not tell
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _is_below(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    """By more than the rounding of sums, on average; any that are finite are below none."""
    if not np.isfinite(losses).all():
        return False
    return not lowest or float(np.mean(losses)) < float(np.mean(lowest)) - _rounding(lowest)


def is_near(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    """Whether they are below, or above by no more than the standard error of the differences."""
    if _is_below(losses, lowest):
        return True
    if not lowest or len(losses) < 2 or not np.isfinite(losses).all():
        return False
    above = np.subtract(losses, lowest)
    error = float(above.std(ddof=1)) / math.sqrt(len(above))
    return error > _rounding(lowest) and float(above.mean()) <= error


def _rounding(lowest: Sequence[float]) -> float:
    return max(_LEAST_BETTER * float(np.mean(lowest)), _TINY_LOSS)


def _has_rows(values: Any) -> bool:
    """Whether these are a matrix of some kind, and not one value per channel."""
    return len([size for size in values.shape if size > 1]) > 1


def _row_sizes(values: Any) -> Any:
    """The size of every row, along the first axis that has several, over that of the whole; 1 along other axes."""
    row = next(axis for axis, size in enumerate(values.shape) if size > 1)
    within = tuple(axis for axis in range(values.ndim) if axis != row)
    squares = values.square().mean(within, keepdim=True)
    return (squares / squares.mean().clamp(min=_SMALLEST_SIZE**2)).sqrt().clamp(min=_SMALLEST_ROW)


def pace(steps: float) -> float:
    """The peak rate of a run of so many steps, as a share of that of a long one."""
    return math.sqrt(min(max(steps / _WHOLE_STEPS, _LEAST_SHARE), 1.0))


def _rate(share: float, steps: int) -> float:
    """The rate of the step at this share of a run, as a share of the peak."""
    if share < _WARM_UP:
        return min((share + 1 / steps) / _WARM_UP, 1.0)
    done = (share - _WARM_UP) / (1 - _WARM_UP)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
