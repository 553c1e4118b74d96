"""Reading the NPU compiler's schedule and log: a recorded one, and any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vinoopt.errors import ToolchainCrashed
from vinoopt.toolchains.npu_compiler import error_lines, refusal_reason
from vinoopt.toolchains.npu_trace import SCHEDULER, read_log, read_schedule

# Written by the compiler of OpenVINO 2026.4.1 for platform 4000 with one tile: image, two convolutions, TopK.
RECORDED_TASKS = [
    ("fetch_dma", "DMA", 0.0, 0.878, ""),
    ("fetch_dma", "DMA", 0.878, 0.878, ""),
    ("start_barrier_sync_dma", "DMA", 1.756, 0.0, ""),
    ("image?t_Parameter/converted_to_f16/fused_dma", "DMA", 1.757, 1.12, ""),
    ("conv1?t_Convolution/fused_constant", "DMA", 2.877, 1.022, ""),
    ("conv2?t_Convolution/fused_constant", "DMA", 3.899, 1.165, ""),
    ("Result_15?t_Result", "DMA", 5.443, 0.879, ""),
    (
        "conv1?t_Convolution/reorder_in_0/PermuteQuantize/cluster_0",
        "DPU",
        2.877,
        0.259,
        "[1x16x16x16xf16, 1x16x16x16xf16]",
    ),
    ("conv1?t_Convolution/cluster_0", "DPU", 3.899, 0.737, "[1x16x16x16xf16, 16x16x3x3xf16]"),
    ("conv2?t_Convolution/cluster_0", "DPU", 5.064, 0.377, "[1x16x16x16xf16, 32x16x3x3xf16]"),
    ("conv1?t_Convolution/reorder_in_0/PermuteQuantize/cluster_0/variant_0", "DPU", 2.877, 0.259, ""),
    ("conv1?t_Convolution/cluster_0/variant_0", "DPU", 3.899, 0.737, ""),
    ("conv2?t_Convolution/cluster_0/variant_0", "DPU", 5.064, 0.377, ""),
    ("best?t_TopK/cluster_0", "Shave", 5.442, 0.0, "[1x1x1x2048xf16, 1x1x1x32768xui8]"),
    ("Result_15?t_Result/converted_to_f32/cluster_0", "Shave", 5.443, 0.0, "[1x1x1x1xf16]"),
]
RECORDED_STATISTICS = {
    "total duration": 6.322,
    "DMA duration": 5.942,
    "DPU duration": 1.373,
    "SW duration": 0.0,
    "DMA duration without overlaps": 4.946,
}
RECORDED_LOG = """
[INFO] 22:38:34.170 [NPU_VCL] Current compiler ID: 2026.5.0-1-a4b1ef7632b-0922.132427-DCI-f45de310cbf.7.10
[WARNING] 22:38:34.499 [inference-execution-analysis]   [Energy] The following SHAVE operations are \
unsupported by VPUNN, which can influence the estimation: [builtin_Convert, builtin_TopK]
[WARNING] 22:38:34.499 [inference-execution-analysis]   There are 2 tasks with invalid cost
[INFO] 22:38:34.520 [dump-statistics-of-task-ops]       Sparse weights - 4 ops
[INFO] 22:38:34.527 [convert-VPUASM-to-NPUReg40XX]   Total number of FPOps: 884736
[INFO] 22:38:34.527 [convert-VPUASM-to-NPUReg40XX]   Total number of INTOps: 4096
[INFO] 22:38:34.527 [convert-VPUASM-to-NPUReg40XX]   Total number of Ops: 888832
"""


def trace(tasks, statistics=RECORDED_STATISTICS):
    events = [
        {"name": name, "cat": kind, "ph": "X", "ts": ts, "dur": dur, "args": {"Input tensors": tensors}}
        for name, kind, ts, dur, tensors in tasks
    ]
    header = {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "DMA"}}
    return {
        "traceEvents": [header, *events],
        "taskStatistics": statistics,
        "workpoint": {"freq": 1850.0, "status": "SIM"},
    }


def test_recorded_schedule_is_read():
    schedule = read_schedule(trace(RECORDED_TASKS))
    assert schedule.total_us == 6.322
    assert schedule.clock_mhz == 1850.0
    assert schedule.engine_us == {"DPU": 1.373, "SHAVE": 0.0, "DMA": 5.942}
    assert schedule.memory_bound == pytest.approx(4.946 / 6.322)
    layers = {layer.name: layer for layer in schedule.layers}
    assert list(layers) == [SCHEDULER, "image", "conv1", "conv2", "best", "Result_15"]
    conv1 = layers["conv1"]
    assert (conv1.type, conv1.precision, conv1.kernel) == ("Convolution", "f16", "DMA+DPU")
    # Workloads of a task are not counted again: the compiler itself says 996 ns DPU and 1022 ns DMA.
    assert conv1.busy_us == {"DPU": 0.996, "DMA": 1.022}
    # Its weights arrive while nothing else is computed, then it computes: 1.022 + 0.737.
    assert conv1.time_us == pytest.approx(1.759, abs=1e-3)
    # conv2's weights come in 1.165 us, of which 0.737 us are hidden behind conv1.
    assert layers["conv2"].time_us == pytest.approx(0.377 + 1.165 - 0.737, abs=1e-3)
    assert layers["best"].type == "TopK"


def test_shares_of_layers_add_up_to_the_total():
    schedule = read_schedule(trace(RECORDED_TASKS))
    assert sum(layer.time_us for layer in schedule.layers) == pytest.approx(schedule.total_us, abs=0.01)


quarters = st.integers(0, 40).map(lambda number: number / 4)
tasks_strategy = st.lists(
    st.tuples(
        st.sampled_from(["a?t_Convolution/x", "b?t_Add/x", "c?t_Relu", "fetch_dma"]),
        st.sampled_from(["DPU", "DMA", "Shave"]),
        quarters,
        quarters,
        st.just("[1x1x1x1xf16]"),
    ),
    min_size=1,
    max_size=12,
)


@given(tasks_strategy)
def test_any_schedule_is_shared_out_whole(tasks):
    moments = [number / 4 + 0.125 for number in range(81)]
    running = [[task for task in tasks if task[2] <= at < task[2] + task[3]] for at in moments]
    covered = sum(0.25 for each in running if each)
    total = max(start + length for _, _, start, length, _ in tasks)
    statistics = {**RECORDED_STATISTICS, "total duration": total}
    layers = read_schedule(trace(tasks, statistics)).layers
    named = {layer.name: layer.time_us for layer in layers if layer.name != SCHEDULER}
    assert sum(layer.time_us for layer in layers) == pytest.approx(
        total if any("?t_" not in task[0] for task in tasks) else covered, abs=0.01
    )
    for name, share in named.items():
        mine = sum(0.25 for each in running if any(task[0].startswith(name + "?") for task in each))
        assert -1e-9 <= share <= mine + 0.01


def test_copy_behind_computation_adds_nothing():
    tasks = [("a?t_Convolution/x", "DPU", 0.0, 4.0, ""), ("b?t_Convolution/x", "DMA", 1.0, 2.0, "")]
    layers = {each.name: each.time_us for each in read_schedule(trace(tasks)).layers}
    assert layers["a"] == 4.0
    assert layers["b"] == 0.0


def test_element_types_get_openvinos_names():
    tasks = [
        ("a?t_Convolution/x", "DPU", 0.0, 1.0, "[1x64x14x55xui8, 16x64x1x1xui8]"),
        ("b?t_Convolution/x", "DPU", 1.0, 1.0, "[1x64x14x55xsi8]"),
        ("c?t_Convolution/x", "DPU", 2.0, 1.0, "[1x64x14x55xf16]"),
    ]
    assert [each.precision for each in read_schedule(trace(tasks)).layers] == ["u8", "i8", "f16"]


@pytest.mark.parametrize(
    "broken", [{}, {"traceEvents": []}, {**trace(RECORDED_TASKS), "taskStatistics": {"total duration": "x"}}]
)
def test_unreadable_schedule_is_no_answer(broken):
    with pytest.raises(ToolchainCrashed, match="schedule cannot be read"):
        read_schedule(broken)


def test_recorded_log_is_read():
    facts = read_log(RECORDED_LOG)
    assert facts.compiler == "2026.5.0-1-a4b1ef7632b-0922.132427-DCI-f45de310cbf.7.10"
    assert facts.unmodelled == ("TopK",)
    assert facts.invalid_costs == 2
    assert facts.sparse_tasks == 4
    assert (facts.float_operations, facts.integer_operations) == (884736, 4096)


@pytest.mark.parametrize(
    "harmless", ["builtin_Convert", "builtin_Convert.convert_p00", "cache_flush, cache_flush_invalidate"]
)
def test_conversions_and_cache_operations_do_not_make_a_lower_bound(harmless):
    line = f"[WARNING] SHAVE operations are unsupported by VPUNN, which can influence: [{harmless}]"
    assert read_log(line).unmodelled == ()


def test_platform_without_counts_has_none():
    assert read_log("").float_operations is None


# --------------------------------------------------------------------------- refusals, as recorded

REFUSED_WITH_WORDS = """Exception from src\\inference\\src\\cpp\\core.cpp:120:
Exception from src\\inference\\src\\dev\\plugin.cpp:54:
Exception from src\\plugins\\intel_npu\\src\\compiler_adapter\\src\\compiler_impl.cpp:323:
Compilation failed. vclAllocatedExecutableCreate4 result: 0x78000004 - [NPU_VCL] Compiler returned msg:
String attribute index_element_type is not supported

"""
REFUSED_BARE = REFUSED_WITH_WORDS.replace(
    "String attribute index_element_type is not supported", "Compilation failed"
)
ERROR_LOG = """
[INFO] 22:31:00.001 [NPU_VCL] fine
[ERROR] 22:31:00.002 [vpux-compiler] DecomposeGRUCell Pass failed : Unsupported type f32
[ERROR] 22:31:00.002 [vpux-compiler] DecomposeGRUCell Pass failed : Unsupported type f32
[ERROR] 22:31:00.003 [vpux-compiler] Failed Pass DecomposeGRUCell on Operation loc
"""


def test_refusal_keeps_the_compilers_words_only():
    assert refusal_reason(REFUSED_WITH_WORDS, []) == "String attribute index_element_type is not supported"


def test_bare_refusal_takes_its_reason_from_the_log():
    complaints = error_lines(ERROR_LOG)
    assert complaints == [
        "DecomposeGRUCell Pass failed : Unsupported type f32",
        "Failed Pass DecomposeGRUCell on Operation loc",
    ]
    assert refusal_reason(REFUSED_BARE, complaints) == "; ".join(complaints)
