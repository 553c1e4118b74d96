"""The output folder: written beside its place and renamed when complete, read back, checked, opened."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.errors import BundleError
from vinoopt.records import (
    CompressionPlan,
    Device,
    Manifest,
    Precision,
    RuntimeProperties,
    TargetResult,
    Trial,
)
from vinoopt.replay import BLOB, MODEL, TOLERANCES
from vinoopt.report import render_html
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS, compile_here
from vinoopt.toolchains.process import run_child

MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
RUNTIME = "runtime.json"
TRIALS = "trials.jsonl"
README = "README.md"
REPORT = "report.html"
SCHEMA_VERSION = 1
REPLAY_TIMEOUT_S = 600.0

_README_TEMPLATE = """# {name}, compiled by vinoopt {version}

Needs `pip install openvino` only. The five lines:

```python
import json, openvino as ov
properties = json.load(open("{folder}/runtime.json"))
model = ov.Core().compile_model("{folder}/model.xml", "{device}", properties)
outputs = model({inputs})
```

Inputs:

{input_table}

What was chosen, on which evidence, and what else was tried: `manifest.json`, `trials.jsonl`.
`golden.npz` holds a few inputs and the outputs to expect; `vinoopt verify .` replays them on the machine that
will run the model.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A complete output folder."""

    path: Path
    manifest: Manifest

    def load(self, target: str = "CPU", *, device: str | None = None) -> ov.CompiledModel:
        """The model compiled with its tuned properties, ready to run on this machine.

        `target` is a target of the bundle (`"host:CPU"`) or a device that only one of them has (`"CPU"`);
        `device` is OpenVINO's name where it differs (`"GPU.1"`). Raises `BundleError` for another target and
        `DeviceError` where OpenVINO cannot compile it here.
        """
        result = self.result(target)
        folder = self.path / result.target.slug
        return compile_here(
            folder / "model.xml", device or result.target.device.value, result.properties.as_dict()
        )

    def result(self, target: str) -> TargetResult:
        """What was found for a target; raises `BundleError` where the bundle has no such target, or several."""
        matches = [
            r for r in self.manifest.targets if target in (str(r.target), r.target.slug, r.target.device.value)
        ]
        if len(matches) == 1:
            return matches[0]
        have = ", ".join(str(r.target) for r in self.manifest.targets)
        problem = "has several targets for" if matches else "has no target"
        raise BundleError(f'{self.path} {problem} "{target}"; it has {have}')


def open_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder; raises `BundleError` where it is none, or of a newer schema."""
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    text = file.read_text(encoding="utf-8")
    version = _schema_version(text, file)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {version}; this vinoopt reads {SCHEMA_VERSION}. Use the vinoopt that "
            "wrote it, or compile again"
        )
    return Bundle(path=folder, manifest=serde.from_json(Manifest, text, where=str(file), error=BundleError))


def _schema_version(text: str, file: Path) -> Any:
    try:
        return json.loads(text).get("schema_version")
    except (json.JSONDecodeError, AttributeError) as exc:
        raise BundleError(f"{file} is damaged: {exc}") from exc


def damaged_files(bundle: Bundle) -> tuple[str, ...]:
    """Files whose content is not what the manifest says, each with what is wrong; empty for an intact bundle."""
    problems = []
    for name, expected in sorted(bundle.manifest.files.items()):
        path = bundle.path / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif serde.sha256_file(path) != expected:
            problems.append(f"{name}: changed since it was written")
    return tuple(problems)


