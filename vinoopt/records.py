"""Every frozen record that crosses a floor of the house: read this file first.

Records hold facts, never arrays or models, and are changed with `record.model_copy(update=...)` through
`serde.replace`. They validate when they are built, and `serde` writes and reads them as JSON or TOML; an
unknown key is an error. Shapes are tuples, sets are sorted tuples, and every figure says in its name what
unit it has.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from vinoopt.errors import TargetError


class Record(BaseModel):
    """Base of all records: frozen, keyword-only, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class Word(str, Enum):
    """An enumeration whose members print as their value."""

    def __str__(self) -> str:
        return str(self.value)


# --------------------------------------------------------------------------- vocabulary


class Device(Word):
    """A device in OpenVINO's spelling."""

    CPU = "CPU"
    GPU = "GPU"
    NPU = "NPU"


class Precision(Word):
    """A number format for weights and activations."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Evidence(Word):
    """What stands behind a figure. No figure is shown without it."""

    MEASURED = "measured"
    """Taken on a device of this machine."""
    EMULATED = "emulated"
    """This host under another CPU's instruction set: accuracy counts, of times only ratios do."""
    MODELLED = "modelled"
    """A cost model said so."""
    COMPILED = "compiled"
    """The vendor's compiler accepted it; no time is known."""
    NOT_CHECKED = "not checked"
    """Toolchain missing, crashed or timed out; says nothing about the model."""


class Preset(Word):
    """NNCF's quantization presets."""

    PERFORMANCE = "performance"
    MIXED = "mixed"


class DropType(Word):
    """How an accuracy drop is counted, in NNCF's words."""

    ABSOLUTE = "absolute"
    """Float value minus compressed value."""
    RELATIVE = "relative"
    """The same, divided by the float value."""


class TrialState(Word):
    """How a trial of the search ended."""

    COMPLETE = "complete"
    OVER_BUDGET = "over_budget"
    FAILED = "failed"
    SLOWER = "slower"
    """Timed, and not judged: not faster than a candidate that was inside the budget already."""


class Verdict(Word):
    """What the test part says about the drop."""

    PROVEN = "proven"
    """The whole 95% interval lies inside the budget."""
    POINT_ESTIMATE = "point_estimate"
    """The drop is inside the budget, but its interval reaches beyond it."""
    OUTSIDE = "outside"
    """The drop is larger than the budget."""


_DEVICE_ALIASES = {"VPU": Device.NPU, "IGPU": Device.GPU, "DGPU": Device.GPU}


# --------------------------------------------------------------------------- targets and hardware


class Target(Record):
    """Where the result will run: a hardware profile and one of its devices."""

    profile: str
    device: Device

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `"lunar-lake:NPU"`, `"host:CPU"`, or a bare profile name (then its CPU).

        `VPU` is accepted for `NPU`, `iGPU` for `GPU`, in any case. A profile may be a path to a TOML file.
        Raises `TargetError` for an unknown device.
        """
        profile, colon, device_text = text.rpartition(":")
        if not colon or "/" in device_text or "\\" in device_text:
            profile, device_text = text, "CPU"
        word = device_text.upper()
        device = _DEVICE_ALIASES.get(word) or next((d for d in Device if d.value == word), None)
        if not profile or device is None:
            raise TargetError(
                f'target "{text}" is not PROFILE:DEVICE with a device of {", ".join(Device)}; '
                'for example "host:CPU" or "lunar-lake:NPU"'
            )
        return cls(profile=profile, device=device)

    def __str__(self) -> str:
        return f"{self.profile}:{self.device}"

    @property
    def slug(self) -> str:
        """The name of this target's folder in a bundle."""
        stem = self.profile.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".toml")
        return f"{stem}-{self.device}".lower()


class Figure(Record):
    """A figure about hardware and where it comes from."""

    value: float
    source: str = Field(min_length=1)


class CpuOffline(Record):
    """How another CPU's instruction set is emulated on this host (oneDNN's ISA cap)."""

    isa_cap: str
    """One of `hardware.isa.ISAS`."""


