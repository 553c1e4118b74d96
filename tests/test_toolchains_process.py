"""Child processes: what counts as an answer, and what every other ending becomes."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from vinoopt.errors import (
    ToolchainCrashed,
    ToolchainMissing,
    ToolchainRefused,
    ToolchainTimeout,
)
from vinoopt.records import Device, Target
from vinoopt.toolchains import process
from vinoopt.toolchains.process import child_folder, run_child, run_process

REPLYING = """
from vinoopt.toolchains.process import serve
def answer(request):
    {body}
if __name__ == "__main__":
    serve(answer)
"""


@pytest.fixture
def child(tmp_path: Path):
    """Writes a child program and returns the argv that runs it."""

    def write(source: str) -> list[str]:
        script = tmp_path / "child.py"
        script.write_text(source, encoding="utf-8")
        return [sys.executable, str(script)]

    return write


def replying(body: str) -> str:
    return REPLYING.format(body=body)


def test_child_answers_with_its_values_and_sees_request_and_environment(child):
    body = 'import os; return {"double": 2 * request["x"], "flag": os.environ["FLAG"], "path": request["p"]}'
    reply = run_child(
        child(replying(body)), request={"x": 21, "p": Path("a.xml")}, timeout_s=60, env={"FLAG": "on"}
    )
    assert reply.values == {"double": 42, "flag": "on", "path": "a.xml"}
    assert reply.exit.returncode == 0


def test_request_may_be_a_record(child):
    reply = run_child(
        child(replying("return request")),
        request=Target(profile="lunar-lake", device=Device.NPU),
        timeout_s=60,
    )
    assert reply.values == {"profile": "lunar-lake", "device": "NPU"}


def test_environment_variable_is_removed_by_none(child, monkeypatch):
    monkeypatch.setenv("VINOOPT_TEST_FLAG", "inherited")
    body = 'import os; return {"flag": os.environ.get("VINOOPT_TEST_FLAG")}'
    command = child(replying(body))
    assert run_child(command, request={}, timeout_s=60).values == {"flag": "inherited"}
    reply = run_child(command, request={}, timeout_s=60, env={"VINOOPT_TEST_FLAG": None})
    assert reply.values == {"flag": None}


def test_module_runs_by_name():
    # `json.tool` reads standard input, which is empty: it ends without a reply.
    with pytest.raises(ToolchainCrashed, match=r"json\.tool ended with exit code"):
        run_child("json.tool", request={}, timeout_s=60)


def test_collected_files_outlive_the_folder(child, tmp_path):
    body = 'import os; open("out.bin", "wb").write(b"blob"); return {"cwd": os.getcwd()}'
    kept = tmp_path / "kept.bin"
    reply = run_child(child(replying(body)), request={}, timeout_s=60, collect={"out.bin": kept})
    assert kept.read_bytes() == b"blob"
    assert not Path(reply.values["cwd"]).exists()


def test_missing_collected_file_is_a_crash(child, tmp_path):
    with pytest.raises(ToolchainCrashed, match=r"did not write out\.bin"):
        run_child(
            child(replying("return {}")),
            request={},
            timeout_s=60,
            collect={"out.bin": tmp_path / "kept.bin"},
        )
    assert not (tmp_path / "kept.bin").exists()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("ToolchainMissing", ToolchainMissing),
        ("ToolchainRefused", ToolchainRefused),
        ("ToolchainCrashed", ToolchainCrashed),
        ("ModelError", ToolchainRefused),
    ],
)
def test_errors_of_our_tree_cross_the_process_border(child, raised, expected):
    body = f'from vinoopt import errors; raise errors.{raised}("Inverse is not supported")'
    with pytest.raises(expected, match="Inverse is not supported"):
        run_child(child(replying(body)), request={}, timeout_s=60)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGFPE", "SIGABRT", "SIGSEGV"])
def test_signal_is_a_crash_that_names_it(child, name):
    source = (
        "import os, signal, sys\n"
        "print('before', file=sys.stderr, flush=True)\n"
        f"os.kill(os.getpid(), signal.{name})\n"
    )
    with pytest.raises(ToolchainCrashed, match=rf"(?s){name} and no answer.*before"):
        run_child(child(source), request={}, timeout_s=60)


def test_exit_code_zero_without_reply_is_a_crash(child):
    with pytest.raises(ToolchainCrashed, match="exit code 0 and no answer"):
        run_child(child("print('all fine')"), request={}, timeout_s=60)


def test_reply_counts_whatever_the_exit_code(child):
    body = 'import atexit, os; atexit.register(lambda: os._exit(9)); return {"x": 1}'
    reply = run_child(child(replying(body)), request={}, timeout_s=60)
    assert reply.values == {"x": 1}
    assert reply.exit.returncode == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not JSON"),
        ("\\xff\\xfe", "not JSON|protocol"),
        ("[1, 2]", "not of protocol 1"),
        ('{"v": 2, "ok": true}', "not of protocol 1"),
        ('{"v": 1}', "not of protocol 1"),
    ],
)
def test_garbage_reply_is_a_crash(child, content, message):
    source = f"open('reply.json', 'wb').write({content!r}.encode('latin-1'))"
    with pytest.raises(ToolchainCrashed, match=message):
        run_child(child(source), request={}, timeout_s=60)


def test_refusal_without_words_still_has_a_message(child):
    source = "print('reason on stdout'); open('reply.json', 'w').write('{\"v\": 1, \"ok\": false}')"
    with pytest.raises(ToolchainRefused, match="reason on stdout"):
        run_child(child(source), request={}, timeout_s=60)


def test_full_standard_error_does_not_block(child):
    # A pipe would stop the child at 64 KiB.
    body = 'import sys; sys.stderr.write("x" * 5_000_000 + "last line"); return {}'
    reply = run_child(child(replying(body)), request={}, timeout_s=60)
    assert reply.exit.stderr.endswith("last line")
    assert len(reply.exit.stderr) <= process.TAIL_BYTES


def test_time_limit_kills_the_child_and_its_children(child, tmp_path):
    pids = tmp_path / "pids"
    source = (
        "import os, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}')\n"
        "print('stuck here', flush=True); time.sleep(600)\n"
    )
    started = time.monotonic()
    with pytest.raises(ToolchainTimeout, match=r"(?s)did not end within 3 s.*stuck here"):
        run_child(child(source), request={}, timeout_s=3)
    assert time.monotonic() - started < 30
    for pid in map(int, pids.read_text().split()):
        assert_gone(pid)


def test_memory_limit_ends_the_child(child):
    body = "block = bytearray(400 << 20); import time; time.sleep(600)"
    with pytest.raises(ToolchainCrashed, match="above its memory limit of 200 MiB"):
        run_child(child(replying(body)), request={}, timeout_s=120, memory_limit_bytes=200 << 20)


def test_peak_memory_is_reported(child):
    body = "block = bytearray(200 << 20); import time; time.sleep(1); return {}"
    reply = run_child(child(replying(body)), request={}, timeout_s=60)
    assert 200 << 20 < reply.exit.peak_memory_bytes < 400 << 20


def test_program_that_does_not_exist_is_missing():
    with pytest.raises(ToolchainMissing, match="no-such-compiler could not be started"):
        run_child(["no-such-compiler"], request={}, timeout_s=5)


@pytest.fixture
def heeds_interrupts():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_kills_the_child(child, tmp_path, heeds_interrupts):
    pid_file = tmp_path / "pid"
    source = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    waiter = threading.Thread(target=_interrupt_when, args=(pid_file,))
    waiter.start()
    with pytest.raises(KeyboardInterrupt):
        run_child(child(source), request={}, timeout_s=60)
    waiter.join()
    assert_gone(int(pid_file.read_text()))


def test_multiprocessing_does_not_answer_twice(child, tmp_path):
    # `spawn` imports the child's module again; an answer per import would compile everything twice.
    count = tmp_path / "count"
    source = (
        "import multiprocessing\n"
        "from vinoopt.toolchains.process import serve\n"
        "def answer(request):\n"
        f"    with open({str(count)!r}, 'a') as stream: stream.write('x')\n"
        "    if multiprocessing.parent_process() is None:\n"
        "        other = multiprocessing.get_context('spawn').Process(target=print)\n"
        "        other.start(); other.join()\n"
        "    return {}\n"
        "serve(answer)\n"
    )
    run_child(child(source), request={}, timeout_s=120)
    assert count.read_text() == "x"


def test_plain_process_leaves_its_output_in_the_folder():
    with child_folder() as folder:
        ended = run_process(
            [sys.executable, "-c", "import sys; print('@@ result'); sys.exit(5)"], folder=folder, timeout_s=60
        )
        assert ended.returncode == 5
        assert ended.cause == "exit code 5"
        assert (folder / process.STDOUT_FILE).read_text().strip() == "@@ result"
    assert not folder.exists()


def assert_gone(pid: int) -> None:
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def _interrupt_when(path: Path) -> None:
    for _ in range(300):
        if path.exists() and path.read_text():
            break
        time.sleep(0.1)

    _thread.interrupt_main()
