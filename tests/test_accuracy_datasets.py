"""Datasets: one contract for every source, errors that say what next, splits that share nothing."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vinoopt.accuracy.datasets import Dataset, from_arrays, load_dataset, split
from vinoopt.accuracy.labels import BoxLabels
from vinoopt.accuracy.metrics import TopK
from vinoopt.errors import DataError
from vinoopt.records import PreprocessSpec, TensorSpec

COUNT = 12
X = TensorSpec(name="x", shape=(1, 3, 8, 8), dtype="float32")
IMAGE = TensorSpec(name="image", shape=(1, 8, 8, 3), dtype="uint8", layout="NHWC")
TOKENS = (
    TensorSpec(name="ids", shape=("?", 6), dtype="int64"),
    TensorSpec(name="mask", shape=("?", 6), dtype="int64"),
)
RECURRENT = (
    TensorSpec(name="frame", shape=(1, 1, 16), dtype="float32"),
    TensorSpec(name="state", shape=(2, 1, 4), dtype="float32"),
    TensorSpec(name="rate", shape=(), dtype="int64"),
)
BATCHED = TensorSpec(name="x", shape=(4, 5), dtype="float32")


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def write_images(folder: Path, count: int = COUNT, size: tuple[int, int] = (16, 10)) -> Path:
    """Images of width x height, each of one colour that tells its number."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (10 * number, 200, 30)).save(folder / f"im{number:02}.png")
    return folder


# --------------------------------------------------------------------------- the contract


