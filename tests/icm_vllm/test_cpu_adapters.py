"""Rows of no adapter beside rows of one, with vLLM's products for adapters on a CPU. Needs torch, not vLLM."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from icm_vllm import cpu_adapters

torch: Any = pytest.importorskip("torch")


def products() -> dict[str, Any]:
    """As vLLM has them up to 0.32: the weights of row i are weights[adapters[i]]."""

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, adapters: Any, scaling: float = 1.0) -> None:
        output[:] = scaling * torch.einsum("bi, boi -> bo", inputs, weights[adapters])

    def bgmv_expand(inputs: Any, weights: Any, output: Any, adapters: Any, add_inputs: bool = True) -> None:
        output[:] = output * add_inputs + torch.einsum("bi, boi -> bo", inputs, weights[adapters])

    def bgmv_expand_slice(
        inputs: Any, weights: Any, output: Any, adapters: Any, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        bgmv_expand(inputs, weights, output[:, offset : offset + size], adapters, add_inputs)

    return {"bgmv_shrink": bgmv_shrink, "bgmv_expand": bgmv_expand, "bgmv_expand_slice": bgmv_expand_slice}


def test_a_row_of_no_adapter_is_left_alone_and_the_others_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = []
    for name in ("vllm.lora.ops.torch_ops", "vllm.lora.ops.torch_ops.lora_ops"):
        module = ModuleType(name)
        vars(module).update(products())
        monkeypatch.setitem(sys.modules, name, module)
        modules.append(module)
    for _ in range(2):  # the second time does nothing
        cpu_adapters.install()
    generator = torch.Generator().manual_seed(0)
    adapters = torch.tensor([-1, 0, -1, 1, 0])
    inputs, a, b, before = (torch.randn(shape, generator=generator) for shape in ((5, 6), (2, 3, 6), (2, 4, 3), (5, 8)))
    results = []
    for own in (products(), *map(vars, modules)):
        small, output = torch.full((5, 3), 7.0), before.clone()
        own["bgmv_shrink"](inputs, a, small, adapters, 0.5)
        own["bgmv_expand_slice"](small, b, output, adapters, 2, 4, add_inputs=True)
        own["bgmv_expand"](small, b, output[:, 4:], adapters)
        results.append(output)
    plain, *mended = results
    for found in mended:
        assert found[adapters >= 0].equal(plain[adapters >= 0])
        assert found[adapters < 0].equal(before[adapters < 0])
        assert not plain[adapters < 0].equal(before[adapters < 0])
    assert not hasattr(modules[0].bgmv_shrink.__wrapped__, "__wrapped__")


def test_another_vllm_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("vllm.lora.ops.torch_ops", "vllm.lora.ops.torch_ops.lora_ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    cpu_adapters.install()
    assert "keeps its own products" in caplog.text
