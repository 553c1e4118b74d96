"""Installs the NPU compiler on a Linux machine without an NPU: what `vinoopt doctor --install npu` does.

Intel ships the compiler as a library inside OpenVINO's Windows wheel, not in the Linux one. This takes seven
DLLs out of that wheel, builds the harness that calls them, gives them a wine prefix of their own, and proves
the whole with a real compilation.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import openvino as ov
from openvino import opset15

from vinoopt.errors import ToolchainCrashed, ToolchainMissing, ToolchainRefused
from vinoopt.records import Availability
from vinoopt.serde import sha256_file
from vinoopt.toolchains.npu_compiler import CompilerCall, call_compiler
from vinoopt.toolchains.npu_routes import (
    HARNESS_SOURCE,
    READY_FILE,
    WINE_PACKAGES_HINT,
    NpuPlaces,
    harness_sha256,
    openvino_version,
    read_installation,
    wine_environment,
    wine_route,
)
from vinoopt.toolchains.process import ChildExit, child_folder, run_process

if sys.platform != "win32":
    import fcntl

DLLS = (
    "openvino.dll",
    "openvino_c.dll",
    "openvino_intel_npu_plugin.dll",
    "openvino_intel_npu_compiler.dll",
    "openvino_intel_npu_compiler_loader.dll",
    "openvino_ir_frontend.dll",
    "tbb12.dll",
)
IMPORT_LIBRARY = "openvino_c.lib"
TRIAL_PLATFORM = "4000"

_DOWNLOAD_TIMEOUT_S = 1800.0
_BUILD_TIMEOUT_S = 600.0
_PREFIX_TIMEOUT_S = 300.0
_TRIAL_TIMEOUT_S = 300.0
_MINGW = "x86_64-w64-mingw32-gcc"
_WINE_DLL_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu/wine/x86_64-windows",
    "/usr/lib/wine/x86_64-windows",
    "/usr/lib64/wine/x86_64-windows",
    "/opt/wine-stable/lib64/wine/x86_64-windows",
)


def prepare(
    places: NpuPlaces, *, wheel: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Availability:
    """The NPU compiler, ready in the user's cache folder; downloads OpenVINO's Windows wheel unless given one.

    Does nothing where it is ready. `say` is told each step. Safe to run from several processes at once. Raises
    `ToolchainMissing` (wine or a C compiler for Windows is absent, the wheel cannot be had or is of another
    release), `ToolchainCrashed` and `ToolchainTimeout` (a step failed).
    """
    if sys.platform != "linux":
        raise ToolchainMissing(
            "this installation is for Linux; OpenVINO's Windows wheel holds the NPU compiler"
        )
    if places.wine is None:
        raise ToolchainMissing(f"wine is not installed; {WINE_PACKAGES_HINT}")
    compiler = _c_compiler()
    folder = places.installation
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not _is_ready(places):
            (folder / READY_FILE).unlink(missing_ok=True)
            digest = _unpack_wheel(folder, wheel, say)
            say("building the harness")
            _build_harness(folder, compiler)
            say("creating a wine prefix")
            wine = _create_prefix(places)
            say("compiling a trial model")
            _try_out(places)
            _write_ready(folder, {"wine": wine, "wheel_sha256": digest, "harness_sha256": harness_sha256()})
    installed = read_installation(places) or {}
    return Availability(
        ok=True,
        name="Windows NPU compiler under wine",
        version=f"OpenVINO {openvino_version()}, {installed.get('wine')}",
    )


def _is_ready(places: NpuPlaces) -> bool:
    return (read_installation(places) or {}).get("harness_sha256") == harness_sha256()


def _write_ready(folder: Path, facts: dict[str, str]) -> None:
    part = folder / f"{READY_FILE}.part"
    part.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    part.replace(folder / READY_FILE)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclusive: two processes that create one wine prefix at once damage it."""
    with path.open("w") as stream:
        if sys.platform != "win32":
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------- the wheel


def _unpack_wheel(folder: Path, wheel: Path | None, say: Callable[[str], None]) -> str:
    """Digest of the wheel whose DLLs, headers and import library now lie in `bin`, `include` and `lib`."""
    with child_folder() as downloads:
        source = wheel or _download_wheel(downloads, say)
        say(f"unpacking {source.name}")
        expected = f"openvino-{openvino_version()}-"
        if not source.name.startswith(expected) or "win_amd64" not in source.name:
            raise ToolchainMissing(
                f"{source.name} is not OpenVINO {openvino_version()} for Windows; the NPU compiler must be of the "
                f"release that is installed here ({expected}*-win_amd64.whl)"
            )
        try:
            with zipfile.ZipFile(source) as archive:
                _unpack(archive, folder)
        except (OSError, zipfile.BadZipFile) as exc:
            raise ToolchainMissing(f"{source} cannot be read: {exc}") from exc
        return sha256_file(source)


