"""FakeQuantize with gradients for values and ranges.

Values pass gradients straight through inside the range and none outside (Bengio et al. 2013, arXiv 1308.3432).
The range has one factor exp(theta) for both ends, learned as in LSQ (Esser et al. 2019, arXiv 1902.08153, section
2.1) with the derivative taken in the logarithm: d y / d theta is y - x inside the range and y outside. Both ends
scale together, so zero stays on the grid and a symmetric or unsigned range stays one: what OpenVINO's INT8 kernels
ask for. A skewed range has a second factor, exp(phi), for its upper end, as in LSQ+ (Bhalgat et al. 2020, arXiv
2004.09576, section 3): values behind a Swish have a firm lower end and a few far above. Zero moves to the nearest
level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

_ON_GRID = 1e-3
"""Of a step: how far zero may lie from the grid to count as on it."""
_THINNING = 8
"""A range's gradient is a sum over millions of values; that of every eighth sample of the batch serves as well."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """The levels of a quantizer at theta = 0."""

    low: Any
    """Tensors that broadcast with the values."""
    high: Any
    levels: int
    scale_out: Any
    """Output = quantized input * scale + offset * exp(theta); 1 and 0 where both ranges are the same."""
    offset_out: Any

    @classmethod
    def of(cls, low: Any, high: Any, out_low: Any, out_high: Any, *, levels: int) -> Grid:
        """The grid of FakeQuantize's four ranges."""
        scale = (out_high - out_low) / (high - low)
        is_same = bool(torch.equal(low, out_low)) and bool(torch.equal(high, out_high))
        return cls(
            low=low,
            high=high,
            levels=levels,
            scale_out=None if is_same else scale,
            offset_out=None if is_same else out_low - scale * low,
        )

    @property
    def step(self) -> Any:
        """Between two levels."""
        return (self.high - self.low) / (self.levels - 1)

    def at(self, device: Any) -> Grid:
        """The same grid on another device."""
        if self.low.device == device:
            return self
        out = {"scale_out": self.scale_out, "offset_out": self.offset_out}
        moved = {name: None if value is None else value.to(device) for name, value in out.items()}
        return Grid(low=self.low.to(device), high=self.high.to(device), levels=self.levels, **moved)

    @property
    def is_skewed(self) -> bool:
        """Whether it is one range on both sides of zero, and not the same to both."""
        zero = self.offset_levels()
        return self.scale_out is None and zero is not None and 0 < zero < self.levels - 1 and zero != self.levels // 2

    def skewed(self, theta: float, phi: float) -> tuple[float, int]:
        """Step and level of zero of a skewed range."""
        low, high = float(self.low) * math.exp(theta), float(self.high) * math.exp(theta + phi)
        step = (high - low) / (self.levels - 1)
        return step, round(-low / step)

    def bounds(self, step: float, zero: int) -> tuple[float, float]:
        """The lowest and highest value of so many levels with zero at this one."""
        return -zero * step, (self.levels - 1 - zero) * step

    def offset_levels(self) -> int | None:
        """The level of zero, for one range with zero on its grid; None for other ones."""
        if self.step.numel() != 1:
            return None
        place = -float(self.low) / float(self.step)
        near = round(place)
        return near if abs(place - near) < _ON_GRID and 0 <= near < self.levels else None


def fake_quantize(x: Any, theta: Any, grid: Grid, *, phi: Any = None, has_samples: bool = False) -> Any:
    """`x` on the grid scaled by exp(theta), its upper end by exp(phi) too, with gradients for all; `has_samples` says
    what the first axis of `x` is."""
    grid, x = grid.at(x.device), x.float()  # levels are finer than bfloat16 tells
    return _onto_output(_FakeQuantize.apply(x, theta, phi, grid, has_samples), theta, grid)


def clamp(x: Any, theta: Any, grid: Grid, *, phi: Any = None) -> Any:
    """`x` inside the grid's range, as `fake_quantize` without its rounding."""
    if phi is not None:
        return torch.clamp(x, *grid.bounds(*grid.skewed(theta.item(), phi.item())))
    grid, factor = grid.at(x.device), torch.exp(theta)
    return _onto_output(torch.clamp(x, grid.low * factor, grid.high * factor), theta, grid)


def _onto_output(y: Any, theta: Any, grid: Grid) -> Any:
    if grid.scale_out is None:
        return y
    return y * grid.scale_out + grid.offset_out * torch.exp(theta)


def to_levels(x: Any, theta: Any, grid: Grid) -> Any:
    """The number of the level, from 0, that each value is rounded to."""
    grid, factor = grid.at(x.device), torch.exp(theta)
    low, high, step = grid.low * factor, grid.high * factor, grid.step * factor
    return torch.round((torch.clamp(x, low, high) - low) / step)


class _FakeQuantize(torch.autograd.Function):  # type: ignore[misc]
    """The forward rule of OpenVINO's FakeQuantize onto its own input range, and the gradients above."""

    @staticmethod
    def forward(ctx: Any, x: Any, theta: Any, phi: Any, grid: Grid, has_samples: bool) -> Any:
        zero = grid.offset_levels()
        if zero is None:
            factor = torch.exp(theta)
            low, high, step = grid.low * factor, grid.high * factor, grid.step * factor
            y = to_levels(x, theta, grid).mul_(step).add_(low)
        else:
            # In place, and with numbers for tensors: a small network waits for memory, not for arithmetic.
            step = float(grid.step) * math.exp(float(theta))
            if phi is not None:
                step, zero = grid.skewed(theta.item(), phi.item())
            low, high = grid.bounds(step, zero)
            y = (x * (1 / step)).round_().clamp_(-zero, grid.levels - 1 - zero).mul_(step)
        ctx.save_for_backward(x, y, theta, phi)
        is_thinned = has_samples and x.ndim > 1 and (theta.ndim < x.ndim or theta.shape[0] == 1)
        ctx.bounds, ctx.thinning = (low, high, step), _THINNING if is_thinned else 1
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, Any, Any, None, None]:
        x, y, theta, phi = ctx.saved_tensors
        low, high, step = ctx.bounds
        if isinstance(low, float):
            # Ends of the range count as inside: zeros are most of what a rectifier gives.
            passed = torch.ops.aten.hardtanh_backward(grad, x, low - _ON_GRID * step, high + _ON_GRID * step)
        else:
            passed = torch.where((x >= low) & (x <= high), grad, 0.0)
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None, None
        inside, scale = passed, 1.0
        if ctx.thinning > 1:
            rows = max(len(x) // ctx.thinning, 1)
            scale = len(x) / rows
            grad, x, y, inside = grad[:rows], x[:rows], y[:rows], passed[:rows]
        for_theta = grad * y
        for_theta.sub_(inside * x)
        for_phi = None
        if phi is not None:
            # The step grows with the upper end in its share of the range; what is clipped below does not see it.
            share = torch.where(x > high, 1.0, torch.where(x < low, 0.0, high / (high - low)))
            for_phi = (for_theta * share).sum_to_size(phi.shape).mul_(scale)
        return passed, for_theta.sum_to_size(theta.shape).mul_(scale), for_phi, None, None
