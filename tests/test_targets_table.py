"""The table's script without its compilers: lines that are kept, tried again and shown, and what a verdict covers."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from vinoopt.records import Target

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "table_targets.py"
OLD = {"model": "m", "target": "skylake:CPU", "verdict": "compiled", "float_ms": 1.6, "int8_ms": 0.8}
"""As an earlier version wrote it: without most of today's fields, with one that is gone."""


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table_targets", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["table_targets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_old_lines_are_read_and_the_last_one_counts(table: ModuleType, tmp_path: Path) -> None:
    again = {**OLD, "verdict": "not checked", "evidence": "emulated"}
    output = written(tmp_path / "out.jsonl", {**OLD, "gone": 1}, {**OLD, "target": "lunar-lake:NPU"}, again)
    found = [(line.target, line.verdict) for line in table.kept(output)]
    assert found == [("skylake:CPU", "not checked"), ("lunar-lake:NPU", "compiled")]
    assert all(len(list(table.row(line))) == len(table.COLUMNS) for line in table.kept(output))


def test_only_what_was_not_checked_is_tried_again(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["skylake:CPU", "skylake:GPU", "lunar-lake:NPU"]
    verdicts = ["compiled", "not checked", "refused"]
    lines = [{**OLD, "target": t, "verdict": v} for t, v in zip(targets, verdicts, strict=True)]
    options = Namespace(
        output=written(tmp_path / "out.jsonl", *lines), folder=tmp_path, shape=[], dimension=8
    )
    monkeypatch.setattr(table, "Subject", lambda path, **words: None)
    monkeypatch.setattr(
        table, "judged", lambda name, subject, target: table.Line(model=name, target=str(target), verdict="x")
    )
    made = table.lines_of([tmp_path / "m.onnx"], [Target.parse(each) for each in targets], options)
    assert [line.target for line in made] == ["skylake:GPU"]


@pytest.mark.parametrize(
    ("evidence", "bound", "shown"),
    [("emulated", False, "1.6 here"), ("modelled", False, "~1.6"), ("modelled", True, ">~1.6")],
)
def test_a_time_says_whose_it_is(table: ModuleType, evidence: str, bound: bool, shown: str) -> None:
    line = table.Line(**OLD, evidence=evidence, is_lower_bound=bound)
    cells = dict(zip(table.COLUMNS, table.row(line), strict=True))
    assert (cells["evidence"], cells["float ms"], cells["x"]) == (evidence, shown, "2.00")


def test_every_generation_has_one_target(table: ModuleType) -> None:
    targets = [str(target) for target in table.every_target()]
    assert len(targets) == len(set(targets)) > 15
    assert "alder-lake:GPU" in targets
    assert "raptor-lake:GPU" not in targets  # the same graphics under another number


def test_shapes_that_depend_on_data_leave_the_verdict_of_the_compiler(
    table: ModuleType, tmp_path: Path
) -> None:
    picture = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])
    places = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("NonZero", ["positive"], ["found"]),
        helper.make_node("Cast", ["found"], ["y"], to=TensorProto.FLOAT),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "open", [picture], [places]), opset_imports=[helper.make_opsetid("", 13)]
    )
    onnx.save(model, tmp_path / "open.onnx")
    subject = table.Subject(tmp_path / "open.onnx", dimension=8, shape=None)
    line = table.judged("open", subject, Target.parse("alder-lake:GPU"))
    assert line.verdict != "refused"
    assert "fixed shapes" in line.why
    assert (line.float_ms, line.evidence) == (None, "")
