"""Only complete results are kept, and journals survive a cut."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vinoopt.cli.doctor import command as doctor
from vinoopt.errors import InputError
from vinoopt.store import Store, cache_folder, runs_folder, trim


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open("model", {"seed": 1}, root=tmp_path)


def test_a_result_is_computed_once(store: Store) -> None:
    calls: list[int] = []
    for _ in range(2):
        assert store.json("table", lambda: calls.append(1) or {"a": [1.5, 2]}) == {"a": [1.5, 2]}
    assert len(calls) == 1


def test_arrays_are_computed_once_unless_they_are_too_large_to_keep(store: Store) -> None:
    calls: list[int] = []

    def compute() -> dict[str, np.ndarray[Any, Any]]:
        calls.append(1)
        return {"a b": np.arange(6.0).reshape(2, 3), "text": np.array("of what")}

    for most, expected in ((50, 1), (50, 2), (1000, 3), (1000, 3)):
        found = store.arrays("numbers", compute, most_bytes=most)
        np.testing.assert_array_equal(found["a b"], [[0, 1, 2], [3, 4, 5]])
        assert str(found["text"]) == "of what"
        assert len(calls) == expected
    path = store.folder / "numbers.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert str(store.arrays("numbers", compute, most_bytes=1000)["text"]) == "of what"
    assert len(calls) == 4, "what was cut off is made anew"


def test_a_failure_leaves_nothing_behind(store: Store) -> None:
    with pytest.raises(RuntimeError), store.writing("model.bin") as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert list(store.folder.iterdir()) == []


def test_a_key_that_differs_has_a_store_of_its_own(tmp_path: Path, store: Store) -> None:
    assert Store.open("model", {"seed": 2}, root=tmp_path).folder != store.folder
    assert Store.open("model", {"seed": 1}, root=tmp_path).folder == store.folder


def test_a_line_that_was_cut_off_is_dropped(store: Store) -> None:
    store.append("trials.jsonl", "one")
    store.append("trials.jsonl", "two\nwith a break")
    with (store.folder / "trials.jsonl").open("a") as journal:
        journal.write('{"cut')
    assert store.lines("trials.jsonl") == ["one", "two with a break"]
    store.clear("trials.jsonl")
    assert store.lines("trials.jsonl") == []


def test_a_line_after_one_that_was_cut_off_stays_whole(store: Store) -> None:
    store.append("tables.jsonl", '["a", 1]')
    with (store.folder / "tables.jsonl").open("ab") as journal:
        journal.write('["\N{MULTIPLICATION SIGN}'.encode()[:-1])
    assert store.lines("tables.jsonl") == ['["a", 1]']
    store.append("tables.jsonl", '["b", 2]')
    assert store.lines("tables.jsonl") == ['["a", 1]', '["b", 2]']
    assert store.memo("tables.jsonl").once("b", lambda: 9) == 2


def test_a_folder_that_cannot_be_made_is_told_with_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="VINOOPT_CACHE_DIR"):
        Store.open("key", root=tmp_path / "file")


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"


def test_a_memo_survives_the_process_and_never_computes_twice(store: Store) -> None:
    memo = store.memo("tables.jsonl")
    assert memo.once("a", lambda: 1.5) == 1.5
    assert memo.once("b", lambda: float("inf")) == float("inf")
    again = store.memo("tables.jsonl")
    assert again.once("a", lambda: 9.0) == 1.5
    assert again.once("b", lambda: 9.0) == float("inf")


DAY = 86400.0


def filled(root: Path, name: str, *, size: int, age_s: float) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"x" * size)
    when = time.time() - age_s
    os.utime(folder, (when, when))
    return folder


def test_runs_used_longest_ago_go_first_and_none_that_may_be_at_work(tmp_path: Path) -> None:
    oldest = filled(tmp_path, "a", size=1000, age_s=9 * DAY)
    older = filled(tmp_path, "b", size=1000, age_s=5 * DAY)
    old = filled(tmp_path, "c", size=1000, age_s=2 * DAY)
    fresh = filled(tmp_path, "d", size=1000, age_s=60)
    assert trim(tmp_path, limit=2500, now=time.time()) == 2000
    assert [each.exists() for each in (oldest, older, old, fresh)] == [False, False, True, True]
    assert trim(tmp_path, limit=0, now=time.time()) == 1000
    assert fresh.exists()


def test_opening_a_store_keeps_the_folder_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = filled(tmp_path, "a", size=2000, age_s=3 * DAY)
    Store.open("one", root=tmp_path)
    assert forgotten.exists()
    monkeypatch.setenv("VINOOPT_CACHE_GB", "0.000001")
    kept = Store.open("one", root=tmp_path)
    assert not forgotten.exists()
    assert kept.folder.exists()
    monkeypatch.setenv("VINOOPT_CACHE_GB", "lots")
    with pytest.raises(InputError, match="VINOOPT_CACHE_GB"):
        Store.open("one", root=tmp_path)


def test_doctor_clears_what_runs_have_kept_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path))
    filled(runs_folder(), "a", size=2_000_000, age_s=60)
    tools = filled(tmp_path, "npu-compiler", size=10, age_s=60)
    result = CliRunner().invoke(doctor, ["--clear-cache", "--json"])
    assert result.exit_code == 0
    assert "2.0 MB freed" in result.stderr
    assert not runs_folder().exists()
    assert tools.exists()
