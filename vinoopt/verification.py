"""Whether a bundle still does on this machine what it did where it was compiled."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from vinoopt.alarm import make_interrupts_safe
from vinoopt.bench import Contestant, MeasureConfig, measure
from vinoopt.bundle import GOLDEN, Bundle, damaged_files, golden_inputs, replace_blob, replay_in_child
from vinoopt.errors import DeviceError, ProfileError, ToolchainError, VinooptError
from vinoopt.hardware.detect import fingerprint, match_host
from vinoopt.hardware.profile import HOST, load_profile
from vinoopt.records import (
    Evidence,
    HostFingerprint,
    Measurement,
    Record,
    RuntimeProperties,
    TargetResult,
    Word,
)
from vinoopt.replay import BLOB
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS, compatibility
from vinoopt.tuning import Variant, first_departure

MEASURE_SECONDS = 3.0
SLOWER = 1.25
"""On the same machine a bundle that takes so many times as long as when it was compiled is worth a warning."""


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
    then: Measurement | None = None
    """What the manifest says, where times were compared."""
    now: Measurement | None = None


class Verification(Record):
    """All checks of a bundle on this machine, and what follows from them."""

    bundle: str
    checks: tuple[Check, ...]
    ok: bool
    """No check failed, and at least one target was replayed."""
    verdict: str
    reasons: tuple[str, ...] = ()
    """What stands behind the verdict, the gravest first; empty where every check passed."""


def verify(bundle: Bundle, *, seconds: float = MEASURE_SECONDS, rebuild: bool = False) -> Verification:
    """Check a bundle on the machine that will run it, target by target; no check stops those behind it.

    Checksums, versions, and for every target that this machine is and whose device is here: what the device says to
    the requirements that the model was compiled with; whether its blob can be imported, else whether its IR can be
    compiled instead; the golden outputs, with the first layer that departs where they do; and the latency now beside
    the one in the manifest, measured for `seconds` (0: not at all). With `rebuild` a blob that no longer fits is
    replaced by one that is compiled here. A damaged file is never opened by a device.
    """
    make_interrupts_safe()
    damaged = damaged_files(bundle)
    checks = [_files(bundle, damaged), _version(bundle)]
    for result in bundle.manifest.targets:
        visit = _Visit(bundle=bundle, result=result, damaged=damaged, seconds=seconds, rebuild=rebuild)
        checks += visit.checks()
    return _verdict(bundle, tuple(checks))


def _verdict(bundle: Bundle, checks: tuple[Check, ...]) -> Verification:
    def of(state: CheckState) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in checks if check.state is state]

    failed, warned, unchecked = map(of, (CheckState.FAILED, CheckState.WARNING, CheckState.NOT_CHECKED))
    ran = any(check.name.startswith("replay") and check.state is CheckState.PASSED for check in checks)
    if failed:
        verdict = f"do not deploy: {failed[0]}"
    elif not ran:
        verdict = f"not verified: {unchecked[0] if unchecked else 'the bundle has no target'}"
    elif warned:
        verdict = f"fit for this machine, with a warning: {warned[0]}"
    else:
        verdict = "fit for this machine"
    return Verification(
        bundle=str(bundle.path),
        checks=checks,
        ok=not failed and ran,
        verdict=verdict,
        reasons=(*failed, *warned, *unchecked),
    )


def _files(bundle: Bundle, damaged: tuple[str, ...]) -> Check:
    if damaged:
        return Check(name="files", state=CheckState.FAILED, detail="; ".join(damaged))
    count = len(bundle.manifest.files)
    return Check(name="files", state=CheckState.PASSED, detail=f"{count} files are as they were written")


def _version(bundle: Bundle) -> Check:
    then, now = bundle.manifest.host.versions.get("openvino", "unknown"), ov.__version__
    same = then.split("-")[0] == now.split("-")[0]
    detail = f"OpenVINO {now}" if same else f"compiled with OpenVINO {then}, here is {now}: the replay decides"
    return Check(name="versions", state=CheckState.PASSED if same else CheckState.WARNING, detail=detail)


# --------------------------------------------------------------------------- one target


@dataclass(frozen=True, kw_only=True, slots=True)
class _Visit:
    """The checks of one target on this machine."""

    bundle: Bundle
    result: TargetResult
    damaged: tuple[str, ...]
    seconds: float
    rebuild: bool

    @property
    def device(self) -> str:
        return self.result.target.device.value

    def checks(self) -> Iterator[Check]:
        """Every check that can be made here, in the order in which they build on each other."""
        if why := _mismatch(self.result.target.profile):
            yield self._check("replay", CheckState.NOT_CHECKED, why)
            return
        here = {device.partition(".")[0] for device in ov.Core().available_devices}
        if self.device not in here:
            yield self._check("replay", CheckState.NOT_CHECKED, f"this machine has no {self.device}")
            return
        own = [name for name in self.damaged if name.startswith((f"{self.result.target.slug}/", GOLDEN))]
        if own:
            yield self._check("replay", CheckState.NOT_CHECKED, f"not opened: {own[0]}")
            return
        if self.result.build.blob is not None:
            yield self._blob()
        replayed, answer = self._replayed()
        yield from self._requirements(answer)
        yield replayed
        if self.seconds > 0 and replayed.state is CheckState.PASSED:
            yield self._speed()

    def _check(self, name: str, state: CheckState, detail: str) -> Check:
        return Check(name=f"{name} {self.result.target}", state=state, detail=detail)

    def _replayed(self) -> tuple[Check, dict[str, Any]]:
        """The IR compiled here with its properties, run on the golden inputs."""
        try:
            answer = replay_in_child(self.bundle.path, self.result)
        except (ToolchainError, DeviceError) as exc:
            return self._check("replay", CheckState.FAILED, str(exc).splitlines()[0]), {}
        words, is_near = _nearness(answer)
        if is_near:
            return self._check("replay", CheckState.PASSED, words), answer
        return self._check("replay", CheckState.FAILED, words + self._where()), answer

    def _where(self) -> str:
        """The first layer that departs from the same model in f32 on the CPU, as the end of a sentence."""
        place = self.bundle.path / self.result.target.slug / "model.xml"
        try:
            model = ov.Core().read_model(place)
            device = Variant(model=model, device=self.device, properties=self.result.properties.as_dict())
            found = first_departure(Variant(model=model), device, golden_inputs(self.bundle.path))
        except (RuntimeError, DeviceError):  # a device that fails was told by the replay itself
            return ""
        if found is None:
            return "; no layer departs from the same model in f32 on the CPU: model and golden outputs disagree"
        return f"; against f32 on the CPU it {found.sentence}"

    def _requirements(self, answer: dict[str, Any]) -> Iterator[Check]:
        """What the device says to the requirements kept in the manifest; nothing where there are none."""
        then, now = self.result.build.details.get(RUNTIME_REQUIREMENTS), answer.get("requirements")
        if then is None:
            return
        said = compatibility(self.device, then)
        if said is not None:
            state = {"supported": CheckState.PASSED, "unsupported": CheckState.WARNING}.get(
                said, CheckState.NOT_CHECKED
            )
            yield self._check("requirements", state, f'"{then}": {said}, says {self.device}')
        elif now is None:
            yield self._check("requirements", CheckState.NOT_CHECKED, f"{self.device} does not tell its own")
        elif then == now:
            yield self._check("requirements", CheckState.PASSED, f'the same as there: "{now}"')
        else:
            detail = f'compiled for "{then}", here it is "{now}": the replay decides'
            yield self._check("requirements", CheckState.WARNING, detail)

    def _blob(self) -> Check:
        """Whether the blob runs here, else whether one compiled from the IR does."""
        try:
            answer = replay_in_child(self.bundle.path, self.result, file=BLOB)
        except (ToolchainError, DeviceError) as exc:
            return self._recompiled(_reason(exc))
        words, is_near = _nearness(answer)
        if is_near:
            return self._check("blob", CheckState.PASSED, f"imported; {words}")
        return self._recompiled(f"its {words}")

    def _recompiled(self, why: str) -> Check:
        with tempfile.TemporaryDirectory() as folder:
            blob = Path(folder) / BLOB
            try:
                answer = replay_in_child(self.bundle.path, self.result, export=blob)
            except (ToolchainError, DeviceError) as exc:
                detail = f"does not fit: {why}; nor can the IR be compiled: {_reason(exc)}"
                return self._check("blob", CheckState.FAILED, detail)
            words, is_near = _nearness(answer)
            if not is_near:
                return self._check("blob", CheckState.FAILED, f"does not fit: {why}; recompiled from IR, {words}")
            after = "run the IR, or replace the blob with --rebuild"
            if self.rebuild:
                replace_blob(self.bundle, self.result, blob, requirements=answer["requirements"])
                after = "the blob was replaced"
        detail = f"does not fit: {why}; recompiled from IR here, {words}: {after}"
        return self._check("blob", CheckState.WARNING, detail)

    def _speed(self) -> Check:
        """Latency with the target's properties now, beside what the manifest says."""
        place = self.bundle.path / self.result.target.slug / "model.xml"
        contestant = Contestant(
            name="now", model=place, device=self.device, properties=self.result.properties.as_dict()
        )
        try:
            inputs = golden_inputs(self.bundle.path)
            measured = measure([contestant], inputs, config=MeasureConfig(seconds=self.seconds))
        except VinooptError as exc:
            return self._check("speed", CheckState.WARNING, f"could not be measured: {_reason(exc)}")
        now, then = measured.of("now"), _then(self.result)
        words = f"{now.latency_p50_ms:.3g} ms here"
        if then is None:
            return self._check("speed", CheckState.PASSED, f"{words}; the manifest has no figure").model_copy(
                update={"now": now}
            )
        words += f", {then.latency_p50_ms:.3g} ms ({then.evidence}) in the manifest"
        state, more = self._judged(now, then)
        notes = "".join(f"; {warning}" for warning in measured.warnings)
        return self._check("speed", state, words + more + notes).model_copy(update={"now": now, "then": then})

    def _judged(self, now: Measurement, then: Measurement) -> tuple[CheckState, str]:
        there, here = self.result.host or self.bundle.manifest.host, fingerprint()
        ratio = now.latency_p50_ms / then.latency_p50_ms
        if then.evidence is not Evidence.MEASURED:
            return CheckState.PASSED, f" ({ratio:.2f} times that)"
        if not _is_alike(there, here):
            return CheckState.PASSED, f", which is of another machine: {there.cpu}, {there.cores} cores"
        if _apart(then.properties, now.properties):
            told = "which does not tell its properties" if then.properties is None else "taken with other properties"
            return CheckState.PASSED, f", {told} than those of the bundle: no yardstick ({ratio:.2f} times that)"
        if ratio > SLOWER:
            return CheckState.WARNING, f": {ratio:.2f} times as long on the same kind of machine"
        return CheckState.PASSED, f" of the same kind of machine ({ratio:.2f} times that)"