class GpuOffline(Record):
    """What Intel's OpenCL driver needs to compile for this GPU without one, and how the result is checked."""

    families: tuple[str, ...]
    """Values of `ProductFamilyOverride`, tried in order."""
    hardware: str
    """`<slices>x<subslices>x<EUs per subslice>`."""
    device_id: str
    """PCI id, as `0x....`."""
    min_driver: str
    """The oldest driver release (`YY.WW`) that was seen to serve it."""
    architecture: str
    """`DEVICE_ARCHITECTURE`'s leading part that must come back, as `12.3`; `12.7x` leaves its last digit open."""
    has_int8: bool
    has_xmx: bool

    @property
    def execution_units(self) -> int:
        """What `hardware` makes."""
        return math.prod(int(part) for part in self.hardware.split("x"))


class NpuOffline(Record):
    """What the NPU compiler needs to compile for this NPU without one."""

    platform: str
    """Value of `NPU_PLATFORM`, as `4000`."""


class DeviceSpec(Record):
    """One device of a hardware profile."""

    kind: Device
    name: str
    architecture: str
    precisions: tuple[Precision, ...]
    """Formats with native arithmetic, fastest first."""
    channel_multiple: int = Field(ge=1)
    """Channel counts that fill the vector or matrix unit; widths are offered in steps of it."""
    cores: int | None = None
    memory_bytes: Figure | None = None
    bandwidth_gb_per_s: Figure | None = None
    peak_gops: dict[Precision, Figure] = Field(default_factory=dict)
    """Multiply and add counted as two operations, per second, in 10^9."""
    offline: CpuOffline | GpuOffline | NpuOffline | None = None
    """How it is compiled for on a machine that lacks it; None: it cannot be."""
    tuning: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """OpenVINO property -> values worth trying on this device."""
    last_openvino: str | None = None
    """The last OpenVINO release that served the device, where support has ended."""


class HardwareProfile(Record):
    """A product that a deployment engineer meets, from a file in `hw_profiles/`, or this machine."""

    name: str
    title: str
    family: str
    sources: tuple[str, ...] = ()
    devices: dict[Device, DeviceSpec]
    cpu_match: tuple[str, ...] = ()
    """Regular expressions for the CPU's brand text by which this machine is recognised as the product."""
    notes: tuple[str, ...] = ()


class HostFingerprint(Record):
    """The machine and software that a figure was measured on."""

    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    versions: dict[str, str]
    """Package -> version: openvino, nncf, onnx, numpy, vinoopt."""
    devices: dict[str, str]
    """OpenVINO device -> its full name."""


# --------------------------------------------------------------------------- models and data


class TensorSpec(Record):
    """An input or output of a model."""

    name: str
    shape: tuple[int | str, ...]
    """A size, `"?"` for any, or `"1..8"` for bounds; `("...",)` where not even the rank is known."""
    dtype: str
    """numpy's name, as `float32`."""
    layout: str | None = None


class PreprocessSpec(Record):
    """Preprocessing of one image input, embedded into the graph."""

    input: str | None = None
    """The model input it belongs to; None: the only input."""
    image_layout: str = "NHWC"
    """Layout of what the user feeds."""
    model_layout: str = "NCHW"
    """Layout of the ONNX input."""
    colour_order: str = "RGB"
    """Channel order the model was trained with: `RGB` or `BGR`. Images are fed as RGB."""
    mean: tuple[float, ...] = ()
    """Per channel in the model's colour order, or one value; subtracted first."""
    scale: tuple[float, ...] = ()
    """Per channel in the model's colour order, or one value; divided by after the mean."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images that will be fed, where they differ from the model's: the graph then
    resizes them."""
    resize: str = "linear"
    """Interpolation of the resize in the graph: `linear`, `cubic`, `nearest`."""
    fit: str = "crop"
    """How an image *file* of another size is brought to the size that is fed: `squash`, `crop` (shorter side,
    then centre crop) or `letterbox` (top left). Done when files are loaded, never in the graph."""
    pad_value: float = 114.0
    """Fill of the letterbox, in image units."""


class PruningGroup(Record):
    """Channels that live or die together."""

    name: str
    """The producer that comes first in the graph."""
    units: int
    """How many units (channels, heads, groups of a grouped convolution) it has."""
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    is_prunable: bool
    reason: str = ""
    """Why it is not prunable."""
    kind: str = "channels"
    """`channels`, `heads`, `groups`."""
    can_vanish: bool = False
    """Whether all units may go: what reads them is added to a residual path, and becomes a constant there."""


class GroupWidth(Record):
    """The units of one group that stay, or what stands for the branch that it belongs to."""

    group: str
    kept: tuple[int, ...]
    stand_in: int = Field(default=0, ge=0)
    """Where none stay: the window of the one layer that is fitted to the residual branch and takes its place (1 for
    a matrix product too); 0: the branch gives its mean."""


