"""Records are strict, frozen, and come back from JSON as they went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vinoopt import serde
from vinoopt.errors import InputError, TargetError, VinooptError
from vinoopt.records import (
    CompileRequest,
    CompressionPlan,
    Device,
    GroupWidth,
    HardwareProfile,
    Precision,
    QuantizationPlan,
    RuntimeProperties,
    Target,
)


@pytest.mark.parametrize(
    ("text", "profile", "device"),
    [
        ("lunar-lake:NPU", "lunar-lake", Device.NPU),
        ("lunar-lake:vpu", "lunar-lake", Device.NPU),
        ("alder-lake:iGPU", "alder-lake", Device.GPU),
        ("host", "host", Device.CPU),
        ("my/box.toml:cpu", "my/box.toml", Device.CPU),
        ("my/box.toml", "my/box.toml", Device.CPU),
        (r"C:\boxes\one.toml", r"C:\boxes\one.toml", Device.CPU),
    ],
)
def test_a_target_reads_profile_and_device(text: str, profile: str, device: Device) -> None:
    target = Target.parse(text)
    assert (target.profile, target.device) == (profile, device)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["lunar-lake:TPU", ":CPU", ""])
def test_a_target_with_an_unknown_device_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="PROFILE:DEVICE"):
        Target.parse(text)


plans = st.builds(
    CompressionPlan,
    widths=st.lists(
        st.builds(GroupWidth, group=st.text(max_size=5), kept=st.lists(st.integers(0, 9)).map(tuple)), max_size=2
    ).map(tuple),
    quantization=st.none()
    | st.builds(QuantizationPlan, float_layers=st.lists(st.text(max_size=4), max_size=2).map(tuple)),
    float_precision=st.sampled_from(Precision),
)


@given(plans)
def test_a_plan_survives_json(plan: CompressionPlan) -> None:
    assert serde.from_json(CompressionPlan, serde.to_json(plan), where="test") == plan
    assert serde.sha256_record(plan) == serde.sha256_record(plan.model_copy())


def test_records_cannot_be_changed() -> None:
    plan = CompressionPlan()
    with pytest.raises(ValidationError):
        plan.float_precision = Precision.BF16  # type: ignore[misc]
    assert serde.replace(plan, float_precision=Precision.BF16).float_precision is Precision.BF16
    with pytest.raises(TypeError, match="no field presett"):
        serde.replace(plan, presett=1)


def test_an_unknown_key_names_the_nearest_one() -> None:
    spec = {"kind": "CPU", "name": "x", "architecture": "y", "precisions": ["f32"], "channel_multipel": 8}
    mapping = {"name": "a", "title": "b", "family": "c", "devices": {"CPU": spec}}
    with pytest.raises(InputError) as caught:
        serde.from_mapping(HardwareProfile, mapping, where="box.toml")
    expected = 'box.toml: unknown key "devices.CPU.channel_multipel"; did you mean "channel_multiple"?'
    assert expected in str(caught.value)


def test_a_wrong_value_is_named_with_its_place() -> None:
    with pytest.raises(InputError, match=r'request: "budget.max_drop".*greater than or equal to 0'):
        serde.from_mapping(CompileRequest, {"model": "m", "targets": [], "budget": {"max_drop": -1}}, where="request")


def test_runtime_properties_are_sorted_and_come_back() -> None:
    properties = RuntimeProperties.of({"NUM_STREAMS": 2, "INFERENCE_PRECISION_HINT": "f32"})
    assert [key for key, _ in properties.items] == ["INFERENCE_PRECISION_HINT", "NUM_STREAMS"]
    assert properties.as_dict() == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2"}


def test_every_error_has_an_exit_code_and_is_in_the_drawing() -> None:
    import vinoopt.errors as errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, VinooptError)]
    assert {c.exit_code for c in classes} == {1, 2}
    assert all(c.__name__ in (errors.__doc__ or "") for c in classes)
