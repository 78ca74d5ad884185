"""What is exact: the table, how a model's features are found, and what a server says of them before it starts.

To renew the table of docs/determinism.md: UPDATE_DOCS=1 pytest tests/icm_vllm/test_exactness.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from icm_vllm import exactness
from icm_vllm.exactness import Cell, Feature, Server, features, main, page, refusal, warning
from icm_vllm.plugin import ALL_REDUCE, CHECK

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "determinism.md"

LLAMA = {"model_type": "llama", "num_attention_heads": 32, "hidden_size": 4096}
QWEN3 = {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": None, "attention_bias": False}
QWEN2 = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768}
QWEN3_MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
GEMMA = {
    "model_type": "gemma3",
    "vision_config": {"hidden_size": 1152},
    "text_config": {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
}
MISTRAL = {"model_type": "mistral", "sliding_window": 4096}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 512,
    "n_routed_experts": 256,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 32,
    "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "mxfp4"},
}
QWEN3_NEXT = QWEN3_MOE | {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
JAMBA = {"model_type": "jamba", "mamba_d_state": 16, "num_experts": 16}
GRANITE = {"model_type": "granitemoehybrid", "mamba_d_conv": 4, "num_local_experts": 0}
DENSE = ["bfloat16", exactness.FLASH]
INTEGERS = [exactness.GPTQ, exactness.COMPRESSED]
INTEGER_GROUP = {"group_0": {"weights": {"type": "int", "num_bits": 4}, "targets": ["Linear"]}}
PARALLEL = [exactness.PIPELINE, exactness.EXPERT_PARALLEL, exactness.DATA_PARALLEL]


def compressed(weights: dict[str, object], activations: object) -> dict[str, object]:
    """A configuration as llm-compressor writes it."""
    group = {"weights": weights, "input_activations": activations, "targets": ["Linear"]}
    return LLAMA | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LLAMA, DENSE),
        (LLAMA | {"num_experts": 1, "num_local_experts": None}, DENSE),
        (QWEN3, ["bfloat16", exactness.QK_NORM, exactness.FLASH]),
        (QWEN2, ["bfloat16", exactness.BIAS, exactness.FLASH]),
        (MISTRAL, [*DENSE, exactness.FLASH_WINDOWS]),
        (
            GEMMA,
            ["bfloat16", exactness.QK_NORM, exactness.FLASH, exactness.FLASH_WINDOWS, exactness.MULTIMODAL],
        ),
        (QWEN3_MOE, ["bfloat16", exactness.QK_NORM, exactness.FLASH, exactness.EXPERTS_16]),
        (DEEPSEEK, ["bfloat16", exactness.MLA, exactness.EXPERTS_FP8, exactness.FP8_BLOCKS]),
        (
            GPT_OSS,
            [
                *("bfloat16", exactness.BIAS, exactness.FLASH, exactness.FLASH_WINDOWS, exactness.SINKS),
                exactness.EXPERTS_MXFP4,
            ],
        ),
        (QWEN3_NEXT, ["bfloat16", exactness.QK_NORM, exactness.FLASH, exactness.HYBRID, exactness.EXPERTS_16]),
        (JAMBA, [*DENSE, exactness.HYBRID, exactness.EXPERTS_16]),
        (GRANITE | {"layer_types": ["mamba", "attention"]}, [*DENSE, exactness.HYBRID]),
        (GRANITE | {"layer_types": ["attention", "attention"]}, DENSE),
        (GRANITE, [*DENSE, exactness.HYBRID]),
        ({}, DENSE),
        ({"layer_types": 5, "text_config": None, "model_type": None, "quantization_config": []}, DENSE),
        (
            LLAMA | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": ["a"]}},
            [*DENSE, exactness.OTHER_WEIGHTS],
        ),
        (compressed({}, None) | {"layer_types": "full_attention"}, [*DENSE, exactness.OTHER_WEIGHTS]),
        (LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}, [*DENSE, exactness.AWQ]),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, [*DENSE, exactness.GPTQ]),
        (LLAMA | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, [*DENSE, exactness.FP8_ROWS]),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"}}, [*DENSE, exactness.OTHER_WEIGHTS]),
        (LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}, [*DENSE, exactness.OTHER_WEIGHTS]),
        (
            QWEN3_MOE | {"quantization_config": {"quant_method": "gptq"}},
            ["bfloat16", exactness.QK_NORM, exactness.FLASH, exactness.EXPERTS_INTEGERS, exactness.GPTQ],
        ),
        (compressed({"type": "int", "num_bits": 4, "strategy": "group"}, None), [*DENSE, *INTEGERS]),
        (
            QWEN3_MOE | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": INTEGER_GROUP}},
            ["bfloat16", exactness.QK_NORM, exactness.FLASH, exactness.EXPERTS_INTEGERS, *INTEGERS],
        ),
        (compressed({"type": "float", "num_bits": 8, "strategy": "channel"}, {}), [*DENSE, exactness.OTHER_WEIGHTS]),
        (
            compressed({"type": "float", "num_bits": 8, "strategy": "channel"}, {"strategy": "token"}),
            [*DENSE, exactness.FP8_ROWS],
        ),
        (
            compressed({"type": "float", "num_bits": 8, "strategy": "block"}, {"strategy": "group"}),
            [*DENSE, exactness.FP8_BLOCKS],
        ),
        (compressed({"type": "int", "num_bits": 8}, {"num_bits": 8}), [*DENSE, exactness.OTHER_WEIGHTS]),
    ],
)
def test_the_features_of_a_model(config: dict[str, Any], found: list[str]) -> None:
    assert features(config, Server()) == found


@pytest.mark.parametrize(
    ("server", "found"),
    [
        (Server(dtype="float16"), ["float16", exactness.FLASH]),
        (Server(backend="TRITON_ATTN"), ["bfloat16", exactness.TRITON]),
        (Server(backend="triton_attn"), ["bfloat16", exactness.TRITON]),
        (Server(backend="auto"), DENSE),
        (Server(backend="FLASHINFER"), ["bfloat16", exactness.OTHER]),
        (Server(quantization="fp8"), [*DENSE, exactness.FP8_ROWS]),
        (Server(quantization="bitsandbytes"), [*DENSE, exactness.OTHER_WEIGHTS]),
        (Server(tensor=2), [*DENSE, exactness.TENSOR_2]),
        (Server(tensor=8, graphs=True), [*DENSE, exactness.TENSOR_N, exactness.GRAPHS, exactness.GRAPHS_TENSOR]),
        (Server(pipeline=2, data=2, expert_parallel=True), [*DENSE, *PARALLEL]),
        (Server(lora=True, speculative=True), [*DENSE, exactness.LORA, exactness.SPECULATIVE]),
        (Server(cache_dtype="fp8_e5m2", capability=80), [*DENSE, exactness.FP8_CACHE, exactness.NOT_HOPPER]),
        (Server(capability=90), DENSE),
        (Server(device="cpu", dtype="float32"), ["float32"]),
    ],
)
def test_the_features_of_a_server(server: Server, found: list[str]) -> None:
    assert features(LLAMA, server) == found


@pytest.mark.parametrize(
    ("server", "more", "found"),
    [
        (Server(), {}, [exactness.MLA]),
        (Server(backend="FLASH_ATTN_MLA", capability=90), {}, [exactness.MLA]),
        (Server(backend="flash_attn_mla", capability=100), {}, [exactness.MLA, exactness.MLA_NOT_HOPPER]),
        (Server(backend="TRITON_MLA", capability=80), {}, [exactness.OTHER_MLA]),
        (Server(capability=80), {}, [exactness.OTHER_MLA]),
        (Server(), {"index_topk": 2048}, [exactness.MLA, exactness.SPARSE]),
        (Server(device="cpu"), {}, [exactness.MLA]),
    ],
)
def test_attention_over_compressed_keys_is_exact_on_hopper_alone(
    server: Server, more: dict[str, Any], found: list[str]
) -> None:
    of_attention = [exactness.MLA, exactness.OTHER_MLA, exactness.MLA_NOT_HOPPER, exactness.SPARSE]
    assert [name for name in features(DEEPSEEK | more, server) if name in of_attention] == found
    told = refusal(found, server.device, "0.33")
    assert bool(told) == (len(found) == 2)
    assert "\n" not in told


def test_weights_by_compressed_tensors_are_not_taken_for_gptqs() -> None:
    names = features(compressed({"type": "int", "num_bits": 4, "strategy": "group"}, None), Server())
    assert warning(names, "gpu", "0.33").startswith(
        "whether scores are exact was not measured on vLLM 0.33 with weights in integers by compressed-tensors ("
    )
    assert warning(features(LLAMA | {"quantization_config": {"quant_method": "gptq"}}, Server()), "gpu", "0.33") == ""


def test_windows_on_a_cpu_are_another_matter() -> None:
    names = features(GEMMA, Server(device="cpu"))
    assert names == ["bfloat16", exactness.QK_NORM, exactness.CPU_WINDOWS, exactness.MULTIMODAL]


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (LLAMA, False),
        (GEMMA, False),
        (DEEPSEEK, True),
        (QWEN3_MOE, True),
        (LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}, True),
    ],
)
def test_cpus_with_amx_have_other_kernels_for_some_weights(config: dict[str, Any], other: bool) -> None:
    assert (exactness.WITH_AMX in features(config, Server(device="cpu", amx=True))) is other
    assert exactness.WITH_AMX not in features(config, Server(device="cpu"))


def test_amx_is_read_from_what_linux_says(tmp_path: Path) -> None:
    said = tmp_path / "cpuinfo"
    assert not exactness._has_amx(said)
    said.write_text("flags\t\t: avx512f amx_bf16\n")
    assert not exactness._has_amx(said)
    said.write_text("flags\t\t: avx512f amx_bf16 amx_tile\n")
    assert exactness._has_amx(said)


def test_sums_that_are_left_to_vllm_go_with_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALL_REDUCE, "0")
    assert exactness.GRAPHS_TENSOR not in features(LLAMA, Server(tensor=2, graphs=True))


TABLE = (
    Feature("known", Cell({"1.0": "a GPU", "1.1": "a GPU"}), None),
    Feature("bad", Cell(inexact="it adds in another order"), Cell({"1.0": "a CPU"})),
    Feature("mended", Cell({"1.1": "a GPU"}, inexact="a gate", only=("1.0",), how="newer ones do")),
    Feature("new", Cell(how="by its source")),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "TABLE", TABLE)
    exactness._warn_once.cache_clear()


@pytest.mark.usefixtures("table")
def test_what_is_known_not_to_be_exact_is_refused_by_name_and_with_its_reason() -> None:
    refused = refusal(["known", "bad"], "gpu", "1.0")
    assert refused.startswith("scores would not be exact with bad: it adds in another order. ")
    assert "--no-deterministic" in refused
    assert "\n" not in refused
    assert refusal(["known", "bad", "new"], "cpu", "1.0") == ""
    assert "a gate" in refusal(["mended"], "gpu", "1.0")
    assert refusal(["mended"], "gpu", "1.1") == refusal(["mended"], "gpu", "1.2") == ""


@pytest.mark.usefixtures("table")
def test_what_was_not_measured_on_this_version_is_named() -> None:
    assert warning(["known", "mended"], "gpu", "1.1") == ""
    told = warning(["known", "bad", "mended", "new"], "gpu", "1.2")
    assert "on vLLM 1.2 with known; mended; new (" in told
    assert "scripts/test_determinism.py" in told
    assert "\n" not in told
    assert "with bad; new (" in warning(["known", "bad", "new"], "cpu", "1.2")


@pytest.mark.usefixtures("table")
def test_the_page_says_what_the_table_does() -> None:
    assert page().splitlines()[2:] == [
        "| known | exact: vLLM 1.0, a GPU; exact: vLLM 1.1, a GPU | - |",
        "| bad | **refused**: it adds in another order | exact: vLLM 1.0, a CPU |",
        "| mended | exact: vLLM 1.1, a GPU; **refused** with vLLM 1.0: a gate (newer ones do) | not measured |",
        "| new | not measured (by its source) | not measured |",
    ]


def test_every_feature_that_can_be_found_has_a_row() -> None:
    names = [feature.name for feature in exactness.TABLE]
    assert len(set(names)) == len(names)
    for device in ("gpu", "cpu"):
        for config in (LLAMA, QWEN2, GEMMA, DEEPSEEK, GPT_OSS, QWEN3_NEXT):
            server = Server(device, tensor=2, pipeline=2, data=2, lora=True, speculative=True, cache_dtype="fp8")
            found = {*exactness._of_model(config, server), *exactness._of_weights(config, server)}
            assert found | set(exactness._of_server(server)) <= set(names)


def test_the_documented_table_is_the_one_that_decides() -> None:
    text = DOCUMENT.read_text()
    start, end = (text.index(mark) for mark in ("| feature | on a GPU |", "\n\n## A CPU, made exact"))
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text[:start] + page().rstrip("\n") + text[end:])
        return
    assert text[start:end] == page().rstrip("\n")


def engine(config: dict[str, Any], **changes: Any) -> SimpleNamespace:
    """A vllm_config, as far as it is looked at."""
    model = SimpleNamespace(
        hf_config=SimpleNamespace(to_dict=lambda: config), dtype="torch.bfloat16", quantization=None, enforce_eager=True
    )
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)
    attention = SimpleNamespace(backend=SimpleNamespace(name="FLASH_ATTN"))
    cache = SimpleNamespace(cache_dtype="auto")
    parts = {"model_config": model, "parallel_config": parallel, "attention_config": attention, "cache_config": cache}
    return SimpleNamespace(**{**parts, "lora_config": None, "speculative_config": None, **changes})


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vllm.platforms, with a GPU."""

    class Platform:
        settled: ClassVar[list[Any]] = []

        @classmethod
        def check_and_update_config(cls, config: Any) -> None:
            cls.settled.append(config)

        def is_cpu(self) -> bool:
            return False

        def get_device_capability(self) -> tuple[int, int]:
            return (9, 0)

    module = ModuleType("vllm.platforms")
    module.current_platform = Platform()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    monkeypatch.setattr(exactness, "version_here", lambda: "0.26")
    exactness._warn_once.cache_clear()
    return module.current_platform  # type: ignore[attr-defined]