def npz_of_rows(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    np.savez(folder / "d.npz", x=floats(COUNT, 3, 8, 8), labels=np.arange(COUNT) % 3)
    return load_dataset(str(folder / "d.npz"), inputs=[X], labels="labels"), (X,)


def npz_of_calls(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    np.savez(folder / "d.npz", x=floats(COUNT, 1, 3, 8, 8), labels=np.arange(COUNT) % 3)
    return load_dataset(str(folder / "d.npz"), inputs=[X]), (X,)


def npy_file(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    np.save(folder / "d.npy", floats(COUNT, 3, 8, 8))
    np.save(folder / "l.npy", np.arange(COUNT, dtype=np.uint8))
    return load_dataset(str(folder / "d.npy"), inputs=[X], labels=str(folder / "l.npy")), (X,)


def folder_of_npz(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    for number in range(COUNT):
        np.savez(folder / f"s{number:02}.npz", ids=np.full((1, 6), number), mask=np.ones((1, 6), np.int32))
    return load_dataset(str(folder), inputs=TOKENS), TOKENS


def folder_of_npy(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    for number in range(COUNT):
        np.save(folder / f"s{number:02}.npy", floats(3, 8, 8) + number)
    return load_dataset(str(folder), inputs=[X]), (X,)


def folder_of_images(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    write_images(folder)
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"im{i:02}.png,{i}\n" for i in range(COUNT)))
    return load_dataset(str(folder), inputs=[IMAGE], labels=str(folder / "labels.csv")), (IMAGE,)


def batched_rows(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    return from_arrays({"x": floats(4 * COUNT + 1, 5)}, inputs=[BATCHED], labels=np.arange(4 * COUNT + 1)), (
        BATCHED,
    )


def recurrent(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    data = {"frame": floats(COUNT, 1, 16), "state": floats(COUNT, 2, 1, 4), "rate": np.array(16000)}
    return from_arrays(data, inputs=RECURRENT), RECURRENT


def list_of_samples(folder: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    samples = [{"ids": np.full(6, i), "mask": np.ones(6, np.int64)} for i in range(COUNT)]
    return from_arrays(samples, inputs=TOKENS, labels=list(range(COUNT))), TOKENS


SOURCES: tuple[Callable[[Path], tuple[Dataset, tuple[TensorSpec, ...]]], ...] = (
    npz_of_rows,
    npz_of_calls,
    npy_file,
    folder_of_npz,
    folder_of_npy,
    folder_of_images,
    batched_rows,
    recurrent,
    list_of_samples,
)


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Dataset, tuple[TensorSpec, ...]]:
    return request.param(tmp_path)


def test_every_item_is_one_call_of_the_model(source: tuple[Dataset, tuple[TensorSpec, ...]]) -> None:
    dataset, inputs = source
    assert len(dataset) == COUNT
    for sample in dataset:
        assert list(sample) == [spec.name for spec in inputs]
        for spec in inputs:
            values = sample[spec.name]
            wanted = tuple(1 if size == "?" else size for size in spec.shape)
            assert values.shape == wanted
            assert values.dtype == spec.dtype
            assert values.flags.c_contiguous


def test_items_come_out_the_same_each_time(source: tuple[Dataset, tuple[TensorSpec, ...]]) -> None:
    dataset, _ = source
    for name, values in dataset[3].items():
        np.testing.assert_array_equal(values, dataset[3][name])
        np.testing.assert_array_equal(values, dataset[3 - COUNT][name])
    with pytest.raises(IndexError):
        dataset[COUNT]


def test_a_subset_takes_labels_along(source: tuple[Dataset, tuple[TensorSpec, ...]]) -> None:
    dataset, inputs = source
    part = dataset.subset([5, 2, 9]).subset([2, 0])
    assert len(part) == 2
    for place, origin in enumerate((9, 5)):
        np.testing.assert_array_equal(part[place][inputs[0].name], dataset[origin][inputs[0].name])
        if dataset.labels is not None:
            assert part.labels is not None
            np.testing.assert_array_equal(part.labels[place], dataset.labels[origin])


def test_it_says_what_it_is(source: tuple[Dataset, tuple[TensorSpec, ...]]) -> None:
    dataset, _ = source
    assert f"{dataset.samples} samples" in dataset.describe()
    assert ("without labels" in dataset.describe()) == (dataset.labels is None)


# --------------------------------------------------------------------------- arrays


def test_a_static_batch_is_cut_and_the_rest_left_out(tmp_path: Path) -> None:
    dataset, _ = batched_rows(tmp_path)
    assert (len(dataset), dataset.batch, dataset.samples) == (COUNT, 4, 4 * COUNT)
    assert dataset.labels[2].tolist() == [8, 9, 10, 11]
    assert any("last 1 rows" in message for message in dataset.messages)


def test_a_single_array_may_have_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pictures=floats(COUNT, 3, 8, 8), label=np.arange(COUNT))
    dataset = load_dataset(str(tmp_path / "d.npz"), inputs=[X])
    assert list(dataset[0]) == ["x"]
    assert dataset.labels is not None
    assert any('"label"' in message for message in dataset.messages)


def test_arrays_that_no_input_takes_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=floats(COUNT, 3, 8, 8), notes=np.arange(COUNT))
    dataset = load_dataset(str(tmp_path / "d.npz"), inputs=[X])
    assert any("left out: notes" in message for message in dataset.messages)


def test_a_file_is_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", floats(COUNT, 3, 8, 8))
    dataset = load_dataset(str(tmp_path / "d.npy"), inputs=[X])
    assert isinstance(dataset.reader.feeds[0].array, np.memmap)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.arange(60, dtype=np.int32).reshape(COUNT, 5), "int64"),
        (np.arange(60, dtype=np.int64).reshape(COUNT, 5), "int32"),
        (np.linspace(0, 1, 60).reshape(COUNT, 5), "float32"),
        (np.arange(60, dtype=np.uint8).reshape(COUNT, 5), "float32"),
        (np.linspace(0, 1, 60).astype(np.float32).reshape(COUNT, 5), "float16"),
        (np.ones((COUNT, 5), dtype=bool), "int64"),
    ],
)
def test_casts_that_lose_nothing_are_made_and_told(values: np.ndarray, dtype: str) -> None:
    dataset = from_arrays(values, inputs=[TensorSpec(name="x", shape=("?", 5), dtype=dtype)])
    np.testing.assert_array_equal(dataset[3]["x"], values[3:4].astype(dtype))
    assert any(dtype in message for message in dataset.messages)


def bad_cell(value: float) -> np.ndarray:
    values = floats(COUNT, 3, 8, 8)
    values[7, 1, 2, 3] = value
    return values


@pytest.mark.parametrize(
    ("values", "spec", "words"),
    [
        (floats(5, 3, 8, 8), X, "5 samples is too little"),
        (floats(COUNT, 3, 9, 8), X, r"shape \[12, 3, 9, 8\] holds no calls of \[1, 3, 8, 8\]"),
        (floats(COUNT, 8, 8, 3), X, "look like NHWC images for an NCHW input"),
        (floats(COUNT, 8, 8), X, "an axis is missing"),
        (bad_cell(np.nan), X, "sample 7: holds NaN"),
        (bad_cell(np.inf), X, "sample 7: holds infinite"),
        (np.full((COUNT, 8, 8, 3), 0.5), IMAGE, "feed images as stored"),
        (np.full((COUNT, 8, 8, 3), 300), IMAGE, "values from 300 to 300"),
        (np.full((COUNT, 6), 2**40), TensorSpec(name="x", shape=("?", 6), dtype="int32"), "do not fit"),
        (np.full((COUNT, 6), 2**24 + 1), TensorSpec(name="x", shape=("?", 6), dtype="float32"), "do not fit"),
        (np.full((COUNT, 6), 1e9), TensorSpec(name="x", shape=("?", 6), dtype="float16"), "infinite"),
        (np.full((COUNT, 6), "a"), TensorSpec(name="x", shape=("?", 6), dtype="int32"), "store numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(values: np.ndarray, spec: TensorSpec, words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_arrays(values, inputs=[spec])


def test_bounds_are_kept() -> None:
    spec = TensorSpec(name="x", shape=("?", "4..8"), dtype="float32")
    assert len(from_arrays(floats(COUNT, 8), inputs=[spec])) == COUNT
    with pytest.raises(DataError, match="holds no calls"):
        from_arrays(floats(COUNT, 9), inputs=[spec])


def test_a_missing_input_is_named_with_the_nearest(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", idz=np.zeros((COUNT, 6), np.int64), mask=np.ones((COUNT, 6), np.int64))
    with pytest.raises(DataError, match=r'nothing for input "ids".*did you mean "idz"'):
        load_dataset(str(tmp_path / "d.npz"), inputs=TOKENS)


def test_inputs_must_agree_about_the_number_of_calls() -> None:
    data = {"ids": np.zeros((COUNT, 6), np.int64), "mask": np.ones((COUNT + 1, 6), np.int64)}
    with pytest.raises(DataError, match='"ids" 12, "mask" 13'):
        from_arrays(data, inputs=TOKENS)


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
def test_pickled_objects_are_never_loaded(tmp_path: Path, name: str) -> None:
    objects = np.array([{"a": 1}] * COUNT, dtype=object)
    (np.savez if name.endswith("z") else np.save)(tmp_path / name, objects)
    with pytest.raises(DataError, match="pickled objects can run code"):
        load_dataset(str(tmp_path / name), inputs=[X])


def test_what_is_no_numpy_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(str(tmp_path / "d.npz"), inputs=[X])
    with pytest.raises(DataError, match="no such file"):
        load_dataset(str(tmp_path / "absent.npz"), inputs=[X])
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"data is a \.npz"):
        load_dataset(str(tmp_path / "d.csv"), inputs=[X])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load_dataset(str(tmp_path / "empty"), inputs=[X])


# --------------------------------------------------------------------------- labels


def test_labels_are_one_per_sample() -> None:
    with pytest.raises(DataError, match="11 labels for 12 samples"):
        from_arrays(floats(COUNT, 3, 8, 8), inputs=[X], labels=np.arange(COUNT - 1))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.linspace(0, 1, COUNT), "not whole numbers"),
        (["cat"] * COUNT, "of another kind"),
        (np.arange(COUNT) - 1, "label -1 is negative"),
        (np.full(COUNT, np.nan), "not whole numbers"),
        (np.zeros((COUNT, 3), np.int64), "of another kind"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused_by_whoever_needs_classes(labels: object, words: str) -> None:
    dataset = from_arrays(floats(COUNT, 3, 8, 8), inputs=[X], labels=labels)
    with pytest.raises(DataError, match=words):
        TopK(k=1, output="y").check_labels(dataset.labels)


@pytest.mark.parametrize(
    "labels",
    [
        np.linspace(0, 1, COUNT),  # what a regression aims at
        np.tile([3, -100], (COUNT, 4)),  # tokens, some of which are ignored
        np.eye(COUNT, 5),  # several classes at once
        [f"said {i}" for i in range(COUNT)],
    ],
    ids=["targets", "tokens", "several classes", "words"],
)
def test_labels_of_metrics_of_ones_own_come_as_they_were_given(labels: Any) -> None:
    dataset = from_arrays(floats(COUNT, 3, 8, 8), inputs=[X], labels=labels)
    assert dataset.labels is not None and len(dataset.labels) == COUNT
    for got, wanted in zip(dataset.labels, labels, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "labels", [np.arange(COUNT, dtype=np.float32), np.arange(COUNT)[:, None], range(COUNT)]
)
def test_whole_numbers_of_any_type_are_labels(labels: object) -> None:
    assert from_arrays(floats(COUNT, 3, 8, 8), inputs=[X], labels=labels).labels.tolist() == list(
        range(COUNT)
    )


def test_labels_of_another_kind_stay_as_they_are() -> None:
    masks = [np.full((2, 2), i) for i in range(COUNT)]
    dataset = from_arrays(floats(COUNT, 3, 8, 8), inputs=[X], labels=masks)
    np.testing.assert_array_equal(dataset.labels[4], masks[4])


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("stem_only", [True, False])
def test_csv_labels_follow_file_names(tmp_path: Path, header: bool, stem_only: bool) -> None:
    write_images(tmp_path / "images")
    rows = [(f"im{i:02}" + ("" if stem_only else ".png"), i) for i in reversed(range(COUNT))]
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label")] * header + rows)
    dataset = load_dataset(str(tmp_path / "images"), inputs=[IMAGE], labels=str(tmp_path / "labels.csv"))
    assert dataset.labels.tolist() == list(range(COUNT))


def test_csv_labels_go_by_row_for_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=floats(COUNT, 3, 8, 8))
    (tmp_path / "l.csv").write_text("label\n" + "\n".join(str(i) for i in range(COUNT)))
    dataset = load_dataset(str(tmp_path / "d.npz"), inputs=[X], labels=str(tmp_path / "l.csv"))
    assert dataset.labels.tolist() == list(range(COUNT))


def test_labels_that_are_not_found_are_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (tmp_path / "l.csv").write_text("".join(f"im{i:02}.png,{i}\n" for i in range(COUNT - 1)))
    with pytest.raises(DataError, match=r'no label for "im11\.png"'):
        load_dataset(str(images), inputs=[IMAGE], labels=str(tmp_path / "l.csv"))
    (tmp_path / "l.csv").write_text("im00.png,1\nim01.png,cat\n")
    with pytest.raises(DataError, match='label 1 is "cat"'):
        load_dataset(str(images), inputs=[IMAGE], labels=str(tmp_path / "l.csv"))
    with pytest.raises(DataError, match="no such labels file"):
        load_dataset(str(images), inputs=[IMAGE], labels=str(tmp_path / "absent.csv"))
    np.savez(tmp_path / "d.npz", x=floats(COUNT, 3, 8, 8))
    with pytest.raises(DataError, match="neither an array"):
        load_dataset(str(tmp_path / "d.npz"), inputs=[X], labels="y")


# --------------------------------------------------------------------------- images


def test_images_are_rgb_in_the_wanted_layout(tmp_path: Path) -> None:
    write_images(tmp_path)
    nchw = TensorSpec(name="image", shape=(1, 3, 8, 8), dtype="uint8")
    rows = load_dataset(str(tmp_path), inputs=[IMAGE])[5]["image"]
    planes = load_dataset(str(tmp_path), inputs=[nchw])[5]["image"]
    assert rows[0, 4, 4].tolist() == [50, 200, 30]
    np.testing.assert_array_equal(planes, rows.transpose(0, 3, 1, 2))


def test_floats_without_preprocessing_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(DataError, match="give --mean and --scale"):
        load_dataset(str(tmp_path), inputs=[X])
    fed = load_dataset(str(tmp_path), inputs=[X], preprocess=[PreprocessSpec()])[5]["x"]
    assert fed.dtype == np.float32
    assert fed[0, :, 4, 4].tolist() == [50, 200, 30]


def left_half_red(folder: Path, size: tuple[int, int]) -> Path:
    folder.mkdir(exist_ok=True)
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    for number in range(10):
        image.save(folder / f"{number}.png")
    return folder


def test_fits_place_the_image(tmp_path: Path) -> None:
    left_half_red(tmp_path, (32, 16))

    def fed(fit: str) -> np.ndarray:
        spec = PreprocessSpec(fit=fit, pad_value=114)
        return load_dataset(str(tmp_path), inputs=[IMAGE], preprocess=[spec])[0]["image"][0]

    assert fed("squash")[:, 0].tolist() == [[255, 0, 0]] * 8
    assert fed("crop")[7, 7].tolist() == [0, 0, 255]
    assert fed("letterbox")[0, 0].tolist() == [255, 0, 0]
    assert fed("letterbox")[3, 7].tolist() == [0, 0, 255]
    assert (fed("letterbox")[4:] == 114).all()


@given(
    original=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    fed=st.tuples(st.integers(1, 640), st.integers(1, 640)),
)
@settings(max_examples=200, deadline=None)
def test_placements_keep_to_their_fit(original: tuple[int, int], fed: tuple[int, int]) -> None:
    from vinoopt.accuracy.images import FITS

    squash, crop, letterbox = (FITS[fit](original, fed) for fit in ("squash", "crop", "letterbox"))
    assert squash.resized == fed
    assert all(size >= limit for size, limit in zip(crop.resized, fed, strict=True))
    assert all(offset <= 0 for offset in crop.offset)
    assert all(size <= limit for size, limit in zip(letterbox.resized, fed, strict=True))
    assert letterbox.resized[0] == fed[0] or letterbox.resized[1] == fed[1]


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(10):
        image.save(tmp_path / f"{number}.jpg", exif=exif, quality=100, subsampling=0)
    fed = load_dataset(str(tmp_path), inputs=[IMAGE], preprocess=[PreprocessSpec(fit="squash")])[0]["image"][
        0
    ]
    assert fed[0, 4, 0] > 200
    assert fed[7, 4, 2] > 200


def test_images_that_cannot_be_read_end_it_at_the_start(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "im03.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"im03\.png: not an image"):
        load_dataset(str(tmp_path), inputs=[IMAGE])


def test_an_open_size_must_be_given(tmp_path: Path) -> None:
    write_images(tmp_path)
    spec = TensorSpec(name="image", shape=(1, "?", "?", 3), dtype="uint8", layout="NHWC")
    with pytest.raises(DataError, match="--image-size"):
        load_dataset(str(tmp_path), inputs=[spec])
    sized = load_dataset(str(tmp_path), inputs=[spec], preprocess=[PreprocessSpec(image_size=(6, 4))])
    assert sized[0]["image"].shape == (1, 6, 4, 3)


def test_boxes_are_placed_like_their_image(tmp_path: Path) -> None:
    images = left_half_red(tmp_path / "images", (32, 16))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("7 0.25 0.5 0.5 1.0\n")
    boxes = {
        fit: load_dataset(
            str(images), inputs=[IMAGE], labels=str(tmp_path / "labels"), preprocess=[PreprocessSpec(fit=fit)]
        ).labels
        for fit in ("squash", "letterbox", "crop")
    }
    assert isinstance(boxes["squash"][0], BoxLabels)
    assert boxes["squash"][0].boxes.tolist() == [[0, 0, 4, 8]]
    assert boxes["letterbox"][0].boxes.tolist() == [[0, 0, 4, 4]]
    assert boxes["crop"][0].boxes.tolist() == [[0, 0, 4, 8]]
    assert boxes["squash"][0].classes.tolist() == [7]
    assert len(boxes["squash"][1].boxes) == 0


@pytest.mark.parametrize("line", ["1 0.5 0.5 0.2", "1 0.5 0.5 a 0.1", "0.5 0.5 0.5 0.1 0.1", "1 50 50 20 20"])
def test_boxes_that_are_malformed_are_named(tmp_path: Path, line: str) -> None:
    images = write_images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "im00.txt").write_text(line)
    with pytest.raises(DataError, match=re.escape("im00.txt, line 1")):
        load_dataset(str(images), inputs=[IMAGE], labels=str(tmp_path / "labels"))


# --------------------------------------------------------------------------- code


def test_code_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_calibration.py").write_text(
        "import numpy as np\ndef data():\n    return {'x': np.ones((12, 3, 8, 8), np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="--allow-code"):
        load_dataset("my_calibration:data", inputs=[X])
    assert len(load_dataset("my_calibration:data", inputs=[X], allow_code=True)) == 12
    with pytest.raises(DataError, match="cannot be imported"):
        load_dataset("my_calibration:absent", inputs=[X], allow_code=True)


# --------------------------------------------------------------------------- splits

NUMBER = TensorSpec(name="x", shape=("?", 1), dtype="int64")


def numbers(count: int) -> Dataset:
    return from_arrays(np.arange(count)[:, None], inputs=[NUMBER], labels=np.arange(count))


def held(dataset: Dataset) -> set[int]:
    return {int(sample["x"][0, 0]) for sample in dataset}


@given(count=st.integers(10, 400), subset_size=st.integers(1, 500), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_one_pool_is_shared_out_whole_and_apart(count: int, subset_size: int, seed: int) -> None:
    parts = split(numbers(count), subset_size=subset_size, seed=seed)
    sets = [held(part) for part in (parts.calibration, parts.search, parts.test)]
    assert all(sets)
    assert sum(map(len, sets)) == count
    assert set().union(*sets) == set(range(count))
    assert len(sets[0]) <= max(1, min(subset_size, 0.3 * count))
    assert abs(len(sets[2]) - 0.4 * count) <= 1
    for part in (parts.calibration, parts.search, parts.test):
        assert [int(sample["x"][0, 0]) for sample in part] == part.labels.tolist()


def test_splits_repeat_with_their_seed() -> None:
    data = numbers(100)
    assert held(split(data, subset_size=300, seed=1).test) == held(split(data, subset_size=300, seed=1).test)
    assert held(split(data, subset_size=300, seed=1).test) != held(split(data, subset_size=300, seed=2).test)


def test_parts_that_are_given_are_taken_whole() -> None:
    pool, given_set = numbers(100), numbers(20)
    parts = split(pool, subset_size=300, seed=0, calibration=given_set)
    assert parts.calibration is given_set
    assert parts.sizes == {"calibration": 20, "search": 40, "test": 60}
    parts = split(pool, subset_size=30, seed=0, test=given_set)
    assert parts.sizes == {"calibration": 30, "search": 70, "test": 20}
    parts = split(pool, subset_size=30, seed=0, calibration=given_set, test=given_set)
    assert parts.sizes == {"calibration": 20, "search": 100, "test": 20}


def test_a_small_pool_is_told_to_be_small() -> None:
    parts = split(numbers(10), subset_size=300, seed=0)
    assert parts.sizes == {"calibration": 3, "search": 3, "test": 4}
    assert "so few samples" in parts.describe()
    with pytest.raises(DataError, match="cannot be split"):
        split(numbers(10).subset([0, 1]), subset_size=300, seed=0)


# --------------------------------------------------------------------------- real data


def test_real_images_and_labels(shared: Path) -> None:
    root = shared / "data" / "imagenet_val"
    spec = TensorSpec(name="image", shape=(1, 224, 224, 3), dtype="uint8", layout="NHWC")
    dataset = load_dataset(str(root), inputs=[spec], labels=str(root / "labels.csv"))
    table = dict(csv.reader((root / "labels.csv").read_text().splitlines()))
    for index in (0, 300, 676):
        assert dataset.labels[index] == int(table[dataset.reader.files[index].name])
        assert dataset[index]["image"].shape == (1, 224, 224, 3)
