"""Only complete results are kept, and journals survive a cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from vinoopt.errors import InputError
from vinoopt.store import Store, cache_folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open("model", {"seed": 1}, root=tmp_path)


def test_a_result_is_computed_once(store: Store) -> None:
    calls: list[int] = []
    for _ in range(2):
        assert store.json("table", lambda: calls.append(1) or {"a": [1.5, 2]}) == {"a": [1.5, 2]}
    assert len(calls) == 1


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