def test_an_engine_is_checked_once_its_configuration_is_settled(
    platform: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exactness.install()
    first = platform.check_and_update_config
    exactness.install()
    assert platform.check_and_update_config is first
    plain, without = engine(LLAMA), engine(LLAMA, model_config=None)
    platform.check_and_update_config(plain)
    platform.check_and_update_config(without)
    assert platform.settled == [plain, without]
    assert caplog.text == ""
    with pytest.raises(RuntimeError, match=r"windows of attention, by FlashAttention: .*--no-deterministic"):
        platform.check_and_update_config(engine(GEMMA))
    for _ in range(2):
        platform.check_and_update_config(engine(LLAMA, lora_config=object(), speculative_config=object()))
    assert caplog.text.count(f"on vLLM 0.26 with {exactness.LORA}; {exactness.SPECULATIVE} (") == 1


def test_a_vllm_without_a_place_for_the_check_says_so(
    platform: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(platform), "check_and_update_config")
    exactness.install()
    assert "no place for a check" in caplog.text


def test_a_refusal_can_be_made_a_warning_to_measure(
    platform: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactness.install()
    monkeypatch.setenv(CHECK, "0")
    platform.check_and_update_config(engine(MISTRAL))
    assert "scores would not be exact with windows of attention" in caplog.text


def test_a_model_is_looked_up_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert main([str(tmp_path)]) == 0
    assert "  windows of attention, by FlashAttention: **refused**" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"there is no model in {tmp_path / 'none'}: a folder with a config.json was expected\n"
    )
    for broken, said in (("[]", "its config.json is not an object"), ("{", "its config.json is not JSON: ")):
        (tmp_path / "config.json").write_text(broken)
        assert main([str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    assert main([]) == 0
    assert capsys.readouterr().out == page()


START = """
import sys
from icm_vllm import exactness
found = exactness.Cell(inexact="of a test") if sys.argv[2] == "refused" else exactness.Cell()
exactness.TABLE = (exactness.Feature(exactness.LORA, cpu=found),)
from vllm.engine.arg_utils import EngineArgs
EngineArgs(sys.argv[1], enable_lora=True, max_model_len=512, enforce_eager=True).create_engine_config()
print("configured")
"""


@pytest.mark.real_server
@pytest.mark.parametrize("table", ["not measured", "refused"])
def test_a_real_engine_warns_and_is_refused(table: str) -> None:
    model = REPOSITORY / "models" / "gemma-3-270m"
    done = subprocess.run(
        [sys.executable, "-c", START, str(model), table],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "ICM_BATCH_INVARIANT": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = done.stdout + done.stderr
    if table == "not measured":
        assert done.returncode == 0, said[-2000:]
        assert said.count("whether scores are exact was not measured on vLLM") == 1
        assert "LoRA adapters" in said
    else:
        assert done.returncode == 1
        assert (
            done.stderr.strip()
            .splitlines()[-1]
            .startswith("RuntimeError: scores would not be exact with LoRA adapters: of a test.")
        )