def golden_inputs(folder: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The inputs of a bundle's golden calls, by name."""
    with np.load(folder / GOLDEN) as golden:
        heads = [f"input/{call}/" for call in range(int(golden["calls"]))]
        return [
            {key.removeprefix(head): golden[key] for key in golden.files if key.startswith(head)} for head in heads
        ]


def replay_in_child(
    folder: Path,
    result: TargetResult,
    *,
    device: Device | None = None,
    properties: RuntimeProperties | None = None,
    file: str = MODEL,
    export: Path | None = None,
    env: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """The bundle reopened by plain OpenVINO in a fresh process and compared with its golden outputs.

    It runs on the target's own device with the properties in its folder, unless others are given. `file` is the IR or
    the blob; a blob of what was run is left at `export`; `env` is laid over the environment. Gives departure,
    tolerance, calls, OpenVINO's version and the compiled model's requirements; see `vinoopt.replay`. Raises
    `ToolchainError` subclasses where the process fails.
    """
    request = {
        "folder": str(folder.resolve()),
        "target": result.target.slug,
        "device": (device or result.target.device).value,
        "properties": None if properties is None else properties.as_dict(),
        "file": file,
        "export": export is not None,
    }
    collect = {} if export is None else {BLOB: export}
    return run_child("vinoopt.replay", request=request, timeout_s=REPLAY_TIMEOUT_S, collect=collect, env=env).values


def replace_blob(bundle: Bundle, result: TargetResult, blob: Path, *, requirements: str | None) -> Bundle:
    """The bundle with another blob for a target, its checksums renewed; the files are replaced one by one."""
    sha256 = serde.sha256_file(blob)
    details = {**result.build.details, **({RUNTIME_REQUIREMENTS: requirements} if requirements else {})}
    toolchain = f"openvino {ov.__version__}"
    build = serde.replace(result.build, blob=BLOB, blob_sha256=sha256, toolchain=toolchain, details=details)
    return _replaced(bundle, serde.replace(result, build=build), BLOB, blob)


def replace_properties(
    bundle: Bundle, result: TargetResult, properties: RuntimeProperties, *, reason: str
) -> Bundle:
    """The bundle with other runtime properties for a target and the reason for them, its checksums renewed.

    Raises `BundleError` where the target has a blob: that was compiled with the properties it has.
    """
    if result.build.blob is not None:
        raise BundleError(f"{bundle.path}: {result.target} has a blob, whose properties were fixed; compile it again")
    own = serde.replace(result, properties=properties, reasons=(*result.reasons, reason))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / result.target.slug).mkdir()
        write_properties(Path(folder), result.target.slug, properties)
        return _replaced(bundle, own, RUNTIME, Path(folder) / result.target.slug / RUNTIME)


def _replaced(bundle: Bundle, result: TargetResult, name: str, file: Path) -> Bundle:
    """The bundle with another result for a target, and one of the target's files replaced; each file in one step."""
    place = bundle.path / result.target.slug / name
    manifest = serde.replace(
        bundle.manifest,
        targets=tuple(result if each.target == result.target else each for each in bundle.manifest.targets),
        files={**bundle.manifest.files, place.relative_to(bundle.path).as_posix(): serde.sha256_file(file)},
    )
    text = serde.to_json(manifest, indent=2) + "\n"
    with tempfile.TemporaryDirectory(prefix=f".{bundle.path.name}-", dir=bundle.path.parent) as folder:
        new, new_manifest = Path(folder) / name, Path(folder) / MANIFEST
        shutil.copyfile(file, new)
        new_manifest.write_text(text, encoding="utf-8")
        new.replace(place)
        new_manifest.replace(bundle.path / MANIFEST)
    return Bundle(path=bundle.path, manifest=manifest)


# --------------------------------------------------------------------------- writing


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output folder that may not be written, before any long work; raises `BundleError`."""
    if path.is_file():
        raise BundleError(f"{path} is a file; name a folder with -o")
    if os.path.ismount(path):  # it cannot be renamed, and so never be replaced as a whole
        raise BundleError(f"{path} is the root of a file system; name a folder inside it with -o")
    if path.is_dir() and any(path.iterdir()):
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} holds other things than a bundle; name another folder with -o")
        if not force:
            raise BundleError(f"{path} holds a bundle already; give --force to replace it, or another -o")
    parent = _existing_parent(path)
    if not os.access(parent, os.W_OK):
        raise BundleError(f"{path} cannot be written: no permission in {parent}")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.is_dir())


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error; else nothing changes."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        _swap(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".{place.name}-replaced-{os.getpid()}")
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:  # an interrupt too must not leave the place empty
        if not place.exists():
            old.rename(place)
        raise
    with suppress(OSError):
        shutil.rmtree(old)


def write_target(folder: Path, slug: str, model: ov.Model, properties: RuntimeProperties) -> Path:
    """Put a target's IR and properties into its folder; gives the IR's path."""
    place = folder / slug
    place.mkdir()
    ov.save_model(model, place / "model.xml", compress_to_fp16=False)
    write_properties(folder, slug, properties)
    return place / "model.xml"


def remove_target(folder: Path, slug: str) -> None:
    """Take a target's folder out again, where there is one."""
    shutil.rmtree(folder / slug, ignore_errors=True)


def write_properties(folder: Path, slug: str, properties: RuntimeProperties) -> None:
    """Put the properties that a target is to be run with beside its IR; others that lie there are replaced."""
    text = json.dumps(properties.as_dict(), indent=2) + "\n"
    (folder / slug / RUNTIME).write_text(text, encoding="utf-8")


def tolerance_of(plan: CompressionPlan) -> float:
    """How far a replay of this plan's outputs may depart from the golden ones; see `TOLERANCES`."""
    used = [plan.float_precision] + ([Precision.INT8] if plan.quantization is not None else [])
    return max(TOLERANCES[precision] for precision in used)


def write_golden(
    folder: Path,
    samples: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    outputs: Mapping[str, Sequence[Sequence[np.ndarray[Any, Any]]]],
    tolerances: Mapping[str, float],
) -> None:
    """Keep a few inputs and, per target folder, the outputs to expect in the model's order of outputs."""
    arrays: dict[str, Any] = {"calls": np.int64(len(samples))}
    for call, sample in enumerate(samples):
        arrays |= {f"input/{call}/{name}": value for name, value in sample.items()}
    for slug, calls in outputs.items():
        arrays[f"tolerance/{slug}"] = np.float64(tolerances[slug])
        for call, values in enumerate(calls):
            arrays |= {f"output/{slug}/{call}/{i}": value for i, value in enumerate(values)}
    np.savez_compressed(folder / GOLDEN, **arrays)


def write_documents(folder: Path, manifest: Manifest, trials: Sequence[Trial]) -> Manifest:
    """Write README, report and trials, then the manifest with the checksum of every file; gives that manifest."""
    (folder / README).write_text(_readme(manifest), encoding="utf-8")
    (folder / REPORT).write_text(render_html(manifest, trials), encoding="utf-8")
    (folder / TRIALS).write_text("".join(serde.to_json(t) + "\n" for t in trials), encoding="utf-8")
    files = {
        str(file.relative_to(folder).as_posix()): serde.sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    complete = serde.replace(manifest, files=files)
    (folder / MANIFEST).write_text(serde.to_json(complete, indent=2) + "\n", encoding="utf-8")
    return complete


def _readme(manifest: Manifest) -> str:
    first = manifest.targets[0].target
    rows = [f"| {s.name} | {list(s.shape)} | {s.dtype} | {s.layout or ''} |" for s in manifest.inputs]
    feeds = ", ".join(f'"{s.name}": ...' for s in manifest.inputs)
    return _README_TEMPLATE.format(
        name=Path(manifest.request.model).name,
        version=manifest.host.versions.get("vinoopt", ""),
        folder=first.slug,
        device=first.device,
        inputs=f"{{{feeds}}}",
        input_table="\n".join(["| name | shape | type | layout |", "|---|---|---|---|", *rows]),
    )
