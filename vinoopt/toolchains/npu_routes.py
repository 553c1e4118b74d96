"""Ways to reach Intel's NPU compiler from this machine, in the order in which they are tried.

1. *driver*: an NPU of the very platform is here, and its driver compiles.
2. *compiler library*: the library lies beside OpenVINO (its Windows wheel brings it), or in the folder that
   `VINOOPT_NPU_COMPILER_DIR` names. The plugin opens it by absolute path from OpenVINO's own folder, so for a
   folder elsewhere the child runs a shadow package: OpenVINO as symbolic links, with the library beside them.
3. *wine*: on Linux, the Windows library of the same OpenVINO version under wine, driven by `npuh.c`.
   `npu_setup.prepare` installs it once; nothing is downloaded at run time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from vinoopt.errors import ToolchainError
from vinoopt.records import Availability
from vinoopt.store import cache_folder
from vinoopt.toolchains.process import PACKAGE_PATH, STDOUT_FILE, child_folder, module_command, run_process

WORKER = "vinoopt.toolchains.npu_worker"
HARNESS_SOURCE = Path(__file__).with_name("npuh.c")
COMPILER_FOLDER_VARIABLE = "VINOOPT_NPU_COMPILER_DIR"
INSTALL_HINT = "run `vinoopt doctor --install npu`"
WINE_PACKAGES_HINT = (
    "install wine: `apt-get install --no-install-recommends wine64 wine gcc-mingw-w64-x86-64`"
)
READY_FILE = "ready.json"
PROBE_TIMEOUT_S = 60.0

_LIBRARIES = {
    "win32": ("openvino_intel_npu_compiler.dll", "openvino_intel_npu_compiler_loader.dll"),
    "linux": ("libopenvino_intel_npu_compiler.so", "libopenvino_intel_npu_compiler_loader.so"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How a child is started that compiles for an NPU: what comes before `MODEL.xml` on its command line."""

    name: str
    version: str
    command: tuple[str, ...]
    env: Mapping[str, str | None] = field(default_factory=dict)
    shadowed_library: Path | None = None
    """Folder of the compiler library that the child's shadow package must hold."""
    links_model: bool = False
    """Whether the model is linked into the child's folder: wine cannot open every path of this machine."""
    has_cost_model: bool = True
    """Whether the compiler writes a schedule with modelled times; a driver's does not."""
    compiler_stamp: str = ""
    """Size and time of the compiler's library: another one under the same version gives other figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteOption:
    """A route, or why it is not available here."""

    availability: Availability
    route: Route | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NpuPlaces:
    """Where the NPU toolchain looks for its parts."""

    cache: Path
    compiler_folder: Path | None = None
    wine: Path | None = None

    @classmethod
    def from_environment(cls) -> NpuPlaces:
        """The user's cache folder, `VINOOPT_NPU_COMPILER_DIR`, and the wine on the path."""
        folder = os.environ.get(COMPILER_FOLDER_VARIABLE)
        return cls(cache=cache_folder(), compiler_folder=Path(folder) if folder else None, wine=find_wine())

    @property
    def installation(self) -> Path:
        """What `npu_setup.prepare` fills for the OpenVINO version that is installed here."""
        return self.cache / "npu" / openvino_version()


def openvino_version() -> str:
    """The installed OpenVINO's release, as `2026.4.1`."""
    return importlib.metadata.version("openvino")


def harness_sha256() -> str:
    """Digest of the harness's source: an installation made from another source is out of date."""
    return hashlib.sha256(HARNESS_SOURCE.read_bytes()).hexdigest()


def find_wine() -> Path | None:
    """The wine launcher of this machine."""
    for name in ("wine", "wine64", "/usr/lib/wine/wine64"):
        if found := shutil.which(name):
            return Path(found)
    return None


def wine_environment(prefix: Path) -> dict[str, str | None]:
    """Variables for a program under wine with a prefix of its own and no display."""
    return {
        "WINEPREFIX": str(prefix),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # neither .NET nor a browser is offered for download
        "WINEPATH": None,
        "DISPLAY": None,
        "WAYLAND_DISPLAY": None,
        "LC_ALL": "C.UTF-8",  # else file names outside ASCII are lost
    }


def find_routes(platform: str, places: NpuPlaces) -> tuple[RouteOption, ...]:
    """All routes in the order in which they are tried, available or not."""
    return (_driver(platform), _library_beside_openvino(), _library_in_folder(places), _wine(places))


# --------------------------------------------------------------------------- the routes


def _driver(platform: str) -> RouteOption:
    name = "NPU driver"
    if sys.platform == "linux" and not any(Path("/dev").glob("accel/accel*")):
        return _absent(name, "this machine has no NPU device (/dev/accel/accel*)")
    found = _devices_here()
    if found.get("error"):
        return _absent(name, str(found["error"]))
    architecture = found.get("architecture")
    if architecture is None:
        return _absent(
            name, "OpenVINO lists no NPU here", fix="install Intel's NPU driver where an NPU is built in"
        )
    if architecture != platform:
        return _absent(name, f"the NPU of this machine is {architecture}, not {platform}")
    route = Route(
        name=name,
        version=f"OpenVINO {openvino_version()}, driver {found.get('driver')}",
        command=tuple(module_command(WORKER)),
        env=PACKAGE_PATH,
        has_cost_model=False,
    )
    return _present(route)


