"""What some models compute with, replaced in modules that stand in for vLLM's; tests/icm_vllm/test_model_parts.py runs
this in a process of its own, with Triton's interpreter."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from icm_vllm import adapters, exactness, experts, quantized
from icm_vllm.plugin import EXPERTS, FP8


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a module to those of vLLM: vllm("a.b", name=value)."""

    def add(name: str, **content: Any) -> Any:
        parts = f"vllm.{name}".split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or not hasattr(sys.modules[path], "fake"):
                module = ModuleType(path)
                module.fake = True  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, path, module)
        for key, value in content.items():
            setattr(sys.modules[parts and ".".join(parts)], key, value)
        return sys.modules[".".join(parts)]

    return add


MOE = "model_executor.layers.fused_moe"


class Linear(torch.nn.Module):
    """vLLM's plain linear layer, as a gate inherits it."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs).to(dtype or torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.icm.linear(x, self.weight), None


def with_experts(vllm: Any) -> tuple[Any, Any]:
    """A gate with a kernel for few tokens, and configurations by the number of tokens as outside of vLLM's mode."""

    class GateLinear(Linear):
        def __init__(
            self,
            inputs: int,
            outputs: int,
            out_dtype: torch.dtype | None = None,
            params_dtype: torch.dtype | None = None,
            force_fp32_compute: bool = False,
        ) -> None:
            super().__init__(inputs, outputs, params_dtype)
            self.out_dtype = out_dtype
            self.allow_few_tokens = True
            self.allow_half = True

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            if self.allow_few_tokens and len(x) <= 16:
                return (x.float() @ self.weight.float().t()), None
            if self.allow_half:
                half = x.shape[1] // 2
                return (x[:, :half] @ self.weight[:, :half].t() + x[:, half:] @ self.weight[:, half:].t()).float(), None
            y, bias = super().forward(x.to(self.weight.dtype))
            return y.to(self.out_dtype or y.dtype), bias

    def get_default_config(*sizes_and_type: Any) -> Any:
        return {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}

    gates = vllm(f"{MOE}.router.gate_linear", GateLinear=GateLinear)
    return gates, vllm(f"{MOE}.fused_moe", get_default_config=get_default_config)


def test_a_gate_is_computed_alike_for_any_number_of_tokens(vllm: Any) -> None:
    gates, _ = with_experts(vllm)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    torch.manual_seed(1)
    own = gates.GateLinear(64, 8, out_dtype=torch.float32)
    assert not torch.equal(own(x)[0][:3], own(x[:3])[0]), "the stand-in has no fault to mend"
    assert experts.install([exactness.EXPERTS_16]) == ["gates", "tiles of experts"]
    experts.install([exactness.EXPERTS_16])
    torch.manual_seed(1)
    gate = gates.GateLinear(64, 8, out_dtype=torch.float32)
    whole = gate(x)[0]
    assert whole.dtype == torch.float32
    for rows in (1, 3, 16, 17):
        assert torch.equal(gate(x[:rows])[0], whole[:rows])
    torch.testing.assert_close(whole, (x.float() @ gate.weight.float().t()), rtol=2e-2, atol=0.1)
    assert gates.GateLinear(64, 8, force_fp32_compute=True).weight.dtype == torch.float32


def test_experts_have_one_configuration_for_each_type(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, kernels = with_experts(vllm)
    own = kernels.get_default_config
    monkeypatch.setenv(EXPERTS, "0")
    assert experts.install([exactness.EXPERTS_FP8]) == ["gates"]
    assert kernels.get_default_config is own
    monkeypatch.delenv(EXPERTS)
    experts.install([exactness.EXPERTS_FP8])
    for dtype, depth, columns in ((None, 64, 128), ("fp8_w8a8", 128, 128), ("int4_w4a16", 32, 64), ("float32", 32, 64)):
        found = [kernels.get_default_config(tokens, 8, 64, 64, 2, dtype, [128, 128]) for tokens in (1, 100, 8192)]
        assert all(each == found[0] for each in found)
        assert (found[0]["BLOCK_SIZE_K"], found[0]["BLOCK_SIZE_N"]) == (depth, columns)
        assert (found[0]["BLOCK_SIZE_M"], found[0]["SPLIT_K"], found[0]["GROUP_SIZE_M"]) == (64, 1, 8)


def test_a_projection_for_few_tokens_is_our_product(vllm: Any) -> None:
    operators = vllm("_custom_ops", dsv3_fused_a_gemm=lambda output, a, b: output.fill_(7))
    assert experts.install([exactness.MLA]) == ["projections"]
    a, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    y = torch.empty(3, 32, dtype=torch.bfloat16)
    operators.dsv3_fused_a_gemm(y, a, weight.t(), enable_pdl=True)  # as vLLM 0.33 may call it
    assert torch.equal(y, torch.ops.icm.linear(a, weight))


def test_mxfp4_becomes_bfloat16_without_loss() -> None:
    numbers = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    codes = torch.arange(32, dtype=torch.uint8).view(2, 16) % 16
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).repeat(1, 2)  # two rows of 32 numbers
    full = experts.from_mxfp4(packed, torch.tensor([[127], [120]], dtype=torch.uint8))
    expected = torch.tensor([*numbers, *(-number for number in numbers)]).repeat(2, 2)
    assert full.dtype == torch.bfloat16
    assert torch.equal(full.float(), expected * torch.tensor([[1.0], [2.0**-7]]))
    far = experts.from_mxfp4(packed[:1], torch.tensor([[1]], dtype=torch.uint8))
    assert torch.equal(far.double(), expected[:1].double() * 2.0**-126)