def _download_wheel(downloads: Path, say: Callable[[str], None]) -> Path:
    requirement = f"openvino=={openvino_version()}"
    say(f"downloading {requirement} for Windows (85 MB)")
    platform = ("--platform", "win_amd64", "--python-version", "3.11")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *platform]
    ended = run_process(
        [*command, "--dest", str(downloads), requirement], folder=downloads, timeout_s=_DOWNLOAD_TIMEOUT_S
    )
    found = list(downloads.glob("*.whl"))
    if not found:
        raise ToolchainMissing(
            f"pip could not download {requirement} for Windows: {ended.tail[-600:]}. Without a network, pass the "
            "wheel's path."
        )
    return found[0]


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write the wanted members, by names that we choose; raises `ToolchainMissing` where one is absent."""
    wanted = {f"openvino/libs/{name}": folder / "bin" / name for name in DLLS}
    wanted[f"openvino/libs/{IMPORT_LIBRARY}"] = folder / "lib" / IMPORT_LIBRARY
    headers = PurePosixPath("openvino/include/openvino/c")
    for name in archive.namelist():
        path = PurePosixPath(name)
        if path.suffix == ".h" and headers in path.parents and ".." not in path.parts:
            wanted[name] = folder / "include" / path.relative_to("openvino/include")
    present = set(archive.namelist())
    missing = sorted(name for name in wanted if name not in present)
    if missing:
        raise ToolchainMissing(f"the wheel does not hold {', '.join(missing)}")
    for name, destination in wanted.items():
        destination.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as source, destination.open("wb") as target:
            shutil.copyfileobj(source, target)


# --------------------------------------------------------------------------- harness, prefix, trial


def _c_compiler() -> tuple[str, ...]:
    """The command of a C compiler for 64-bit Windows: mingw-w64, or zig from PyPI."""
    if found := shutil.which(_MINGW):
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu")
    raise ToolchainMissing(
        "no C compiler for Windows is here; `apt-get install gcc-mingw-w64-x86-64`, or `pip install ziglang`"
    )


def _build_harness(folder: Path, compiler: tuple[str, ...]) -> None:
    target = folder / "bin" / "npuh.exe"
    target.unlink(missing_ok=True)
    sources = [str(HARNESS_SOURCE), str(folder / "lib" / IMPORT_LIBRARY)]
    with child_folder() as work:
        ended = run_process(
            [*compiler, "-Os", "-s", f"-I{folder / 'include'}", *sources, "-o", "npuh.exe"],
            folder=work,
            timeout_s=_BUILD_TIMEOUT_S,
        )
        _expect(work / "npuh.exe", ended)
        shutil.copyfile(work / "npuh.exe", target)


def _create_prefix(places: NpuPlaces) -> str:
    """wine's version; the prefix then shares its DLLs with the system's wine (82 MB instead of 695 MB)."""
    prefix = places.installation / "prefix"
    shutil.rmtree(prefix, ignore_errors=True)
    env = wine_environment(prefix)
    with child_folder() as work:
        run_process([str(places.wine), "wineboot", "-i"], folder=work, timeout_s=_PREFIX_TIMEOUT_S, env=env)
        # Its services go on for a moment; only then are all files in their places.
        _wait_for(prefix / "system.reg")
        version = run_process([str(places.wine), "--version"], folder=work, timeout_s=60.0, env=env)
    system = prefix / "drive_c" / "windows" / "system32"
    if not system.is_dir():
        raise ToolchainCrashed(f"wine could not create its prefix in {prefix}: {version.tail}")
    _share_dlls(system)
    return version.stdout.strip()


def _wait_for(path: Path, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def _share_dlls(system: Path) -> None:
    """Replace copies of wine's own files by links to them."""
    shared = next((Path(each) for each in _WINE_DLL_FOLDERS if Path(each).is_dir()), None)
    if shared is None:
        return
    for copy in system.iterdir():
        original = shared / copy.name
        if copy.is_symlink() or not copy.is_file() or not original.is_file():
            continue
        if copy.stat().st_size == original.stat().st_size and copy.read_bytes() == original.read_bytes():
            link = copy.with_name(copy.name + ".link")
            link.symlink_to(original)
            link.replace(copy)


def _try_out(places: NpuPlaces) -> None:
    """Compile a small network; raises `ToolchainCrashed` where the installation does not work."""
    image = opset15.parameter([1, 16, 32, 32], ov.Type.f32, name="image")
    weights = opset15.constant([[[[0.1]]] * 16] * 16, ov.Type.f32)
    convolution = opset15.convolution(image, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    with child_folder() as work:
        model = work / "trial.xml"
        ov.save_model(ov.Model([opset15.result(opset15.relu(convolution))], [image], "trial"), model)
        call = CompilerCall(model=model, platform=TRIAL_PLATFORM, properties={}, timeout_s=_TRIAL_TIMEOUT_S)
        try:
            call_compiler(wine_route(places, version=openvino_version()), call)
        except ToolchainRefused as exc:
            raise ToolchainCrashed(
                f"the NPU compiler was installed but fails on a trial model: {exc}"
            ) from exc


def _expect(path: Path, ended: ChildExit) -> None:
    if not path.is_file():
        raise ToolchainCrashed(
            f"{ended.name} ended with {ended.cause} and wrote no {path.name}: {ended.tail}"
        )
