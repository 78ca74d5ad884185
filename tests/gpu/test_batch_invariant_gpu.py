"""The batch-invariant kernels on a real GPU: every claim of icm_vllm/batch_invariant that the interpreter cannot show.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# Warnings of the many versions of PyTorch and Triton that GPU machines have are not what is tested here.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

TYPES = ("bfloat16", "float16", "float32")
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 255, 256, 300, 511, 640, 1024)
SHAPES = ((4096, 6144), (4096, 4096), (1000, 520), (14336, 512), (72, 264), (33, 17))


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.manual_seed(0)
    return torch


def test_every_tile_of_this_gpu_gives_the_same_bits(torch: Any) -> None:
    """Without this, tiles must not be chosen by the number of rows."""
    from icm_vllm.batch_invariant import agreement

    for name in TYPES:
        for n, k in ((512, 1040), (6144, 4096), (272, 48)):
            results = agreement(torch.device("cuda", 0), getattr(torch, name), n=n, k=k)
            assert results
            assert [found for found in results if found[1]] == []


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_a_row_of_a_product_keeps_its_bits(torch: Any, k: int, n: int, name: str) -> None:
    from icm_vllm.batch_invariant import product

    a = torch.randn(2048, k, device="cuda", dtype=getattr(torch, name))
    w = torch.randn(n, k, device="cuda", dtype=getattr(torch, name))
    for b in (w.t(), w.t().contiguous()):
        whole = product(a, b)
        for m in SIZES:
            for start in (0, 1, 500):
                assert torch.equal(product(a[start : start + m], b), whole[start : start + m]), (m, start)
        moved = a[:300].t().contiguous().t()
        assert torch.equal(product(moved, b), whole[:300])
        batch = product(a[:600].view(3, 200, k), b.expand(3, k, n))
        assert torch.equal(batch.view(600, n), whole[:600])


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 4e-3), ("float16", 6e-4), ("float32", 2e-6)])
def test_products_against_float64(torch: Any, name: str, tolerance: float) -> None:
    from icm_vllm.batch_invariant import product

    for m, k, n in ((300, 4096, 512), (5, 1, 7), (64, 63, 65), (1, 14336, 40)):
        a = torch.randn(m, k, device="cuda", dtype=getattr(torch, name))
        b = torch.randn(k, n, device="cuda", dtype=getattr(torch, name))
        bias = torch.randn(n, device="cuda", dtype=getattr(torch, name))
        exact = a.double() @ b.double() + bias.double()
        assert float((product(a, b, bias).double() - exact).abs().max() / exact.abs().max()) < tolerance


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n", [100, 128, 4096, 5000, 128256])
def test_rows_keep_their_bits(torch: Any, n: int, name: str) -> None:
    from icm_vllm.batch_invariant import log_softmax, rms_norm, softmax, total

    functions: list[Callable[[Any], Any]] = [softmax, log_softmax, lambda x: total(x, [-1], mean=True)]
    if n <= 65536:
        functions += [lambda x: rms_norm(x, None, 1e-6)[0], lambda x: rms_norm(x, None, 1e-6, x.flip(-1))[0]]
    x = torch.randn(400, n, device="cuda", dtype=getattr(torch, name))
    padded = torch.zeros(400, n + 8, device="cuda", dtype=x.dtype)
    for function in functions:
        whole = function(x)
        for m in (1, 2, 16, 17, 255, 256, 300):
            for start in (0, 1, 99):
                assert torch.equal(function(x[start : start + m]), whole[start : start + m])
        for offset in (0, 1, 8):
            padded[:, offset : offset + n] = x
            assert torch.equal(function(padded[:, offset : offset + n]), whole)


def llama(torch: Any, name: str, attention: str = "eager") -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", getattr(torch, name)).eval()
    # Weights as large as a trained model's: small ones would hide differences.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TYPES)
def test_a_plain_pytorch_transformer(torch: Any, name: str, attention: str) -> None:
    from icm_vllm.batch_invariant import set_batch_invariant_mode

    model, tokens = llama(torch, name, attention), torch.randint(1000, (48, 61), device="cuda")
    with torch.inference_mode(), set_batch_invariant_mode():
        together = model(tokens).logits
        for rows in ([0], [47], [5, 4], list(range(20)), list(range(47, -1, -1))):
            assert torch.equal(model(tokens[rows]).logits, together[rows]), rows
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, together, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("count", [30, 7, 2, 1])
def test_under_torch_compile(torch: Any, count: int) -> None:
    """One row is a case of its own to the compiler, which makes other code for it."""
    from icm_vllm.batch_invariant import set_batch_invariant_mode

    model, tokens = llama(torch, "bfloat16"), torch.randint(1000, (48, 61), device="cuda")
    torch.compiler.reset()
    with torch.inference_mode(), set_batch_invariant_mode():
        compiled = torch.compile(model, dynamic=True)
        together = compiled(tokens).logits
        assert torch.equal(compiled(tokens[:count]).logits, together[:count])
    torch.compiler.reset()


@pytest.mark.parametrize("name", TYPES)
def test_in_cuda_graphs(torch: Any, name: str) -> None:
    """A layer written out in PyTorch: norm, linear, attention, softmax, and the log-softmax of the end."""
    from icm_vllm.batch_invariant import set_batch_invariant_mode

    dtype = getattr(torch, name)
    up = torch.randn(1536, 512, device="cuda", dtype=dtype) * 512**-0.5
    down = torch.randn(3000, 512, device="cuda", dtype=dtype) * 512**-0.5

    def layer(x: Any) -> Any:
        x = x * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().to(dtype)
        q, k, v = torch.nn.functional.linear(x, up).chunk(3, dim=-1)
        x = x + (q @ k.mT * 512**-0.5).softmax(-1) @ v
        return torch.nn.functional.linear(x, down).log_softmax(-1, dtype=torch.float32)

    x = torch.randn(40, 33, 512, device="cuda", dtype=dtype)
    with torch.inference_mode(), set_batch_invariant_mode():
        together = layer(x)
        for count in (1, 5, 40):
            fixed = torch.zeros_like(x[:count])
            layer(fixed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = layer(fixed)
            fixed.copy_(x[:count])
            graph.replay()
            assert torch.equal(found, together[:count])


def test_the_mode_is_undone(torch: Any) -> None:
    from icm_vllm.batch_invariant import set_batch_invariant_mode

    a = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    before = a @ b, a.softmax(-1), a.mean(-1)
    with set_batch_invariant_mode():
        _ = a @ b, a.softmax(-1), a.mean(-1)
        assert (a.double() @ b.double()).dtype == torch.float64
    assert all(torch.equal(x, y) for x, y in zip(before, (a @ b, a.softmax(-1), a.mean(-1)), strict=True))


def test_without_the_mode_rows_differ(torch: Any) -> None:
    """The checks above can fail: PyTorch's own products do depend on the number of rows."""
    a = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    whole = a @ b
    assert any(not torch.equal(a[:m] @ b, whole[:m]) for m in SIZES)