class QuantizationPlan(Record):
    """Everything that one NNCF run needs beyond model and data."""

    preset: Preset | None = None
    """None: NNCF's own choice (performance; mixed for transformers)."""
    subset_size: int = Field(default=300, ge=1)
    float_layers: tuple[str, ...] = ()
    """Names of layers left in float: NNCF's ignored scope."""
    fast_bias_correction: bool = True
    smooth_quant_alpha: float | None = None
    """None: NNCF's default for the model type; -1: off."""
    activation_range: str | None = None
    """None: NNCF's default; else `minmax`, `mean_minmax`, `quantile`, `histogram`."""
    is_transformer: bool = False
    overflow_fix: bool = False
    """For CPUs without VNNI, whose INT8 sums saturate at 16 bits."""


class WeightCompressionPlan(Record):
    """Weight-only compression with `nncf.compress_weights`, of what else would stay float."""

    mode: str = "int8_asym"
    ratio: float = 1.0
    group_size: int = -1
    float_layers: tuple[str, ...] = ()
    """Left as they are, in INT8 or float."""


class DistillationPlan(Record):
    """How a compressed model is trained towards the float model's outputs, without labels."""

    runs: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Steps of each run; a run begins where the one before it ended."""
    batch: int = Field(default=64, ge=1)
    """Samples per step."""
    peak_rate: float = Field(default=0.01, gt=0)
    """Largest change of a weight per step, relative to the size of the channel it makes; 0.01 serves pruned models,
    less where only rounding is to be made good. Runs of less than 600 steps, and later ones, go more slowly. Ranges
    move by up to 0.001, less in later runs."""
    inner_weight: float = Field(default=1.0, ge=0)
    """Of the errors where residual branches join, beside those of the outputs; 0: outputs only."""
    augments: bool = True
    """Whether images are mirrored, shifted and mixed."""
    label_weight: float = Field(default=0.0, ge=0)
    """Of the cross entropy with labels beside the divergence from the teacher; 0: labels are not looked at."""
    are_scores: bool = True
    """Whether an output counts as class scores that reads like them; false: only what a softmax or sigmoid makes."""
    seed: int = Field(default=0, ge=0)


class CompressionPlan(Record):
    """One point of the joint search: widths, precisions, and the float format for what is not quantized."""

    widths: tuple[GroupWidth, ...] = ()
    """Groups that lose units; a group that is not named keeps all."""
    quantization: QuantizationPlan | None = None
    weights: WeightCompressionPlan | None = None
    float_precision: Precision = Precision.F32
    distillation: DistillationPlan | None = None
    """What was trained after all that."""

    @property
    def title(self) -> str:
        """A short name for tables: `f32`, `bf16`, `int8`, `int8+f32(3)`, `pruned int8`, `distilled pruned int8`."""
        parts = ["distilled "] if self.distillation is not None else []
        parts += ["pruned "] if self.widths else []
        if self.quantization is not None:
            parts.append("int8")
            if self.quantization.float_layers:
                parts.append(f"+{self.float_precision}({len(self.quantization.float_layers)})")
            elif self.float_precision is not Precision.F32:
                parts.append(f"/{self.float_precision}")
            parts += [f" with {self.weights.mode} weights"] if self.weights is not None else []
        elif self.weights is not None:
            parts.append(f"{self.weights.mode} weights")
        else:
            parts.append(str(self.float_precision))
        return "".join(parts)


# --------------------------------------------------------------------------- accuracy


class AccuracyBudget(Record):
    """How much accuracy may be given up, and how it is counted."""

    metric: str = "auto"
    """A metric's name; `auto`: top1 with labels, else agreement for classifiers and cosine otherwise."""
    max_drop: float = Field(default=0.01, ge=0)
    drop_type: DropType = DropType.ABSOLUTE


class Accuracy(Record):
    """A metric's value over so many samples."""

    metric: str
    value: float
    samples: int
    higher_is_better: bool = True


class Drop(Record):
    """A paired drop against the float model on the same samples, with its 95% interval."""

    metric: str
    drop_type: DropType
    reference: float
    candidate: float
    value: float
    low: float
    high: float
    samples: int
    method: str
    """How the interval was found, as `bootstrap (2000)` or `exact`."""
    verdict: Verdict
    samples_to_prove: int | None = None
    """About how many samples would prove this drop inside the budget; None where it is proven or outside."""


