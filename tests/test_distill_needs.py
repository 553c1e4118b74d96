"""Distillation without PyTorch: nothing else needs it, and what is missing is said before any long work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "torch" else found(name, *rest)
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_command_says_what_to_install_before_it_reads_anything(tmp_path: Path) -> None:
    code = WITHOUT_TORCH + "from vinoopt.cli.main import main; sys.exit(main())"
    output = tmp_path / "out"
    flags = ["--data", "absent.npz", "--effort", "distill", "-o", str(output)]
    done = run_python(code, "compile", "absent.onnx", *flags)
    assert done.returncode == 2
    assert "pip install 'vinoopt[distill]'" in done.stderr
    assert not output.exists()


def test_the_function_says_what_to_install() -> None:
    code = WITHOUT_TORCH + (
        "import vinoopt\n"
        "from vinoopt.errors import ExtraMissing\n"
        "try:\n    vinoopt.distill(None, teacher=None, data=None)\n"
        "except ExtraMissing as exc:\n    print(exc)\n"
    )
    assert "vinoopt[distill]" in run_python(code).stdout


@pytest.mark.parametrize("module", ["vinoopt.pipeline", "vinoopt.distillation.stage", "vinoopt.cli.compile"])
def test_the_core_can_be_imported_without_torch(module: str) -> None:
    done = run_python(WITHOUT_TORCH + f"import {module}; print('fine')")
    assert done.stdout.strip() == "fine", done.stderr
