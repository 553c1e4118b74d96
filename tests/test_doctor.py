"""What `vinoopt doctor` says: devices here, targets in reach, and how to get the others."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from vinoopt.cli.doctor import command
from vinoopt.hardware.profile import list_profiles
from vinoopt.records import Availability, CpuOffline, Device, GpuOffline, NpuOffline
from vinoopt.toolchains.cpu_isa import CpuIsaToolchain
from vinoopt.toolchains.survey import Reach, Survey, alike, survey


def test_every_device_that_openvino_serves_is_in_one_group():
    groups = alike()
    grouped = sorted((profile, group.kind.value) for group in groups for profile in group.members)
    shipped = sorted(
        (profile.name, kind.value)
        for profile in list_profiles()
        for kind, spec in profile.devices.items()
        if spec.last_openvino is None
    )
    assert grouped == shipped


def test_what_is_in_a_group_stands_or_falls_together():
    for group in alike():
        offline = [spec.offline for spec in group.members.values()]
        traits = {
            each.isa_cap
            if isinstance(each, CpuOffline)
            else each.platform
            if isinstance(each, NpuOffline)
            else (each.architecture, each.has_int8, each.has_xmx, each.min_driver)
            if isinstance(each, GpuOffline)
            else None
            for each in offline
        }
        assert len(traits) == 1, group


def test_missing_is_what_has_no_toolchain():
    yes = Availability(ok=True, name="cap")
    no = Availability(ok=False, name="driver", reason="none", fix="install it")
    reach = tuple(
        Reach(kind=kind, what=str(kind), profiles=("p",), availability=state)
        for kind, state in ((Device.CPU, yes), (Device.GPU, no))
    )
    found = Survey.model_construct(host=None, matched_profile=None, reach=reach)
    assert [each.kind for each in found.missing] == [Device.GPU]


def test_wheel_without_install_is_a_usage_error():
    answer = CliRunner().invoke(command, ["--wheel", "some.whl"])
    assert answer.exit_code == 2
    assert "--install npu" in answer.output


@pytest.mark.slow
@pytest.mark.offline
def test_doctor_on_this_machine():
    found = json.loads(CliRunner().invoke(command, ["--json"]).stdout)
    caps = {each["what"]: each["availability"]["ok"] for each in found["reach"] if each["kind"] == "CPU"}
    for group in alike():
        if group.kind is Device.CPU:
            assert caps[group.what] is CpuIsaToolchain().probe(next(iter(group.members.values()))).ok
    assert found["host"]["devices"]["CPU"]
    for each in found["reach"]:
        assert each["availability"]["ok"] or each["availability"]["fix"], each
    text = CliRunner().invoke(command).stdout
    for each in survey().missing:
        assert f"{each.kind}: {each.availability.fix}" in text