# --------------------------------------------------------------------------- runtime and measurement


class RuntimeProperties(Record):
    """OpenVINO's own property keys and values, sorted by key."""

    items: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, properties: dict[str, Any]) -> RuntimeProperties:
        """Sorted record of a dictionary as `core.compile_model` takes it."""
        return cls(items=tuple(sorted((str(k), str(v)) for k, v in properties.items())))

    def as_dict(self) -> dict[str, str]:
        """What `core.compile_model` takes."""
        return dict(self.items)


class Range(Record):
    """The ends of a 95% interval."""

    low: float
    high: float


class Measurement(Record):
    """Latency of one contestant on one device, with what stands behind it."""

    name: str
    device: str
    evidence: Evidence
    latency_p50_ms: float
    latency_p90_ms: float | None = None
    latency_p99_ms: float | None = None
    throughput_per_s: float | None = None
    latency_p50_range_ms: Range | None = None
    latency_p90_range_ms: Range | None = None
    latency_p99_range_ms: Range | None = None
    throughput_range_per_s: Range | None = None
    samples: int = 0
    rounds_ms: tuple[float, ...] = ()
    """Median latency of each interleaved round."""
    instances: tuple[int, ...] = ()
    """Which of its compilations ran in each round; empty: it had one."""
    properties: RuntimeProperties | None = None
    """What it was compiled with; None where that is not known."""
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Input -> shape of a request."""
    batch: int = 1
    """Samples of one call, where throughput and its rounds are counted per sample; latencies are of calls."""
    compile_ms: float | None = None
    first_inference_ms: float | None = None
    cached_compile_ms: float | None = None
    """With OpenVINO's model cache, filled before, in a fresh process."""
    cached_first_inference_ms: float | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """What a process of its own needed at most beyond Python and libraries; None where none was started."""
    source: str = ""
    """Which cost model or emulation said so, with its known error; empty where measured."""
    warnings: tuple[str, ...] = ()


class Comparison(Record):
    """How much faster `candidate` is than `reference`, from the same interleaved rounds."""

    reference: str
    candidate: str
    speedup: float
    low: float
    high: float
    is_significant: bool
    """Whether the whole interval is further from 1 than anybody would act on."""
    evidence: Evidence


class LayerReport(Record):
    """What one layer of a compiled model became."""

    name: str
    type: str
    precision: str
    kernel: str = ""
    time_us: float | None = None
    """Its share of the end-to-end latency."""
    busy_us: dict[str, float] = Field(default_factory=dict)
    """Engine of an NPU (`DPU`, `SHAVE`, `DMA`) -> busy time summed over tiles; what overlaps counts twice."""


class OutputParity(Record):
    """How far one output of the normalised model is from the ONNX file's, over all samples."""

    name: str
    ok: bool
    max_abs_error: float
    max_rel_error: float
    """Largest error over the output's largest magnitude; for integers the share of values that differ."""
    tolerance: float
    """Of `max_rel_error`."""
    note: str = ""
    """What else differs: shape, type, where a value is not finite."""


class ParityReport(Record):
    """The normalised model against the ONNX file run by ONNX Runtime, in float32 on this CPU."""

    checked: bool
    ok: bool
    """False where it was not checked."""
    reason: str = ""
    """Why it was not checked, or which output differs by how much; empty where all is equal."""
    samples: int = 0
    outputs: tuple[OutputParity, ...] = ()


class Diagnostic(Record):
    """Something that a compiler or a check wants the user to know."""

    severity: str
    """`info`, `warning`, `error`."""
    code: str
    message: str
    layer: str | None = None