@pytest.fixture
def hopper(torch: Any) -> Any:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("8-bit products are computed on compute capability 9")
    return torch


def test_every_tile_of_8_bit_floats_gives_the_same_bits(hopper: Any) -> None:
    from icm_vllm.batch_invariant.scaled import tiles_agree

    for n, k in ((512, 1040), (4608, 16384), (272, 48)):
        results = tiles_agree(hopper.device("cuda", 0), n=n, k=k)
        assert len(results) > 50
        assert [found for found in results if found[1]] == []


@pytest.mark.parametrize(("k", "n"), [(4096, 6144), (1008, 528), (16384, 1024)])
def test_a_row_of_an_8_bit_product_keeps_its_bits(hopper: Any, k: int, n: int) -> None:
    from icm_vllm.batch_invariant import scaled_product

    a = hopper.randn(2048, k, device="cuda").to(hopper.float8_e4m3fn)
    b = hopper.randn(n, k, device="cuda").to(hopper.float8_e4m3fn).t()
    scale_a, scale_b = hopper.rand(2048, 1, device="cuda"), hopper.rand(n, 1, device="cuda")
    bias = hopper.randn(n, device="cuda", dtype=hopper.bfloat16)
    for extra in (None, bias):
        whole = scaled_product(a, b, scale_a, scale_b, extra)
        for m in SIZES:
            for start in (0, 1, 500):
                rows = slice(start, start + m)
                assert hopper.equal(scaled_product(a[rows], b, scale_a[rows], scale_b, extra), whole[rows]), (m, start)
    # The matrix unit loses some bits of such sums; PyTorch's own product in the fast way of adding loses as many.
    exact = (a.double() * scale_a) @ (b.double() * scale_b.t()) + bias.double()
    own = hopper._scaled_mm(a, b, scale_a, scale_b.t(), bias, out_dtype=hopper.bfloat16, use_fast_accum=True)
    errors = [float((found.double() - exact).abs().max()) for found in (whole, own)]
    assert errors[0] < 1.1 * errors[1]


def test_8_bit_products_in_cuda_graphs_and_compiled(hopper: Any) -> None:
    from icm_vllm.batch_invariant import scaled_product

    a = hopper.randn(256, 1024, device="cuda").to(hopper.float8_e4m3fn)
    b = hopper.randn(512, 1024, device="cuda").to(hopper.float8_e4m3fn).t()
    scale_a, scale_b = hopper.rand(256, 1, device="cuda"), hopper.rand(512, 1, device="cuda")
    expected = scaled_product(a, b, scale_a, scale_b)
    graph = hopper.cuda.CUDAGraph()
    with hopper.cuda.graph(graph):
        found = scaled_product(a, b, scale_a, scale_b)
    graph.replay()
    assert hopper.equal(found, expected)
    compiled = hopper.compile(lambda x, s: hopper.ops.icm.scaled_product(x, b, s, scale_b, None, hopper.bfloat16))
    for rows in (256, 7):
        assert hopper.equal(compiled(a[:rows], scale_a[:rows]), expected[:rows])
