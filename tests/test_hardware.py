from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from click.testing import CliRunner
from openvino import opset13 as ops

from vinoopt import serde
from vinoopt.cli.profiles import profiles
from vinoopt.errors import ProfileError, TargetError
from vinoopt.hardware import isa
from vinoopt.hardware.detect import cpu_flags, detect_host, fingerprint, free_bytes, match_cpu, match_host
from vinoopt.hardware.isa import saturates_int8
from vinoopt.hardware.profile import (
    check_profile,
    diff_profiles,
    list_profiles,
    load_profile,
    profiles_folder,
    resolve,
)
from vinoopt.records import (
    CpuOffline,
    Device,
    GpuOffline,
    HardwareProfile,
    NpuOffline,
    Precision,
    Target,
)

NAMES = [profile.name for profile in list_profiles()]

MINIMAL = """
schema = 1
title = "a board"
family = "boards"
sources = ["data sheet, table 1"]

[devices.CPU]
name = "board CPU"
architecture = "AVX2"
precisions = ["f32"]
channel_multiple = 8
bandwidth_gb_per_s = { value = 20, source = "data sheet, table 1" }
peak_gops = { f32 = { value = 100, source = "data sheet, table 1" } }
offline = { isa_cap = "AVX2" }
"""

GPU = """
[devices.GPU]
name = "board GPU"
architecture = "Xe-LP"
precisions = ["int8", "f16", "f32"]
channel_multiple = 16
bandwidth_gb_per_s = { value = 20, source = "s" }
peak_gops = { f16 = { value = 100, source = "s" } }

[devices.GPU.offline]
families = ["adls"]
hardware = "1x2x16"
device_id = "0x4680"
min_driver = "22.43"
architecture = "12.2"
has_int8 = true
has_xmx = false
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "board.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --------------------------------------------------------------------------- shipped profiles


def test_at_least_25_products_and_no_family_are_listed():
    assert len(NAMES) >= 25
    assert sorted(NAMES) == NAMES
    assert not [name for name in NAMES if name.startswith("family-")]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_is_complete(name: str):
    profile = load_profile(name)
    findings = check_profile(profiles_folder() / f"{name}.toml")
    assert [f.message for f in findings if f.severity == "error"] == []
    assert profile.name == name
    for spec in profile.devices.values():
        figures = [spec.memory_bytes, spec.bandwidth_gb_per_s, *spec.peak_gops.values()]
        assert all(figure.source.strip() for figure in figures if figure is not None)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_survives_json(name: str):
    profile = load_profile(name)
    assert serde.from_json(HardwareProfile, serde.to_json(profile), where=name) == profile


def test_lunar_lake_has_the_memory_and_the_tiles_of_its_number():
    found = {
        name: (
            profile.devices[Device.CPU].memory_bytes.value / 2**30,
            profile.devices[Device.NPU].tuning["NPU_TILES"][-1],
        )
        for name in ("lunar-lake", "lunar-lake-226v", "lunar-lake-228v", "lunar-lake-256v")
        for profile in [load_profile(name)]
    }
    assert list(found.values()) == [(32, "6"), (16, "5"), (32, "5"), (16, "6")]


def test_peaks_grow_as_formats_shrink():
    order = [Precision.F32, Precision.F16, Precision.INT8]
    for profile in list_profiles():
        for spec in profile.devices.values():
            peaks = [spec.peak_gops[p].value for p in order if p in spec.peak_gops]
            assert peaks == sorted(peaks), f"{profile.name}:{spec.kind}"


@pytest.mark.parametrize(
    ("name", "architecture", "units", "int8", "xmx"),
    [
        ("skylake", "9.0", 24, False, False),
        ("coffee-lake", "9.2", 24, False, False),
        ("ice-lake", "11.0", 64, False, False),
        ("tiger-lake", "12.0", 96, True, False),
        ("alder-lake", "12.2", 32, True, False),
        ("alder-lake-p", "12.3", 96, True, False),
        ("arrow-lake-s", "12.70", 64, True, False),
        ("arrow-lake-h", "12.74", 128, True, True),
        ("lunar-lake", "20.4", 64, True, True),
        ("panther-lake-h", "30.0", 96, True, True),
    ],
)
def test_gpu_identity(name: str, architecture: str, units: int, int8: bool, xmx: bool):
    offline = load_profile(name).devices[Device.GPU].offline
    assert isinstance(offline, GpuOffline)
    assert (offline.architecture, offline.execution_units) == (architecture, units)
    assert (offline.has_int8, offline.has_xmx) == (int8, xmx)
    assert (Precision.INT8 in load_profile(name).devices[Device.GPU].precisions) is int8


@pytest.mark.parametrize(
    ("name", "platform"),
    [("meteor-lake-h", "3720"), ("arrow-lake-s", "3720"), ("lunar-lake", "4000"), ("panther-lake-h", "5010")],
)
def test_npu_platform(name: str, platform: str):
    offline = resolve(Target(profile=name, device=Device.NPU)).offline
    assert isinstance(offline, NpuOffline)
    assert offline.platform == platform


@pytest.mark.parametrize(
    ("name", "cap", "vnni"),
    [
        ("elkhart-lake", "SSE41", False),
        ("skylake", "AVX2", False),
        ("skylake-sp", "AVX512_CORE", False),
        ("ice-lake", "AVX512_CORE_VNNI", True),
        ("alder-lake-n100", "AVX2_VNNI", True),
        ("lunar-lake", "AVX2_VNNI_2", True),
        ("sapphire-rapids", "AVX512_CORE_AMX", True),
    ],
)
def test_cpu_instruction_set(name: str, cap: str, vnni: bool):
    spec = resolve(Target(profile=name, device=Device.CPU))
    assert spec.offline == CpuOffline(isa_cap=cap)
    assert (Precision.INT8 in spec.precisions) is vnni


def test_openvino_accepts_every_value_of_the_cpu_tuning_space():
    data = ops.parameter([1, 4], np.float32)
    model = ov.Model([ops.relu(data)], [data], "m")
    specs = [profile.devices.get(Device.CPU) for profile in list_profiles()]
    space = {
        (k, v) for spec in specs if spec is not None for k, values in spec.tuning.items() for v in values
    }
    assert len(space) >= 4
    for key, value in sorted(space):
        ov.Core().compile_model(model, "CPU", {key: value})


# --------------------------------------------------------------------------- finding and merging


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ProfileError, match=r'"lunar-lak".*did you mean "lunar-lake"'):
        load_profile("lunar-lak")


def test_unlike_name_gets_no_guess():
    with pytest.raises(ProfileError, match='"zzz"\\. `vinoopt profiles list`'):
        load_profile("zzz")


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ProfileError, match="no such file"):
        load_profile(str(tmp_path / "absent.toml"))


def test_own_file_takes_its_name_from_the_file(write):
    profile = load_profile(str(write(MINIMAL, "my-board.toml")))
    assert profile.name == "my-board"
    assert profile.devices[Device.CPU].kind is Device.CPU


def test_own_file_inherits_from_a_shipped_product(write):
    path = write('schema = 1\ninherits = "lunar-lake"\ntitle = "mine"\n[devices.CPU]\ncores = 6\n')
    mine, parent = load_profile(str(path)), load_profile("lunar-lake")
    assert (mine.name, mine.title) == ("board", "mine")
    assert mine.devices[Device.CPU].cores == 6
    assert mine.devices[Device.CPU].peak_gops == parent.devices[Device.CPU].peak_gops
    assert mine.devices[Device.NPU] == parent.devices[Device.NPU]
    changed = {row.entry for row in diff_profiles(mine, parent)}
    assert changed == {"name", "title", "devices.CPU.cores"}


def test_file_inherits_from_a_file_beside_it(write):
    write(MINIMAL, "base.toml")
    path = write('schema = 1\ninherits = "base.toml"\ntitle = "mine"\n')
    assert load_profile(str(path)).devices[Device.CPU].name == "board CPU"


def test_a_new_value_does_not_keep_the_old_source(write):
    write(MINIMAL, "base.toml")
    path = write('schema = 1\ninherits = "base.toml"\n[devices.CPU]\nbandwidth_gb_per_s = { value = 40 }\n')
    with pytest.raises(ProfileError, match=r'board.toml: "devices.CPU.bandwidth_gb_per_s.source" is missing'):
        load_profile(str(path))


def test_circles_are_refused(write):
    write('schema = 1\ninherits = "b.toml"\n', "a.toml")
    path = write('schema = 1\ninherits = "a.toml"\n', "b.toml")
    with pytest.raises(ProfileError, match=r"b.toml -> a.toml -> b.toml"):
        load_profile(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 'x'\n", "schema = None; this version reads schema = 1"),
        ("schema = 2\n", "schema = 2"),
        ("schema = 1\ninherits = ['a']\n", "one name or path"),
        ("schema = 1\ninherits = 'lunar-lke'\n", 'did you mean "lunar-lake"'),
        ("schema = 1\nabstract = true\ninherits = 'lunar-lake'\n", "is for inheriting"),
        ("schema = [", "not valid TOML"),
        (MINIMAL.replace("channel_multiple", "chanel_multiple"), 'did you mean "channel_multiple"'),
        (MINIMAL.replace("isa_cap", "isa"), "devices.CPU.offline"),
        (MINIMAL.replace("{ value = 20, source", "{ value = 20, origin"), "bandwidth_gb_per_s"),
        (MINIMAL.replace('"f32"]', '"float"]'), "devices.CPU.precisions"),
        (MINIMAL.replace("[devices.CPU]", "[devices.CPU]\nkind = 'GPU'"), "leave the kind out"),
    ],
)
def test_malformed_file_says_where_and_why(write, text: str, message: str):
    with pytest.raises(ProfileError, match=re.escape(message)):
        load_profile(str(write(text)))


def test_slip_in_one_offline_table_is_reported_once(write):
    path = write(MINIMAL + GPU.replace("families", "family"))
    messages = [finding.message for finding in check_profile(path)]
    assert len(messages) == 2  # the unknown key and the missing one
    assert any('unknown key "family"; did you mean "families"' in message for message in messages)


def test_missing_device_says_what_is_there():
    with pytest.raises(TargetError, match=r"has no NPU; it has skylake:CPU, skylake:GPU"):
        resolve(Target.parse("skylake:NPU"))


def test_device_whose_support_has_ended():
    with pytest.raises(TargetError, match=r"OpenVINO 2022\.3 was the last release"):
        resolve(Target.parse("neural-compute-stick-2:VPU"))


# --------------------------------------------------------------------------- checking


def test_complete_file_has_no_findings(write):
    assert check_profile(write(MINIMAL + GPU)) == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (('isa_cap = "AVX2"', 'isa_cap = "AVX3"'), "PROFILE_ISA"),
        (('"1x2x16"', '"1x2"'), "PROFILE_GPU"),
        (('"1x2x16"', '"99x99x99"'), "PROFILE_GPU"),
        (('"1x2x16"', '"16x16x16"'), "PROFILE_GPU"),
        (('"0x4680"', '"4680"'), "PROFILE_GPU"),
        (('"22.43"', '"22"'), "PROFILE_GPU"),
        (('"12.2"', '"12"'), "PROFILE_GPU"),
        (('["adls"]', "[]"), "PROFILE_GPU"),
        (("f16 = {", "bf16 = {"), "PROFILE_FIGURE"),
        (("value = 100", "value = 0"), "PROFILE_FIGURE"),
        (("value = 20", "value = inf"), "PROFILE_FIGURE"),
        (("value = 20", "value = nan"), "PROFILE_FIGURE"),
        (("channel_multiple = 8", "channel_multiple = 8\ncores = 0"), "PROFILE_FIGURE"),
        (('precisions = ["f32"]', 'precisions = ["f32", "f32"]'), "PROFILE_PRECISIONS"),
        (('sources = ["data sheet, table 1"]', "sources = []"), "PROFILE_SOURCES"),
        (('title = "a board"', 'title = "a board"\ncpu_match = ["("]'), "PROFILE_MATCH"),
        (('title = "a board"', 'title = "a board"\nname = "My Board"'), "PROFILE_NAME"),
    ],
)
def test_wrong_content_is_found(write, change: tuple[str, str], code: str):
    text = MINIMAL + GPU
    assert change[0] in text
    path = write(text.replace(*change))
    findings = [finding for finding in check_profile(path) if finding.severity == "error"]
    assert code in [finding.code for finding in findings]
    with pytest.raises(ProfileError, match=re.escape(findings[0].message)):
        load_profile(str(path))  # and is not used either


def test_a_folder_is_no_profile(tmp_path: Path):
    (tmp_path / "board.toml").mkdir()
    with pytest.raises(ProfileError, match=r"board\.toml: cannot be read"):
        load_profile(str(tmp_path / "board.toml"))


def test_int8_without_vnni_is_a_warning(write):
    text = MINIMAL.replace('precisions = ["f32"]', 'precisions = ["int8", "f32"]')
    path = write(text)
    (finding,) = check_profile(path)
    assert (finding.severity, finding.code) == ("warning", "PROFILE_INT8_SATURATES")
    assert saturates_int8(load_profile(str(path)).devices[Device.CPU])  # the instruction set decides
    assert check_profile(write(text.replace('isa_cap = "AVX2"', 'isa_cap = "AVX2_VNNI"'))) == ()


@pytest.mark.parametrize(
    ("target", "saturates"),
    [("skylake:CPU", True), ("skylake-sp:CPU", True), ("lunar-lake:CPU", False), ("skylake:GPU", False)],
)
def test_what_saturates_follows_from_the_instruction_set(target: str, saturates: bool):
    assert saturates_int8(resolve(Target.parse(target))) is saturates


def test_cpus_of_this_kind_without_a_known_instruction_set_count_as_saturating():
    spec = detect_host().devices[Device.CPU].model_copy(update={"offline": None})
    told = {
        name: saturates_int8(spec.model_copy(update={"architecture": name})) for name in ("x86_64", "aarch64")
    }
    assert told == {"x86_64": True, "aarch64": False}
    if cpu_flags():
        assert saturates_int8(spec) is not bool({"avx512_vnni", "avx_vnni"} & cpu_flags())


def test_unknown_npu_platform_is_found(write):
    npu = '[devices.NPU]\nname = "n"\narchitecture = "n"\nprecisions = ["int8"]\nchannel_multiple = 16\n'
    findings = check_profile(write(MINIMAL + npu + 'offline = { platform = "3900" }\n'))
    assert {finding.code for finding in findings} == {"PROFILE_NPU", "PROFILE_NO_ROOFLINE"}


def test_lacking_figures_are_a_warning(write):
    text = re.sub(r"bandwidth.*\n", "", MINIMAL)
    (finding,) = check_profile(write(text))
    assert (finding.severity, finding.code) == ("warning", "PROFILE_NO_ROOFLINE")
    assert "bandwidth_gb_per_s" in finding.message


@pytest.mark.parametrize("name", NAMES[::6])
def test_a_profile_does_not_differ_from_itself(name: str):
    assert diff_profiles(load_profile(name), load_profile(name)) == ()


# --------------------------------------------------------------------------- this machine


def test_host_profile_tells_the_truth_about_int8():
    host = load_profile("host")
    spec = host.devices[Device.CPU]
    if not cpu_flags():
        pytest.skip("this system lists no CPU flags")
    has_vnni = bool({"avx512_vnni", "avx_vnni"} & cpu_flags())
    assert (Precision.INT8 in spec.precisions) is has_vnni
    assert Precision.F32 in spec.precisions
    assert spec.channel_multiple >= 8
    assert spec.memory_bytes is not None
    assert host.name == "host"


def test_host_resolves_as_a_target():
    assert resolve(Target.parse("host")).name == detect_host().devices[Device.CPU].name


def test_fingerprint_names_what_figures_depend_on():
    found = fingerprint()
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert {"openvino", "nncf", "onnx", "numpy", "vinoopt"} == set(found.versions)
    assert "CPU" in found.devices


def test_match_host_is_a_shipped_profile_or_nothing():
    assert match_host() in {*NAMES, None}


@pytest.mark.parametrize(
    ("brand", "name"),
    [
        ("Intel(R) Core(TM) i5-6500 CPU @ 3.20GHz", "skylake"),
        ("Intel(R) Core(TM) i7-7700 CPU @ 3.60GHz", "kaby-lake"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "coffee-lake"),
        ("Intel(R) Core(TM) i9-9900K CPU @ 3.60GHz", "coffee-lake"),
        ("Intel(R) Core(TM) i7-10700 CPU @ 2.90GHz", "comet-lake"),
        ("Intel(R) Core(TM) i7-1065G7 CPU @ 1.30GHz", "ice-lake"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "tiger-lake"),
        ("11th Gen Intel(R) Core(TM) i7-11800H @ 2.30GHz", "tiger-lake-h"),
        ("11th Gen Intel(R) Core(TM) i7-11700K @ 3.60GHz", "rocket-lake"),
        ("12th Gen Intel(R) Core(TM) i7-12700", "alder-lake"),
        ("12th Gen Intel(R) Core(TM) i7-1260P", "alder-lake-p"),
        ("12th Gen Intel(R) Core(TM) i9-12900HK", "alder-lake-p"),
        ("13th Gen Intel(R) Core(TM) i7-13700", "raptor-lake"),
        ("13th Gen Intel(R) Core(TM) i7-1360P", "raptor-lake-p"),
        ("Intel(R) Core(TM) i7-14700K", "raptor-lake-refresh"),
        ("Intel(R) N100", "alder-lake-n100"),
        ("Intel(R) Processor N97", "alder-lake-n97"),
        ("Intel(R) Core(TM) i3-N305", "alder-lake-n305"),
        ("Intel Atom(R) x6425E Processor @ 2.00GHz", "elkhart-lake"),
        ("Intel(R) Core(TM) Ultra 7 155H", "meteor-lake-h"),
        ("Intel(R) Core(TM) Ultra 7 155U", "meteor-lake-u"),
        ("Intel(R) Core(TM) Ultra 9 285K", "arrow-lake-s"),
        ("Intel(R) Core(TM) Ultra 7 265", "arrow-lake-s"),
        ("Intel(R) Core(TM) Ultra 9 285H", "arrow-lake-h"),
        ("Intel(R) Core(TM) Ultra 7 258V", "lunar-lake"),
        ("Intel(R) Core(TM) Ultra 5 226V", "lunar-lake-226v"),
        ("Intel(R) Core(TM) Ultra X9 388H", "panther-lake-h"),
        ("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", "skylake-sp"),
        ("Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz", "cascade-lake"),
        ("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", "ice-lake-sp"),
        ("Intel(R) Xeon(R) Platinum 8480+", "sapphire-rapids"),
        ("INTEL(R) XEON(R) PLATINUM 8592+", "emerald-rapids"),
        ("Intel(R) Xeon(R) 6980P", "granite-rapids"),
        ("Intel(R) Xeon(R) 6780E", "sierra-forest"),
        ("Intel(R) Xeon(R) Platinum 8380H CPU @ 2.90GHz", None),  # Cooper Lake
        ("Intel(R) Core(TM) i7-6850K CPU @ 3.60GHz", None),  # Broadwell-E
        ("Intel(R) Core(TM) i7-6820HQ CPU @ 2.70GHz", "skylake"),
        ("12th Gen Intel(R) Core(TM) i3-12100F", None),  # no graphics
        ("Intel(R) Core(TM) i9-9900KF CPU @ 3.60GHz", None),
        ("11th Gen Intel(R) Core(TM) i5-11400F @ 2.60GHz", None),
        ("Intel(R) Core(TM) Ultra 7 265KF", None),
        ("13th Gen Intel(R) Core(TM) i9-13900HX", "raptor-lake"),
        ("Intel(R) Core(TM) i9-14900HX", "raptor-lake-refresh"),
        ("Intel(R) Core(TM) Ultra 5 238V", "lunar-lake-228v"),
        ("Intel(R) Core(TM) Ultra 7 256V", "lunar-lake-256v"),
        ("Intel(R) Core(TM) Ultra 5 225U", "meteor-lake-u"),
        ("Intel(R) Core(TM) Ultra 9 386H", "panther-lake-386h"),
        ("Intel(R) N150", "twin-lake-n150"),
        ("Intel(R) N200", "alder-lake-n200"),
        ("AMD EPYC", None),
        ("AMD Ryzen 7 7840U", None),
    ],
)
def test_cpu_is_recognised_as_exactly_one_product(brand: str, name: str | None):
    assert match_cpu(brand) == name
    plain = re.sub(r"\((R|TM)\)", "", brand)
    fitting = [p.name for p in list_profiles() if any(re.search(m, plain, re.I) for m in p.cpu_match)]
    assert fitting == ([name] if name else [])


def test_a_stronger_cpu_runs_all_weaker_caps():
    flags = isa.ISAS["AVX512_CORE_VNNI"].flags | {"sse4_1", "avx2", "fma"}
    assert isa.runnable(flags) == ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI")
    strongest = isa.strongest(flags)
    assert strongest is not None
    assert (strongest.has_vnni, strongest.channel_multiple) == (True, 16)
    assert isa.strongest(frozenset()) is None


# --------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "lunar-lake"], ["detect"], ["diff", "skylake", "kaby-lake"]]
)
def test_commands_print_tables_and_json(arguments: list[str]):
    table = CliRunner().invoke(profiles, arguments)
    assert table.exit_code == 0, table.output
    assert table.output.strip()
    as_json = CliRunner().invoke(profiles, [*arguments, "--json"])
    assert as_json.exit_code == 0
    assert json.loads(as_json.output)


def test_show_prints_sources():
    output = CliRunner().invoke(profiles, ["show", "alder-lake"]).output
    assert "4800 MT/s" in output
    assert "Intel ARK: Core i7-12700" in output


def test_check_command_ends_with_2_for_errors(write):
    path = str(write(MINIMAL))
    good = CliRunner().invoke(profiles, ["check", path])
    assert (good.exit_code, good.output) == (0, f"{path}: complete\n")
    bad = CliRunner().invoke(profiles, ["check", "--json", str(write(MINIMAL.replace("AVX2", "AVX9")))])
    assert bad.exit_code == 2
    (finding,) = json.loads(bad.output)
    assert finding["code"] == "PROFILE_ISA"
    assert finding["file"].endswith("board.toml")


def test_check_takes_many_files_and_says_which_one_is_bad(write, tmp_path):
    good = tmp_path / "good.toml"
    good.write_text(MINIMAL)
    told = CliRunner().invoke(profiles, ["check", str(good), str(write(MINIMAL.replace("AVX2", "AVX9")))])
    assert told.exit_code == 2
    assert "good.toml: complete" in told.output
    assert "board.toml: to be looked at" in told.output


def test_free_memory_is_what_the_narrowest_group_leaves(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    inner = groups / "pod" / "job"
    inner.mkdir(parents=True)
    own.write_text("1:name=systemd:/x\n0::/pod/job\n")

    def limit(group: Path, most: str, used: int, dropped: int) -> None:
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\nactive_file {dropped}\nslab_reclaimable 7\n")

    whole = free_bytes(groups, own)
    assert whole > 1000
    limit(inner, "max", 10, 0)
    assert free_bytes(groups, own) > 1000
    limit(inner, "1000", 600, 100)
    assert free_bytes(groups, own) == 1000 - 600 + 100 + 7
    limit(groups / "pod", "300", 200, 0)
    assert free_bytes(groups, own) == 300 - 200 + 7
    limit(groups / "pod", "300", 900, 0)
    assert free_bytes(groups, own) == 0
    assert free_bytes(groups, tmp_path / "absent") > 1000
