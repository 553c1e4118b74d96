"""Tests that need an offline toolchain fail without one where it is required, and skip elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest

@pytest.mark.offline
def test_of_a_toolchain():
    pytest.skip("no NPU compiler here")

@pytest.fixture
def compiler():
    pytest.skip("wine is not installed")

@pytest.mark.offline
def test_of_another(compiler):
    pass

@pytest.mark.offline
def test_of_this_machine():
    pytest.skip("CPU_ISA_NOT_ON_HOST: needs AVX2_VNNI")

def test_of_something_else():
    pytest.skip("no PyTorch")
"""


@pytest.mark.parametrize(
    ("required", "counts"), [("", "4 skipped"), ("0", "4 skipped"), ("1", "1 failed, 2 skipped, 1 error")]
)
def test_skips_fail_where_the_toolchains_are_required(tmp_path: Path, required: str, counts: str) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(TESTS, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.fspath(HERE), "VINOOPT_REQUIRE_OFFLINE": required}
    config = os.fspath(HERE.parent / "pyproject.toml")
    options = ["-q", "-p", "conftest", "-c", config, "--rootdir", os.fspath(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file], capture_output=True, text=True, check=False, env=env
    )
    assert counts in done.stdout, done.stdout
    assert (done.returncode == 0) is (required != "1")
