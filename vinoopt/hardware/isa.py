"""Instruction sets of x86 CPUs as oneDNN caps them, and which of them a CPU can run."""

from __future__ import annotations

from dataclasses import dataclass

from vinoopt.records import CpuOffline, Device, DeviceSpec

_AVX2_VNNI = frozenset({"avx2", "fma", "avx_vnni"})
_AVX512_CORE = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_VNNI = _AVX512_CORE | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_AMX = _BF16 | {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}

_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Isa:
    """One value of `ONEDNN_MAX_CPU_ISA`."""

    cap: str
    flags: frozenset[str]
    """What `/proc/cpuinfo` must list for a CPU to run it."""
    channel_multiple: int
    """Channels of one block of oneDNN's layouts: 8 up to 256 bit, 16 at 512 bit, 64 for AMX."""
    has_vnni: bool = False
    has_bf16: bool = False
    has_f16: bool = False
    stand_in: str | None = None
    """A weaker cap with the same INT8 results, by which it is emulated on hosts that lack this one."""


# Weakest first. The names are those of oneDNN's developer guide, "CPU Dispatcher Control".
ISAS: dict[str, Isa] = {
    isa.cap: isa
    for isa in (
        Isa(cap="SSE41", flags=frozenset({"sse4_1"}), channel_multiple=8),
        Isa(cap="AVX2", flags=frozenset({"avx2", "fma"}), channel_multiple=8),
        Isa(cap="AVX2_VNNI", flags=_AVX2_VNNI, channel_multiple=8, has_vnni=True),
        # Adds products of two signed bytes and conversions from half formats: the same sums in fewer steps.
        Isa(
            cap="AVX2_VNNI_2",
            flags=_AVX2_VNNI | {"avx_vnni_int8", "avx_ne_convert"},
            channel_multiple=8,
            has_vnni=True,
            stand_in="AVX2_VNNI",
        ),
        Isa(cap="AVX512_CORE", flags=_AVX512_CORE, channel_multiple=16),
        Isa(cap="AVX512_CORE_VNNI", flags=_VNNI, channel_multiple=16, has_vnni=True),
        Isa(cap="AVX512_CORE_BF16", flags=_BF16, channel_multiple=16, has_vnni=True, has_bf16=True),
        Isa(cap="AVX512_CORE_AMX", flags=_AMX, channel_multiple=64, has_vnni=True, has_bf16=True),
        Isa(
            cap="AVX512_CORE_AMX_FP16",
            flags=_AMX | {"amx_fp16"},
            channel_multiple=64,
            has_vnni=True,
            has_bf16=True,
            has_f16=True,
        ),
    )
}


def runnable(flags: frozenset[str]) -> tuple[str, ...]:
    """The caps that a CPU with these `/proc/cpuinfo` flags can run, weakest first."""
    return tuple(cap for cap, isa in ISAS.items() if isa.flags <= flags)


def strongest(flags: frozenset[str]) -> Isa | None:
    """The strongest instruction set of a CPU with these flags; None where it has none of the table."""
    caps = runnable(flags)
    return ISAS[caps[-1]] if caps else None


def isa_of(spec: DeviceSpec) -> Isa | None:
    """The instruction set of a CPU, of a profile or of this machine; None where it is none of the table."""
    if spec.kind is not Device.CPU:
        return None
    return ISAS.get(spec.offline.isa_cap if isinstance(spec.offline, CpuOffline) else spec.architecture)


def saturates_int8(spec: DeviceSpec) -> bool:
    """Whether sums of INT8 products saturate at 16 bits, as on x86 CPUs without VNNI.

    NNCF's overflow fix avoids that. An x86 CPU of which no instruction set is known counts as one without VNNI.
    """
    isa = isa_of(spec)
    if isa is not None:
        return not isa.has_vnni
    return spec.kind is Device.CPU and spec.architecture.lower() in _X86
