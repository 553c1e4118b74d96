"""Children that answer many requests: one process while all goes well, another one after anything else."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vinoopt.errors import ToolchainCrashed, ToolchainMissing, ToolchainRefused, ToolchainTimeout
from vinoopt.toolchains import standing
from vinoopt.toolchains.process import run_child
from vinoopt.toolchains.standing import StandingChildren

WORKER = """
import os, time
from vinoopt.errors import ToolchainRefused
from vinoopt.toolchains.process import serve
def answer(request):
    if request.get("die"):
        os.abort()
    if request.get("refuse"):
        raise ToolchainRefused("no such operator")
    held = bytearray(b"x") * request.get("bytes", 0)
    time.sleep(request.get("sleep", 0))
    return {"pid": os.getpid(), "twice": 2 * request.get("x", 0), "flag": os.environ.get("FLAG")}
if __name__ == "__main__":
    serve(answer)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    return [sys.executable, str(script)]


@pytest.fixture
def stay() -> Iterator[StandingChildren]:
    kept = StandingChildren()
    yield kept
    kept.close()


def has_gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_one_child_answers_all_requests_of_an_environment(stay: StandingChildren, worker: list[str]) -> None:
    replies = [stay(worker, request={"x": x}, timeout_s=60).values for x in (1, 2, 3)]
    assert [reply["twice"] for reply in replies] == [2, 4, 6]
    assert len({reply["pid"] for reply in replies}) == 1
    other = stay(worker, request={}, timeout_s=60, env={"FLAG": "on"}).values
    assert (other["flag"], other["pid"] == replies[0]["pid"]) == ("on", False)


def test_answers_are_those_of_a_child_for_one_request(stay: StandingChildren, worker: list[str]) -> None:
    once = run_child(worker, request={"x": 4}, timeout_s=60).values
    again = stay(worker, request={"x": 4}, timeout_s=60).values
    assert {**once, "pid": 0} == {**again, "pid": 0}


def test_refusal_is_an_answer_and_the_child_stays(stay: StandingChildren, worker: list[str]) -> None:
    before = stay(worker, request={}, timeout_s=60).values["pid"]
    with pytest.raises(ToolchainRefused, match="no such operator"):
        stay(worker, request={"refuse": True}, timeout_s=60)
    assert stay(worker, request={}, timeout_s=60).values["pid"] == before


@pytest.mark.parametrize(
    ("request_", "error", "limit_s"),
    [({"die": True}, ToolchainCrashed, 60.0), ({"sleep": 60}, ToolchainTimeout, 0.3)],
    ids=["crash", "late"],
)
def test_child_that_fails_is_ended_and_replaced(
    stay: StandingChildren, worker: list[str], request_: dict, error: type, limit_s: float
) -> None:
    before = stay(worker, request={}, timeout_s=60).values["pid"]
    with pytest.raises(error, match="says nothing about the model"):
        stay(worker, request=request_, timeout_s=limit_s)
    assert has_gone(before)
    assert stay(worker, request={"x": 5}, timeout_s=60).values["twice"] == 10


def test_child_that_takes_too_much_memory_is_ended(stay: StandingChildren, worker: list[str]) -> None:
    before = stay(worker, request={}, timeout_s=60).values["pid"]
    greedy = {"bytes": 400 << 20, "sleep": 60}
    with pytest.raises(ToolchainCrashed, match="above its memory limit of 300 MiB"):
        stay(worker, request=greedy, timeout_s=50, memory_limit_bytes=300 << 20)
    assert has_gone(before)


def test_child_is_replaced_after_so_many_answers(
    stay: StandingChildren, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "MOST_ANSWERS", 2)
    pids = [stay(worker, request={}, timeout_s=60).values["pid"] for _ in range(3)]
    assert pids[0] == pids[1] != pids[2]


def test_child_does_not_outlive_what_started_it(worker: list[str]) -> None:
    kept = StandingChildren()
    pid = kept(worker, request={}, timeout_s=60).values["pid"]
    del kept
    gc.collect()
    assert has_gone(pid)


def test_program_that_does_not_exist_is_missing(stay: StandingChildren) -> None:
    for _ in range(2):
        with pytest.raises(ToolchainMissing, match="could not be started"):
            stay(["/no/such/program"], request={}, timeout_s=60)