class Build(Record):
    """A model compiled for a target."""

    target: Target
    toolchain: str
    """Which toolchain and version made it, as `openvino 2026.4.1 CPU`."""
    evidence: Evidence
    properties: RuntimeProperties = RuntimeProperties()
    blob: str | None = None
    """Path of the blob; None where none may be shipped."""
    blob_sha256: str | None = None
    compile_ms: float | None = None
    latency_ms: float | None = None
    """Modelled or emulated end-to-end latency, where the toolchain gives one; see `evidence`."""
    is_lower_bound: bool = False
    memory_bytes: int | None = None
    layers: tuple[LayerReport, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    details: dict[str, str] = Field(default_factory=dict)


class Availability(Record):
    """Whether a toolchain can be used here, and if not, what is missing and how to get it."""

    ok: bool
    name: str
    version: str | None = None
    reason: str = ""
    fix: str = ""


# --------------------------------------------------------------------------- search and result


class Trial(Record):
    """One candidate that was built and judged whole."""

    number: int
    plan: CompressionPlan
    state: TrialState
    target: str
    accuracy: Accuracy | None = None
    drop: float | None = None
    """On the search part, in the budget's drop type."""
    drop_high: float | None = None
    """Upper end of its 95% interval."""
    expected_drop: float | None = None
    """What it is expected to be on other samples, given how few these are; decides about the state."""
    latency: Measurement | None = None
    seconds: float = 0.0
    error: str = ""
    note: str = ""

    @property
    def likely_drop(self) -> float | None:
        """What is expected on other samples where that is known, else what was seen."""
        return self.drop if self.expected_drop is None else self.expected_drop

    @property
    def drop_words(self) -> str:
        """`drop +0.0197, expected +0.0066`: what was seen, and what is expected on other samples if that differs."""
        seen, expected = self.drop or 0.0, self.expected_drop
        if expected is None or f"{expected:+.4f}" == f"{seen:+.4f}":
            return f"drop {seen:+.4f}"
        return f"drop {seen:+.4f}, expected {expected:+.4f}"


class Event(Record):
    """Progress of long work, for whoever shows it."""

    stage: str
    """`load`, `data`, `search`, `tune`, `compile`, `measure`, `write`."""
    message: str = ""
    done: int = 0
    total: int = 0
    remaining_s: float | None = None
    """Until the whole run is done, as far as it can be told; None: it cannot be yet."""


class CompileRequest(Record):
    """All that was asked of `compile`, seed included."""

    model: str
    targets: tuple[Target, ...]
    output: str | None = None
    data: str | None = None
    labels: str | None = None
    calibration_data: str | None = None
    test_data: str | None = None
    test_labels: str | None = None
    budget: AccuracyBudget = AccuracyBudget()
    metric_options: dict[str, str | int | float] = Field(default_factory=dict)
    preprocess: tuple[PreprocessSpec, ...] = ()
    shape: str | None = None
    preset: Preset | None = None
    subset_size: int = Field(default=300, ge=1)
    ignored_scope: tuple[str, ...] = ()
    quantize: bool = True
    prune: bool = True
    max_pruning: float = Field(default=0.5, ge=0, lt=1)
    effort: str = "balanced"
    time_limit_s: float | None = None
    seed: int = Field(default=0, ge=0)
    scheduler: str | None = None
    """Of the dask fleet whose workers stand for the targets that they announce."""
    allow_code: bool = False
    """Whether `module:attribute` data and metrics may be imported, which runs code."""


class BlockChoice(Record):
    """Why one block of the result computes in float although others are INT8."""

    name: str
    reason: str
    damage: float | None = None
    """Output damage of this block alone in INT8, where it was measured."""
    gain_us: float | None = None
    """Microseconds that INT8 saves in its own kernels on the target; negative where it costs."""


class TargetResult(Record):
    """What came out for one target."""

    target: Target
    plan: CompressionPlan
    drop: Drop | None
    budget_met: bool
    """False where all compressed models that could be judged were over budget; not where the target refused them."""
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    properties: RuntimeProperties
    build: Build
    reasons: tuple[str, ...] = ()
    """Plain sentences: why this candidate, why not another."""
    float_blocks: tuple[BlockChoice, ...] = ()
    """The blocks that stay in float in an INT8 model, each with its reason."""
    tuned: Comparison | None = None
    """The best runtime settings against the latency hint; None where none were raced."""
    host: HostFingerprint | None = None
    """The machine that measured, where it is not the one that compiled."""


class Manifest(Record):
    """All that happened, kept in the bundle as `manifest.json`."""

    schema_version: int = 1
    request: CompileRequest
    host: HostFingerprint
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model_sha256: str
    splits: dict[str, int]
    float_accuracy: Accuracy | None
    targets: tuple[TargetResult, ...]
    trials: int
    interrupted: bool = False
    """Whether the search was cut short by the user."""
    seconds: float
    stages_s: dict[str, float] = Field(default_factory=dict)
    """Stage -> what it took; of several targets the last one's."""
    peak_memory_bytes: int | None = None
    messages: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)
    """Path inside the bundle -> sha256."""
