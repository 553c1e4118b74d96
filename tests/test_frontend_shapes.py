from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

from vinoopt.errors import ShapeError
from vinoopt.frontend.normalize import load_model, require_static
from vinoopt.frontend.shapes import parse_shapes
from vinoopt.records import Device, TensorSpec

ANY = (0, 1 << 62)


def spec(name: str, rank: int) -> TensorSpec:
    return TensorSpec(name=name, shape=("?",) * rank, dtype="float32")


def model(tmp_path: Path, inputs: str, body: str = "y = Relu(x)") -> Path:
    path = tmp_path / "m.onnx"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (float[] y) {{ {body} }}'
    proto = parser.parse_model(text)
    path.write_bytes(proto.SerializeToString())
    return path


def test_benchmark_apps_spelling() -> None:
    inputs = (spec("images", 4), spec("mask", 2))
    assert parse_shapes("images[1,3,416,416],mask[1,?]", inputs) == {
        "images": ((1, 1), (3, 3), (416, 416), (416, 416)),
        "mask": ((1, 1), ANY),
    }
    assert parse_shapes(" mask [ -1 , 1..8 ] ", inputs) == {"mask": (ANY, (1, 8))}


def test_a_bare_shape_belongs_to_the_only_input() -> None:
    assert parse_shapes("[1,3,2..,..9]", (spec("x", 4),)) == {"x": ((1, 1), (3, 3), (2, 1 << 62), (0, 9))}
    with pytest.raises(ShapeError, match="say which input"):
        parse_shapes("[1]", (spec("a", 1), spec("b", 1)))


def test_a_scalar_has_an_empty_shape() -> None:
    assert parse_shapes("sr[],x[2]", (spec("x", 1), spec("sr", 0))) == {"sr": (), "x": ((2, 2),)}


@pytest.mark.parametrize("name", ["a,b", "x:0", "with space", "serving[0]", "é/ü", "a[1],b"])
def test_names_with_odd_characters(name: str) -> None:
    inputs = (spec(name, 2), spec("other", 1))
    assert parse_shapes(f"{name}[1,2],other[3]", inputs) == {name: ((1, 1), (2, 2)), "other": ((3, 3),)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("imges[1]", 'did you mean "images"'),
        ("images[1,3]", "has 4 dimensions, 2 are given"),
        ("images[1,3,a,4]", '"a" is no dimension'),
        ("images[1,3,8..1,4]", "wrong way round"),
        ("images[1,3,4,4],images[1,3,4,4]", "named twice"),
        ("images", "cannot read"),
        ("images[1,3", "cannot read"),
        ("", "empty"),
        ("images[]", "has 4 dimensions, 0 are given"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    with pytest.raises(ShapeError, match=said.replace("[", r"\[")):
        parse_shapes(text, (spec("images", 4),))


dims = st.one_of(
    st.just(("?", ANY)),
    st.just(("-1", ANY)),
    st.integers(0, 10_000).map(lambda n: (str(n), (n, n))),
    st.tuples(st.integers(0, 99), st.integers(100, 999)).map(lambda b: (f"{b[0]}..{b[1]}", b)),
)


@given(st.lists(st.lists(dims, max_size=5), min_size=1, max_size=4))
def test_what_is_written_is_what_is_read(shapes: list[list[tuple[str, tuple[int, int]]]]) -> None:
    inputs = tuple(spec(f"in_{i}", len(shape)) for i, shape in enumerate(shapes))
    text = ",".join(f"in_{i}[{','.join(word for word, _ in shape)}]" for i, shape in enumerate(shapes))
    assert parse_shapes(text, inputs) == {
        f"in_{i}": tuple(dim for _, dim in shape) for i, shape in enumerate(shapes)
    }


def test_shapes_are_applied(tmp_path: Path) -> None:
    source = load_model(model(tmp_path, "float[N,3,H,W] x"), shape="[1,3,8..16,32]")
    assert source.inputs[0].shape == (1, 3, "8..16", 32)
    assert source.outputs[0].shape == (1, 3, "8..16", 32)


def test_a_fixed_dimension_stays_where_any_is_asked_for(tmp_path: Path) -> None:
    source = load_model(model(tmp_path, "float[N,3] x"), shape="x[1..4,?]")
    assert source.inputs[0].shape == ("1..4", 3)


def test_a_contradiction_is_named(tmp_path: Path) -> None:
    path = model(tmp_path, "float[N,3,H,W] x")
    with pytest.raises(ShapeError, match='input "x": dimension 1 is 3 in the model and cannot become 4'):
        load_model(path, shape="x[1,4,8,8]")


def test_a_shape_that_the_graph_refuses_is_named(tmp_path: Path) -> None:
    path = model(tmp_path, "float[N] x, float[M] z", "y = Add(x, z)")
    with pytest.raises(ShapeError, match="the model does not work with it"):
        load_model(path, shape="x[3],z[4]")


def test_open_inputs_are_listed_with_an_example_that_works(tmp_path: Path) -> None:
    path = model(tmp_path, "float[N,3,32,W] x, float[B,8] mask", "y = Relu(x) m = Relu(mask)")
    source = load_model(path)
    with pytest.raises(ShapeError) as caught:
        require_static(source, Device.NPU)
    message = str(caught.value)
    assert (
        '"x" is open in dimensions 0 (?), 3 (?)' in message and '"mask" is open in dimension 0 (?)' in message
    )
    example = message.split('--shape "')[1].split('"')[0]
    require_static(load_model(path, shape=example), Device.NPU)


def test_bounds_are_kept_in_the_example(tmp_path: Path) -> None:
    path = model(tmp_path, "float[N,3] x")
    with pytest.raises(ShapeError, match=r'--shape "x\[4,3\]"'):
        require_static(load_model(path, shape="x[4..8,3]"), Device.GPU)
