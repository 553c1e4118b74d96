"""The command line: a skin over the API, with exit codes, clear errors and data on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from vinoopt.cli.main import _COMMANDS, main
from vinoopt.demo import demo_files

ROOT = Path(__file__).resolve().parent.parent
FILES = demo_files()
QUICK = ["--no-prune", "--effort", "fast", "--max-drop", "0.05"]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_has_help_and_is_in_the_readme(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "Usage: vinoopt" in capsys.readouterr().out
    assert f"vinoopt {name}" in (ROOT / "README.md").read_text()


def test_the_demo_is_compiled_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--demo", *QUICK, "-o", "out"]) == 0
    told = capsys.readouterr()
    for words in ("plain INT8", "float", "95% interval", "measured", "bundle: out"):
        assert words in told.out
    assert "trial" in told.err
    assert main(["verify", "out"]) == 0
    assert "fit for this machine" in capsys.readouterr().out
    assert main(["compile", "--demo", *QUICK, "-o", "out"]) == 2
    assert "--force" in capsys.readouterr().err


def test_json_prints_the_manifest_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--demo", *QUICK, "-o", "out", "--json"]) == 0
    told = capsys.readouterr()
    manifest = json.loads(told.out)
    assert manifest == json.loads(Path("out/manifest.json").read_text())
    assert told.err == ""


def test_raw_image_files_and_a_csv_of_labels(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    with np.load(FILES.data) as arrays:
        pictures, labels = arrays["images"][:100], arrays["labels"][:100]
    Path("pictures").mkdir()
    rows = ["file,label"]
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture[..., 0]).save(f"pictures/{number:03d}.png")
        rows.append(f"{number:03d}.png,{label}")
    Path("labels.csv").write_text("\n".join(rows))
    preprocess = str(FILES.preprocess)
    data = ["--data", "pictures", "--labels", "labels.csv", "--preprocess", preprocess]
    budget = ["--max-drop", "0.2", "--no-prune", "--effort", "fast"]
    assert main(["compile", str(FILES.model), *data, *budget, "-o", "out", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["float_accuracy"]["metric"] == "top1"
    assert manifest["float_accuracy"]["value"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compile"], "no MODEL"),
        (["compile", "nothing.onnx"], "--data"),
        (["compile", "nothing.onnx", "--data", "x.npz"], "nothing.onnx"),
        (["compile", "--demo", "--data", "x.npz"], "leave them out"),
        (["compile", "--demo", "--target", "lunar-lke:NPU"], 'did you mean "lunar-lake"'),
        (["compile", "--demo", "--time-limit", "soon"], "15m"),
        (["compile", "--demo", "--mean", "1,2,x"], "not a list of numbers"),
        (["compile", "--demo", "--metric-option", "k"], "KEY=VALUE"),
        (["compile", "--demo", "--metric", "topp1"], 'did you mean "top1"'),
        (["compile", "--demo", "--ignored-scope", "nosuch"], "matches no layer"),
        (["compile", "--demo", "--shape", "imges[1,32,32,1]"], "did you mean"),
        (["inspect", "nothing.onnx"], "nothing.onnx"),
        (["verify", "nowhere"], "not a bundle"),
        (["profiles", "show", "lunar-lke"], "did you mean"),
        (["complie"], 'did you mean "compile"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    arguments: list[str], words: str, own_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert "Traceback" not in told.err
    assert told.out == ""
    assert [p.name for p in own_place.iterdir() if p.name != "cache"] == []


def test_inspect_lists_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FILES.model), "--preprocess", str(FILES.preprocess)]) == 0
    text = capsys.readouterr().out
    assert "groups of channels can be pruned" in text
    assert "blocks.0.conv1" in text
    assert main(["inspect", str(FILES.model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"]
    assert all(group["is_prunable"] for group in found["groups"])
    assert all(group["reason"] for group in found["blocked"])


def test_a_budget_that_is_not_met_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--metric", "sqnr", "--max-drop", "1", "--no-prune", "--effort", "fast", "-o", "out"]
    assert main(["compile", "--demo", *options]) == 3
    assert "every compressed model was over the budget" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wheel_installs_and_runs_without_the_checkout(tmp_path: Path) -> None:
    wheels, home = tmp_path / "wheels", tmp_path / "home"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    wheel = next(wheels.glob("vinoopt-*.whl"))
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", "install", wheel], check=True)

    def run(*arguments: str) -> str:
        command = [home / "bin" / "vinoopt", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "lunar-lake" in run("profiles", "list", "--json")
    assert run("compile", "--demo", *QUICK, "--quiet", "-o", "out").strip()
    assert "fit for this machine" in run("verify", "out")