def test_experts_of_mxfp4_are_computed_as_those_of_16_bits(vllm: Any) -> None:
    with_experts(vllm)

    class TritonExperts:
        def __init__(self, moe_config: Any, quant_config: Any) -> None:
            self.made_of = (moe_config, quant_config)

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return False

    class GptOssMxfp4MoEMethod:
        def __init__(self, backend: str) -> None:
            self.mxfp4_backend = SimpleNamespace(name=backend)

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.processed = True

    def plain(w1_bias: Any, w2_bias: Any, **gate: Any) -> Any:
        return ("plain", w1_bias, w2_bias, gate)

    vllm(f"{MOE}.experts.triton_moe", TritonExperts=TritonExperts)
    vllm(f"{MOE}.config", biased_moe_quant_config=plain)
    oracle = vllm(f"{MOE}.oracle.mxfp4", backend_to_kernel_cls=lambda backend: [backend.name])
    method = vllm("model_executor.layers.quantization.mxfp4", GptOssMxfp4MoEMethod=GptOssMxfp4MoEMethod)
    experts._experts_class.cache_clear()
    for _ in range(2):
        assert experts.install([exactness.EXPERTS_MXFP4])[-1] == "experts of mxfp4 in 16 bits"
    assert oracle.backend_to_kernel_cls(SimpleNamespace(name="MARLIN")) == ["MARLIN"]
    assert oracle.backend_to_kernel_cls(SimpleNamespace(name="HUMMING")) == []
    (ours,) = oracle.backend_to_kernel_cls(SimpleNamespace(name="EMULATION"))
    assert issubclass(ours, TritonExperts)
    assert ours._supports_quant_scheme("mxfp4", None)
    assert not ours._supports_quant_scheme("mxfp4", "fp8")
    config = SimpleNamespace(w1_bias=1, w2_bias=2, gemm1_alpha=1.702, gemm1_beta=1.0, gemm1_clamp_limit=7.0)
    gate = {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}
    assert ours("moe", config).made_of == ("moe", ("plain", 1, 2, gate))

    def layer() -> Any:
        packed = {f"{part}_weight": torch.nn.Parameter(codes.clone(), requires_grad=False) for part in ("w13", "w2")}
        scaled = {f"{part}_weight_scale": torch.nn.Parameter(scales, requires_grad=False) for part in ("w13", "w2")}
        return SimpleNamespace(**packed, **scaled)

    codes = torch.randint(0, 256, (3, 4, 32), dtype=torch.uint8)
    scales = torch.randint(100, 130, (3, 4, 2), dtype=torch.uint8)
    expanded, left = layer(), layer()
    method.GptOssMxfp4MoEMethod("EMULATION").process_weights_after_loading(expanded)
    method.GptOssMxfp4MoEMethod("MARLIN").process_weights_after_loading(left)
    for part in ("w13_weight", "w2_weight"):
        assert torch.equal(getattr(expanded, part).data, experts.from_mxfp4(codes, scales))
        assert getattr(left, part).dtype == torch.uint8
    assert expanded.processed
    assert left.processed


class Kernel:
    """Like vLLM's for weights in integers: splits the sum by the number of rows, and has an order of its own for the
    biases of columns."""

    def __init__(self, config: Any, w_q_param_name: str) -> None:
        self.config = config

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.qweight.data = layer.qweight.data.flip(0)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.flip(0)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = (layer.qweight.flip(0).float() - 8) * layer.scales.float()
        parts = 4 if len(x) < 8 else 1
        sums = [a.float() @ b for a, b in zip(x.chunk(parts, 1), weight.chunk(parts, 0), strict=True)]
        total = sums[0].to(x.dtype)
        for each in sums[1:]:
            total = total + each.to(x.dtype)
        return total if bias is None else total + bias.flip(0)


