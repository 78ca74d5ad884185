"""Which type a CPU computes fast, read from what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.cpu import CPUINFO, KV_CACHE_GIB, KV_CACHE_SPACE, cpu_flags, fast_type, kv_cache_gib, memory_limit
from scripts.vllm_command import read_section

ZEN_3 = "fpu sse4_2 avx f16c fma avx2 bmi2 sha_ni vaes"
ICE_LAKE = f"{ZEN_3} avx512f avx512bw avx512vl avx512_vnni"
ZEN_4 = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_bf16 amx_tile amx_int8"


def cpuinfo(folder: Path, flags: str, name: str = "flags\t\t") -> Path:
    path = folder / "cpuinfo"
    path.write_text("".join(f"processor\t: {n}\n{name}: {flags}\nbogomips\t: 5200\n\n" for n in range(2)))
    return path


@pytest.mark.parametrize(
    ("flags", "dtype", "why"),
    [
        (ZEN_3, "float32", "emulate bfloat16"),
        (ICE_LAKE, "float32", "emulate bfloat16"),
        (ZEN_4, "bfloat16", "has AVX-512 BF16"),
        (SAPPHIRE_RAPIDS, "bfloat16", "has AMX"),
    ],
)
def test_bfloat16_is_fast_only_with_instructions_for_it(tmp_path: Path, flags: str, dtype: str, why: str) -> None:
    found = fast_type({}, cpuinfo(tmp_path, flags))
    assert found.dtype == dtype
    assert why in str(found)
    assert str(found).count("\n") == 0


@pytest.mark.parametrize(("flags", "dtype"), [("fp asimd i8mm bf16 sve", "bfloat16"), ("fp asimd fphp", "float32")])
def test_arm_names_its_flags_otherwise(tmp_path: Path, flags: str, dtype: str) -> None:
    assert fast_type({}, cpuinfo(tmp_path, flags, "Features\t")).dtype == dtype


@pytest.mark.parametrize(
    ("variable", "value", "dtype"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", "bfloat16"),
        ("ONEDNN_MAX_CPU_ISA", "ALL", "bfloat16"),
        ("DNNL_MAX_CPU_ISA", "AVX2_VNNI_2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx512", "bfloat16"),
    ],
)
def test_what_libraries_may_use_counts_too(tmp_path: Path, variable: str, value: str, dtype: str) -> None:
    found = fast_type({variable: value}, cpuinfo(tmp_path, SAPPHIRE_RAPIDS))
    assert found.dtype == dtype
    assert (f"{variable}={value}" in found.why) == (dtype == "float32")


def test_a_machine_that_says_nothing_gets_the_type_that_works_everywhere(tmp_path: Path) -> None:
    found = fast_type({}, tmp_path / "missing")
    assert found.dtype == "float32"
    assert "does not say" in found.why
    (tmp_path / "empty").touch()
    assert fast_type({}, tmp_path / "empty").dtype == "float32"


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux alone has /proc/cpuinfo")
def test_this_machine_says_what_it_can_do() -> None:
    assert cpu_flags() & {"sse2", "asimd"}


def test_as_many_tokens_are_cached_in_either_type() -> None:
    large = 64 << 30
    assert [kv_cache_gib(dtype, memory=large) for dtype in ("bfloat16", "float16", "float32")] == [2, 2, 4]
    assert kv_cache_gib("float32", 3, memory=large) == 6


def test_the_cache_leaves_a_small_machine_its_memory() -> None:
    # Linux says somewhat less than what was bought.
    assert [kv_cache_gib("float32", memory=int(gib * 2**30)) for gib in (2, 3.8, 7.6, 11.6, 15.5)] == [1, 1, 2, 3, 4]
    assert kv_cache_gib("bfloat16", memory=int(7.6 * 2**30)) == 2
    assert 1 <= kv_cache_gib("float32") <= 4


def test_a_containers_limit_counts_as_its_memory(tmp_path: Path) -> None:
    machine = memory_limit([tmp_path / "missing"])
    assert machine == memory_limit([]) > 2**20
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (f"{2**62}\n", machine)):
        (tmp_path / "memory.max").write_text(text)
        assert memory_limit([tmp_path / "memory.max", tmp_path / "missing"]) == expected


def test_the_launcher_and_engines_in_process_cache_as_much() -> None:
    assert read_section("local").env[KV_CACHE_SPACE] == str(KV_CACHE_GIB)
