"""The training loop: Adam on weights, biases and ranges together, watched on held-back inputs.

The rate of every tensor is relative to its own size (root mean square of its values), so that one figure serves
networks of any scale (Shazeer & Stern 2018, arXiv 1804.04235, section 8). It rises linearly over the first steps and
falls along a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983). What is kept is the best state that the held-back
inputs have seen, the first one included.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vinoopt.distillation.augment import Augment
from vinoopt.distillation.losses import Loss, agreement, cross_entropy
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.weights import Key
from vinoopt.errors import DistillationError

_WARM_UP = 0.08
"""Share of the steps over which the rate rises."""
_LAST_RATE = 0.01
"""Share of the peak rate at the last step."""
_SMALLEST_SIZE = 1e-3
"""Of a tensor, for its rate: a bias of zeros must be able to move."""
_RANGE_RATE = 0.1
"""Rate of ranges, whose factors are logarithms, per relative rate of weights."""
_PATIENT = 0.75
"""Share of the steps before which a run is not ended early: while the rate is high no state looks like the best."""
_LEAST_BETTER, _TINY_LOSS = 1e-4, 1e-7
"""Of the best loss, and absolute: what a new best must be below it by. Less is the rounding of sums."""
_WATCHES = 20
"""Looks at the held-back inputs in a whole run."""
_CHECKPOINT_S = 60.0

Batch = Sequence[Any]
"""One tensor per input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """How a student is trained."""

    steps: int
    batch: int = 64
    peak_rate: float = 0.01
    """Of a weight's change per step, relative to the weights' size."""
    inner_weight: float = 1.0
    """Of the errors inside the network beside those of its outputs."""
    patience: int = 8
    """Looks at the held-back inputs without a new best before the run is ended early."""
    seed: int = 0
    threads: int | None = None
    """PyTorch's; None: as they are. Results are the same in every run with one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int
    steps: int
    loss: float
    held_loss: float
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
    reason: str
    """Why it ended: `done`, `no better for a while`, `time limit`, `not finite`."""


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
    is_batched: bool
    """Whether several calls may be put into one."""
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
    _running: float | None = None
    _stale: int = 0
    _spent: float = 0.0

    def run(self) -> Outcome:
        """Train until done, too late, or no better; leaves the best state in the student."""
        settings = self.settings
        threads = torch.get_num_threads()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        try:
            return self._run()
        finally:
            torch.set_num_threads(threads)

    def _run(self) -> Outcome:
        steps = self.settings.steps
        self._parameters = [*self.student.values, *self.student.factors]
        if not self._parameters:
            raise DistillationError("the model holds no weights that could be trained")
        self._device = self._parameters[0].device
        self._optimizer = self._made_optimizer()
        self._generator = torch.Generator().manual_seed(self.settings.seed)
        self._order: list[int] = []
        self._held_targets = self._targets()
        started = time.monotonic()
        if not self._resumed():
            self._first_loss, _ = self._watch(started)
        reason, saved = "done", time.monotonic()
        interval = max(steps // _WATCHES, 1)
        while self._step < steps:
            loss = self._one_step()
            self._step += 1
            if not math.isfinite(loss):
                reason = "not finite"
                break
            self._running = loss if self._running is None else 0.95 * self._running + 0.05 * loss
            is_late = self.deadline is not None and time.monotonic() > self.deadline
            if self._step % interval == 0 or self._step == steps or is_late:
                self._watch(started)
            if is_late or self._is_stale():
                reason = "time limit" if is_late else "no better for a while"
                break
            if self.checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_S:
                self._save(time.monotonic() - started)
                saved = time.monotonic()
        self._restore_best()
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return Outcome(
            steps=self._step,
            best_step=self._best_step,
            first_loss=self._first_loss,
            best_loss=self._best_loss,
            seconds=self._spent + time.monotonic() - started,
            reason=reason,
        )

    def _is_stale(self) -> bool:
        """Whether the rate has fallen far enough for a best state to come, and none has for a while."""
        return self._stale > self.settings.patience and self._step > _PATIENT * self.settings.steps

    # ------------------------------------------------------------------ one step

    def _made_optimizer(self) -> Any:
        groups = []
        for p in self.student.values:
            size = max(float(p.detach().square().mean().sqrt()), _SMALLEST_SIZE)
            groups.append({"params": [p], "base": self.settings.peak_rate * size})
        if len(self.student.factors):
            groups.append({"params": list(self.student.factors), "base": self.settings.peak_rate * _RANGE_RATE})
        for group in groups:
            group["lr"] = 0.0
        fused = self._device.type in ("cpu", "cuda")
        return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, fused=fused)

    def _one_step(self) -> float:
        scale = _rate(self._step, self.settings.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * scale
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        chunks = self._next_chunks()
        for inputs, labels in chunks:
            if self.material.augment is not None:
                inputs = self.material.augment(inputs, self._generator)
            with torch.no_grad():
                target = self.teacher(inputs, self.material.teacher_keys)
            values = self.student(inputs, self.material.student_keys)
            loss, _ = self.material.loss(values, target)
            if labels is not None:
                loss = loss + self.material.label_weight * cross_entropy(values[0], labels)
            (loss / len(chunks)).backward()
            total += float(loss.detach()) / len(chunks)
        if math.isfinite(total):
            self._optimizer.step()
        return total

    def _next_chunks(self) -> list[tuple[Batch, Any]]:
        """The next calls in a random order with their labels, in one chunk where they can be run together."""
        own = self.student.own_batch or self.material.inputs[0][0].shape[0] or 1
        count = min(max(self.settings.batch // own, 1), len(self.material.inputs))
        if len(self._order) < count:
            self._order = torch.randperm(len(self.material.inputs), generator=self._generator).tolist()
        picked, self._order = self._order[:count], self._order[count:]
        chunks = self._chunks([self.material.inputs[i] for i in picked])
        if self.material.labels is None:
            return [(chunk, None) for chunk in chunks]
        labels = [[self.material.labels[i]] for i in picked]
        return [(c, own[0]) for c, own in zip(chunks, _joined(labels, self.material.is_batched), strict=True)]

    # ------------------------------------------------------------------ held-back inputs

    def _held_chunks(self) -> list[Batch]:
        own = self.student.own_batch or self.material.held[0][0].shape[0] or 1
        count = max(self.settings.batch // own, 1)
        held = self.material.held
        parts = [held[i : i + count] for i in range(0, len(held), count)]
        return [chunk for part in parts for chunk in self._chunks(part)]

    def _chunks(self, calls: Sequence[Batch]) -> list[Batch]:
        return [[x.to(self._device) for x in chunk] for chunk in _joined(calls, self.material.is_batched)]

    def _targets(self) -> list[list[Any]]:
        keys = self.material.teacher_keys[: len(self.material.loss.outputs)]
        with torch.no_grad():
            return [self.teacher(chunk, keys) for chunk in self._held_chunks()]

    def _watch(self, started: float) -> tuple[float, float | None]:
        """Loss and agreement on the held-back inputs now; keeps the state where it is the best so far."""
        keys = self.material.student_keys[: len(self.material.loss.outputs)]
        losses, shares, sizes = [], [], []
        with torch.no_grad():
            for chunk, target in zip(self._held_chunks(), self._held_targets, strict=True):
                values = self.student(chunk, keys)
                losses.append(float(self.material.loss.of_outputs(values, target)))
                shares.append([a for v, t in zip(values, target, strict=True) if (a := agreement(v, t)) is not None])
                sizes.append(chunk[0].shape[0] if chunk[0].ndim else 1)
        loss = sum(each * size for each, size in zip(losses, sizes, strict=True)) / sum(sizes)
        agreeing = [sum(share) / len(share) * size for share, size in zip(shares, sizes, strict=True) if share]
        share = sum(agreeing) / sum(sizes) if agreeing else None
        loss = loss if math.isfinite(loss) else math.inf
        self._stale += 1
        if not self._best or loss < self._best_loss - max(_LEAST_BETTER * self._best_loss, _TINY_LOSS):
            self._best_loss, self._best_step, self._stale = loss, self._step, 0
            self._best = [p.detach().clone() for p in self._parameters]
        self._report(loss, share, started)
        return loss, share

    def _report(self, loss: float, share: float | None, started: float) -> None:
        steps = self.settings.steps
        spent = time.monotonic() - started + self._spent
        left = spent / self._step * (steps - self._step) if self._step else math.nan
        if self.deadline is not None:
            left = min(left, self.deadline - time.monotonic()) if self._step else left
        self.on_progress(
            Progress(
                step=self._step,
                steps=steps,
                loss=math.nan if self._running is None else self._running,
                held_loss=loss,
                best_loss=self._best_loss,
                first_loss=self._first_loss if self._step else loss,
                agreement=share,
                seconds_left=left,
            )
        )

    def _restore_best(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)

    # ------------------------------------------------------------------ checkpoints

    def _save(self, spent: float) -> None:
        if self.checkpoint is None:
            return
        part = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "signature": self.signature,
                "step": self._step,
                "parameters": [p.detach() for p in self._parameters],
                "optimizer": self._optimizer.state_dict(),
                "generator": self._generator.get_state(),
                "order": self._order,
                "best": self._best,
                "numbers": [self._best_step, self._best_loss, self._first_loss, self._running, self._stale],
                "spent": self._spent + spent,
            },
            part,
        )
        part.replace(self.checkpoint)

    def _resumed(self) -> bool:
        """Take up the checkpoint where there is one of the same run."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        # What was cut off, or written by another version, is no checkpoint: the run begins anew.
        with contextlib.suppress(RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError):
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            if state["signature"] != self.signature:
                return False
            self._optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
            self._generator.set_state(state["generator"])
            self._order, self._best = state["order"], state["best"]
            self._best_step, self._best_loss, self._first_loss, self._running, self._stale = state["numbers"]
            self._step, self._spent = state["step"], state["spent"]
            return True
        return False


def _rate(step: int, steps: int) -> float:
    """The rate of a step, as a share of the peak."""
    warm = max(int(steps * _WARM_UP), 1)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _joined(calls: Sequence[Batch], is_batched: bool) -> list[Batch]:
    """The calls as one, or each on its own."""
    calls = [[_wide(x) for x in call] for call in calls]
    if not is_batched:
        return list(calls)
    joined = [torch.cat(list(values)) for values in zip(*calls, strict=True)]
    return [joined]


def _wide(x: Any) -> Any:
    return x if x.is_floating_point() or x.dtype == torch.bool else x.to(torch.int64)