def test_weights_in_integers_become_16_bits(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "UNIT_VECTORS", 24)
    module = vllm(
        "model_executor.kernels.linear.mixed_precision.MPLinearKernel",
        MPLinearKernel=type("MPLinearKernel", (), {"__init__": Kernel.__init__}),
    )
    kernel_class = type("Marlin", (module.MPLinearKernel,), {k: v for k, v in vars(Kernel).items() if k[0] != "_"})
    for _ in range(2):
        assert quantized.install([exactness.GPTQ]) == ["weights in 16 bits"]
    layer = torch.nn.Module()
    layer.qweight = torch.nn.Parameter(torch.randint(0, 16, (64, 40), dtype=torch.int32), requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.rand(40).to(torch.bfloat16), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(40).to(torch.bfloat16), requires_grad=False)
    weight, bias = (layer.qweight.data - 8).to(torch.bfloat16) * layer.scales.data, layer.bias.data.clone()
    config = SimpleNamespace(partition_weight_shape=(64, 40), act_type=torch.bfloat16)
    kernel: Any = kernel_class(config, w_q_param_name="qweight")
    kernel.process_weights_after_loading(layer)
    assert layer.qweight.numel() == layer.scales.numel() == 0, "the packed weights stay in memory"
    assert torch.equal(layer.bias.data, bias)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    whole = kernel.apply_weights(layer, x, layer.bias)
    assert torch.equal(whole, torch.ops.icm.linear(x, weight.t().contiguous(), bias))
    for rows in (1, 7, 8):
        assert torch.equal(kernel.apply_weights(layer, x[:rows], layer.bias), whole[:rows])
    assert torch.equal(kernel.apply_weights(layer, x), torch.ops.icm.linear(x, weight.t().contiguous()))


def test_activations_that_are_quantized_too_are_left_alone(vllm: Any) -> None:
    module = vllm(
        "model_executor.kernels.linear.mixed_precision.MPLinearKernel",
        MPLinearKernel=type("MPLinearKernel", (), {"__init__": Kernel.__init__}),
    )
    quantized.install([exactness.GPTQ])
    config = SimpleNamespace(partition_weight_shape=(64, 40), act_type=torch.int8)
    assert set(vars(module.MPLinearKernel(config, "qweight"))) == {"config"}


def test_blocks_of_fp8_are_left_to_triton_with_one_configuration(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm("platforms", current_platform=SimpleNamespace(_enum="CUDA"))
    table = {"CUDA": ["DeepGEMM", "Cutlass", "Triton"], "ROCM": ["Aiter"]}
    linear = vllm(
        "model_executor.kernels.linear", _POSSIBLE_FP8_BLOCK_KERNELS=table, TritonFp8BlockScaledMMKernel="Triton"
    )
    tuned = vllm(
        "model_executor.layers.quantization.utils.fp8_utils", get_w8a8_block_fp8_configs=lambda n, k, bn, bk: {1: {}}
    )
    monkeypatch.setenv(FP8, "0")
    assert quantized.install([exactness.FP8_BLOCKS]) == []
    monkeypatch.delenv(FP8)
    assert quantized.install([exactness.FP8_BLOCKS]) == ["products of fp8 blocks"]
    assert linear._POSSIBLE_FP8_BLOCK_KERNELS == {"CUDA": ["Triton"], "ROCM": ["Aiter"]}
    assert tuned.get_w8a8_block_fp8_configs(8, 8, 128, 128) is None
    del tuned.get_w8a8_block_fp8_configs
    with pytest.raises(AttributeError, match="get_w8a8_block_fp8_configs"):
        quantized.install([exactness.FP8_BLOCKS])


def test_awq_is_unpacked_by_triton(vllm: Any) -> None:
    operators = vllm("_custom_ops", awq_dequantize=lambda *given: "of the extension")
    vllm("model_executor.layers.quantization.awq_triton", awq_dequantize_triton=lambda w, s, z: ("by Triton", w, s, z))
    for _ in range(2):
        assert quantized.install([exactness.AWQ]) == ["weights of AWQ"]
    assert operators.awq_dequantize(1, 2, 3, 0, 0, 0) == ("by Triton", 1, 2, 3)


def test_adapters_have_one_configuration_for_any_number_of_tokens(vllm: Any) -> None:
    def get_lora_op_configs(op_type: str, max_loras: int, batch: int, hidden_size: int, rank: int, **named: Any) -> Any:
        return {"op": op_type, "block_k": 256 if batch < 128 else 32, "hidden": hidden_size, "rank": rank, **named}

    names = ("utils", "lora_shrink_op", "lora_expand_op")
    modules = [vllm(f"lora.ops.triton_ops.{name}", get_lora_op_configs=get_lora_op_configs) for name in names]
    assert adapters.install([exactness.EXPERTS_16]) == []
    for _ in range(2):
        assert adapters.install([exactness.LORA]) == ["tiles of adapters"]
    for module in modules:
        found = [
            module.get_lora_op_configs("shrink", max_loras=1, batch=tokens, hidden_size=64, rank=16, num_slices=3)
            for tokens in (1, 127, 128, 9000)
        ]
        expected = {"op": "shrink", "block_k": 32, "hidden": 64, "rank": 16, "num_slices": 3}
        assert found == [expected] * 4


def test_a_model_without_any_of_it_is_left_alone() -> None:
    for part in (experts, quantized, adapters):
        assert part.install([exactness.BF16, exactness.QK_NORM, exactness.FP8_ROWS]) == []
