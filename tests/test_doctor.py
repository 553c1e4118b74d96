"""What `vinoopt doctor` says: devices here, targets in reach, and how to get the others."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from vinoopt.cli.doctor import command, reach_lines
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
            else (each.families, each.hardware, each.device_id, each.architecture, each.min_driver)
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


def told(routes: tuple[Availability, ...]) -> list[str]:
    """What doctor says of an NPU with these routes."""
    first = next((each for each in routes if each.ok), routes[0])
    reach = Reach(kind=Device.NPU, what="platform 4000", profiles=("p",), availability=first, routes=routes)
    return [line.strip() for line in reach_lines(reach)][1:]


def test_routes_are_told_in_the_order_in_which_they_are_tried_whether_or_not_one_works():
    driver = Availability(ok=False, name="NPU driver", reason="no NPU here")
    library, wine = (Availability(ok=True, name=name, version="2026.4") for name in ("library", "wine"))
    assert told((driver, library, wine)) == [
        "not by NPU driver: no NPU here",
        "by library 2026.4",
        "else by wine 2026.4",
    ]
    assert told((driver,)) == ["not by NPU driver: no NPU here"]


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
    platforms = [each for each in found["reach"] if each["kind"] == "NPU"]
    assert platforms
    assert all(len(each["routes"]) == 4 for each in platforms)
    for each in found["reach"]:
        assert each["availability"]["ok"] or each["availability"]["fix"], each
    text = CliRunner().invoke(command).stdout
    for each in survey().missing:
        assert f"{each.kind}: {each.availability.fix}" in text