def _library_beside_openvino() -> RouteOption:
    name = "NPU compiler library beside OpenVINO"
    libraries = _LIBRARIES.get(sys.platform)
    if libraries is None:
        return _absent(name, f"Intel builds no NPU compiler for {sys.platform}")
    folder = _openvino_package() / "libs"
    missing = [each for each in libraries if not (folder / each).is_file()]
    if missing:
        return _absent(
            name,
            f"OpenVINO's package does not hold {missing[0]} (its Linux wheel never does)",
            fix=f"set {COMPILER_FOLDER_VARIABLE} to a folder that holds it, or {INSTALL_HINT}",
        )
    command = tuple(module_command(WORKER))
    return _present(
        Route(
            name=name,
            version=f"OpenVINO {openvino_version()}",
            command=command,
            env=PACKAGE_PATH,
            compiler_stamp=_stamp(folder / libraries[0]),
        )
    )


def _library_in_folder(places: NpuPlaces) -> RouteOption:
    name = f"NPU compiler library in {COMPILER_FOLDER_VARIABLE}"
    if sys.platform != "linux":
        return _absent(name, "used on Linux only; OpenVINO's Windows wheel brings the library")
    if places.compiler_folder is None:
        return _absent(
            name,
            f"{COMPILER_FOLDER_VARIABLE} is not set",
            fix=f"take {' and '.join(_LIBRARIES['linux'])} from OpenVINO's archive of the same release",
        )
    missing = [each for each in _LIBRARIES["linux"] if not (places.compiler_folder / each).is_file()]
    if missing:
        return _absent(name, f"{places.compiler_folder} does not hold {', '.join(missing)}")
    route = Route(
        name=name,
        version=f"OpenVINO {openvino_version()}",
        command=tuple(module_command(WORKER)),
        env=PACKAGE_PATH,
        shadowed_library=places.compiler_folder.resolve(),
        compiler_stamp=_stamp(places.compiler_folder / _LIBRARIES["linux"][0]),
    )
    return _present(route)


def _wine(places: NpuPlaces) -> RouteOption:
    name = "Windows NPU compiler under wine"
    if sys.platform != "linux":
        return _absent(name, "used on Linux only")
    if places.wine is None:
        return _absent(name, "wine is not installed", fix=f"{WINE_PACKAGES_HINT}, then {INSTALL_HINT}")
    installed = read_installation(places)
    if installed is None:
        return _absent(name, f"not installed for OpenVINO {openvino_version()}", fix=INSTALL_HINT)
    if installed.get("harness_sha256") != harness_sha256():
        return _absent(name, "installed by another version of vinoopt", fix=f"{INSTALL_HINT} again")
    return _present(wine_route(places, version=f"OpenVINO {openvino_version()}, {installed.get('wine')}"))


def read_installation(places: NpuPlaces) -> Mapping[str, str] | None:
    """What `npu_setup.prepare` noted when it was done; None where it was not, or its note is damaged."""
    try:
        installed = json.loads((places.installation / READY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return installed if isinstance(installed, dict) else None


def wine_route(places: NpuPlaces, *, version: str) -> Route:
    """The route through wine, without a look at whether it has been prepared."""
    return Route(
        name="Windows NPU compiler under wine",
        version=version,
        command=(str(places.wine), str(places.installation / "bin" / "npuh.exe")),
        env=wine_environment(places.installation / "prefix"),
        links_model=True,
        compiler_stamp=_stamp(places.installation / "bin" / _LIBRARIES["win32"][0]),
    )


def make_shadow_package(library: Path, folder: Path) -> Path:
    """A folder for the head of PYTHONPATH whose `openvino` is the installed one plus the compiler library."""
    package, shadow = _openvino_package(), folder / "shadow" / "openvino"
    (shadow / "libs").mkdir(parents=True)
    for entry in package.iterdir():
        if entry.name not in ("libs", "__pycache__"):
            (shadow / entry.name).symlink_to(entry)
    for entry in (*(package / "libs").iterdir(), *(library / each for each in _LIBRARIES["linux"])):
        (shadow / "libs" / entry.name).symlink_to(entry)
    return shadow.parent


# --------------------------------------------------------------------------- looking around


def _present(route: Route) -> RouteOption:
    return RouteOption(
        availability=Availability(ok=True, name=route.name, version=route.version), route=route
    )


def _stamp(library: Path) -> str:
    try:
        found = library.stat()
    except OSError:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"


def _absent(name: str, reason: str, *, fix: str = "") -> RouteOption:
    return RouteOption(availability=Availability(ok=False, name=name, reason=reason, fix=fix))


def _openvino_package() -> Path:
    """OpenVINO's package folder, found without importing it."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        raise ToolchainError("the package openvino is not installed")
    return Path(spec.origin).resolve().parent


@lru_cache(maxsize=1)
def _devices_here() -> Mapping[str, str | None]:
    """What the worker sees, in a child: a plugin of a broken driver may take the process down."""
    with child_folder() as folder:
        try:
            run_process(
                [*module_command(WORKER), "--devices"],
                folder=folder,
                timeout_s=PROBE_TIMEOUT_S,
                env=PACKAGE_PATH,
            )
        except ToolchainError as exc:
            return {"error": str(exc)}
        answer = read_answer((folder / STDOUT_FILE).read_text(encoding="utf-8", errors="replace"))
    return (
        answer if answer is not None else {"error": "OpenVINO's NPU plugin ended the process that asked it"}
    )


def read_answer(log: str) -> dict[str, str | None] | None:
    """The last `@@{json}` line of a harness's output; None where there is none that is whole."""
    for line in reversed(log.splitlines()):
        if line.startswith("@@"):
            try:
                answer = json.loads(line[2:], strict=False)
            except json.JSONDecodeError:
                return None
            return answer if isinstance(answer, dict) else None
    return None