def _nearness(answer: dict[str, Any]) -> tuple[str, bool]:
    """In words how far a replay departs, and whether that is within its tolerance."""
    departure, tolerance = float(answer["departure"]), float(answer["tolerance"])
    differing, limit = float(answer["disagreement"]), float(answer["choice_tolerance"])
    words = f"outputs depart from the golden ones by {departure:.2g} of their range (tolerance {tolerance:g}), "
    if differing:
        words += f"{differing:.2g} of the ids or selected rows differ (tolerance {limit:g}), "
    return f"{words}{answer['calls']} calls", departure <= tolerance and differing <= limit


def _mismatch(profile: str) -> str:
    """Why a target of this profile is not this machine; empty where it is, or where that cannot be told."""
    if profile in (HOST, match_host()):
        return ""
    try:
        patterns = load_profile(profile).cpu_match
    except ProfileError:  # a file of the machine that compiled it
        return ""
    cpu = fingerprint().cpu
    plain = re.sub(r"\((R|TM)\)", "", cpu, flags=re.IGNORECASE)
    is_match = not patterns or any(re.search(each, plain, re.IGNORECASE) for each in patterns)
    return "" if is_match else f"it is for {profile}, and this machine is {cpu}"


def _is_alike(one: HostFingerprint, other: HostFingerprint) -> bool:
    return (one.cpu, one.cores, one.devices) == (other.cpu, other.cores, other.devices)


def _apart(then: RuntimeProperties | None, now: RuntimeProperties | None) -> bool:
    """Whether two figures are not known to be of the same properties."""
    return then is None or now is None or then.items != now.items


def _reason(exc: Exception) -> str:
    """The line of an error that says something."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("[", "RuntimeError"))]
    return (telling or lines or [type(exc).__name__])[-1]


def _then(result: TargetResult) -> Measurement | None:
    """The manifest's measurement of what was chosen: it is the candidate of every comparison."""
    names = {each.candidate for each in result.comparisons} or {each.name for each in result.measurements[:1]}
    return next((each for each in result.measurements if each.name in names), None)
