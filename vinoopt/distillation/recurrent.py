"""Rules of recurrent cells and sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openvino as ov
import torch

from vinoopt.distillation.rules import Function, refuse, rule

_ACTIVATIONS: dict[str, Function] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


def _activations(node: ov.Node) -> list[Function]:
    a = node.get_attributes()
    names = [str(name).lower() for name in a["activations"]]
    unknown = sorted(set(names) - set(_ACTIVATIONS))
    if unknown or float(a.get("clip", 0.0)):
        raise refuse(node, f"activation {unknown[0]}" if unknown else "clipping")
    return [_ACTIVATIONS[name] for name in names]


def _lstm_step(node: ov.Node) -> Function:
    gate, squash, out = _activations(node)

    def step(gates: Any, h: Any, c: Any, r: Any, b: Any) -> tuple[Any, Any]:
        f, i, g, o = (gates + h @ r.T + b).chunk(4, -1)
        c = gate(f) * c + gate(i) * squash(g)
        return gate(o) * out(c), c

    return step


def _gru_step(node: ov.Node) -> Function:
    gate, squash = _activations(node)
    resets_after = bool(node.get_attributes()["linear_before_reset"])

    def step(gates: Any, h: Any, c: Any, r: Any, b: Any) -> tuple[Any, Any]:
        size = h.shape[-1]
        z, u = gate(gates[:, : 2 * size] + h @ r[: 2 * size].T + b[: 2 * size]).chunk(2, -1)
        last, bias = r[2 * size :], b[2 * size :]
        if resets_after:
            inner = gates[:, 2 * size :] + bias[:size] + u * (h @ last.T + bias[size:])
        else:
            inner = gates[:, 2 * size :] + (u * h) @ last.T + bias
        return (1 - z) * squash(inner) + z * h, c

    return step


def _rnn_step(node: ov.Node) -> Function:
    (squash,) = _activations(node)

    def step(gates: Any, h: Any, c: Any, r: Any, b: Any) -> tuple[Any, Any]:
        return squash(gates + h @ r.T + b), c

    return step


_STEPS = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}


@rule("LSTMCell", "GRUCell", "RNNCell")
def _cell(node: ov.Node) -> Function:
    kind = node.get_type_name().removesuffix("Cell")
    step = _STEPS[kind](node)

    def lstm(x: Any, h: Any, c: Any, w: Any, r: Any, b: Any) -> Any:
        return step(x @ w.T, h, c, r, b)

    def other(x: Any, h: Any, w: Any, r: Any, b: Any) -> Any:
        return step(x @ w.T, h, None, r, b)[0]

    return lstm if kind == "LSTM" else other


@rule("LSTMSequence", "GRUSequence", "RNNSequence")
def _sequence(node: ov.Node) -> Function:
    kind = node.get_type_name().removesuffix("Sequence")
    step = _STEPS[kind](node)
    direction = str(node.get_attributes()["direction"])
    reversals = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]

    def run(x: Any, h0: Any, c0: Any, lengths: Any, weights: Sequence[Any]) -> Any:
        if not bool((lengths == x.shape[1]).all()):
            raise refuse(node, "sequences of different lengths")
        ends, states, cells = [], [], []
        for d, is_reverse in enumerate(reversals):
            w, r, b = (each[d] for each in weights)
            h, c = h0[:, d], None if c0 is None else c0[:, d]
            outputs = []
            gates = x @ w.T
            for t in reversed(range(x.shape[1])) if is_reverse else range(x.shape[1]):
                h, c = step(gates[:, t], h, c, r, b)
                outputs.append(h)
            ends.append(torch.stack(outputs[::-1] if is_reverse else outputs, 1))
            states.append(h)
            cells.append(c)
        y, last = torch.stack(ends, 1), torch.stack(states, 1)
        return (y, last) if c0 is None else (y, last, torch.stack(cells, 1))

    def lstm(x: Any, h: Any, c: Any, lengths: Any, w: Any, r: Any, b: Any) -> Any:
        return run(x, h, c, lengths, (w, r, b))

    def other(x: Any, h: Any, lengths: Any, w: Any, r: Any, b: Any) -> Any:
        return run(x, h, None, lengths, (w, r, b))

    return lstm if kind == "LSTM" else other
