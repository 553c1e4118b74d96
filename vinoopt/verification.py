"""Whether a bundle still does on this machine what it did where it was compiled."""

from __future__ import annotations

import openvino as ov

from vinoopt.bundle import Bundle, damaged_files, replay_in_child
from vinoopt.errors import DeviceError, ToolchainError
from vinoopt.records import Record, TargetResult, Word


class CheckState(Word):
    """How a check ended."""

    PASSED = "passed"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


class Check(Record):
    """One check of a bundle."""

    name: str
    state: CheckState
    detail: str


class Verification(Record):
    """All checks of a bundle on this machine, and what follows from them."""

    bundle: str
    checks: tuple[Check, ...]
    ok: bool
    """No check failed, and at least one target was replayed."""
    verdict: str


def verify(bundle: Bundle) -> Verification:
    """Check files, versions and golden outputs of every target whose device is on this machine."""
    checks = [_files(bundle), _version(bundle)]
    replayed = [_replay(bundle, result) for result in bundle.manifest.targets]
    checks += replayed
    failed = [check for check in checks if check.state is CheckState.FAILED]
    ran = any(check.state is CheckState.PASSED for check in replayed)
    if failed:
        verdict = f"do not deploy: {failed[0].name}: {failed[0].detail}"
    elif not ran:
        verdict = "not verified: none of the bundle's devices is on this machine"
    else:
        verdict = "fit for this machine"
    return Verification(bundle=str(bundle.path), checks=tuple(checks), ok=not failed and ran, verdict=verdict)


def _files(bundle: Bundle) -> Check:
    problems = damaged_files(bundle)
    if problems:
        return Check(name="files", state=CheckState.FAILED, detail="; ".join(problems))
    count = len(bundle.manifest.files)
    return Check(name="files", state=CheckState.PASSED, detail=f"{count} files are as they were written")


def _version(bundle: Bundle) -> Check:
    then, now = bundle.manifest.host.versions.get("openvino", "unknown"), ov.__version__
    same = then.split("-")[0] == now.split("-")[0]
    detail = f"OpenVINO {now}" if same else f"compiled with OpenVINO {then}, here is {now}: the replay decides"
    return Check(name="versions", state=CheckState.PASSED if same else CheckState.WARNING, detail=detail)


def _replay(bundle: Bundle, result: TargetResult) -> Check:
    name = f"replay {result.target}"
    here = {device.partition(".")[0] for device in ov.Core().available_devices}
    if result.target.device.value not in here:
        return Check(
            name=name, state=CheckState.NOT_CHECKED, detail=f"this machine has no {result.target.device}"
        )
    try:
        answer = replay_in_child(bundle.path, result)
    except (ToolchainError, DeviceError) as exc:
        return Check(name=name, state=CheckState.FAILED, detail=str(exc).splitlines()[0])
    departure, tolerance = float(answer["departure"]), float(answer["tolerance"])
    detail = f"outputs depart from the golden ones by {departure:.2g} of their range (tolerance {tolerance:g})"
    state = CheckState.PASSED if departure <= tolerance else CheckState.FAILED
    return Check(name=name, state=state, detail=f"{detail}, {answer['calls']} calls")
