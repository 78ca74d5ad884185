"""Checkpoints with random weights: names as transformers has them, sizes, quantized formats, and usual scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_shape import CONFIGS, LABELS, TOKENIZER, main, make_shape
from benchmarks.shapes.published import PUBLISHED, completed
from benchmarks.shapes.tensors import Kind, tensors

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor of the checkpoint, through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Any] = {}
    for file in sorted(set(index.values())):
        found |= safetensors_torch.load_file(folder / file)
    assert set(found) == set(index)
    return found


def made(name: str, folder: Path, *more: str) -> dict[str, Any]:
    assert main([name, str(folder), "--tiny", "--weights", *more]) == 0
    return stored(folder)


def in_transformers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the model that transformers makes of the config.json, without its quantization."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("tiny", "1B", "70B")])
def test_names_and_sizes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make_shape(name, tmp_path, tiny=True)
    config = json.loads((tmp_path / "config.json").read_text())
    ours = {tensor.name: tensor.size for tensor in tensors(config)}
    theirs = in_transformers(tmp_path)
    if config["tie_word_embeddings"]:
        theirs.pop("lm_head.weight")
    # transformers holds experts in one tensor, checkpoints have each by itself: together they have as many numbers.
    experts = {key: size for key, size in ours.items() if ".mlp.experts." in key and "proj_bias" not in key}
    theirs_of_experts = {key: size for key, size in theirs.items() if ".mlp.experts." in key and "proj_bias" not in key}
    assert {k: v for k, v in ours.items() if k not in experts} == {
        k: v for k, v in theirs.items() if k not in theirs_of_experts
    }
    assert numbers(experts) == numbers(theirs_of_experts)
    assert bool(experts) == any(word in name for word in ("a3b", "deepseek", "oss"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokenizer_is_read_by_transformers_as_it_was_written(name: str, tmp_path: Path) -> None:
    folder = make_shape(name, tmp_path, tiny=True)
    place = folder / TOKENIZER if (folder / TOKENIZER).exists() else folder
    read = transformers.AutoTokenizer.from_pretrained(place)
    assert [len(read(label, add_special_tokens=False).input_ids) for label in LABELS] == [1, 1]
    assert len({read(label).input_ids[-1] for label in LABELS}) == 2


def test_experts_that_are_not_quantized_are_stored_as_transformers_has_them(tmp_path: Path) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in made("gpt-oss-20b-bf16", tmp_path).items()}
    assert found == in_transformers(tmp_path)


def numbers(sizes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(size).numel() for size in sizes.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_shape_has_the_numbers_of_its_name(name: str) -> None:
    billions = {
        "qwen3-8b": 8.19,
        "qwen3-30b-a3b": 30.5,
        "deepseek-v3": 671.0,
        "gemma3-4b": 3.88,
        "gemma3-12b": 11.77,
        "gpt-oss-20b": 20.9,
        "qwen2.5-7b": 7.62,
        "qwen3.5-9b": 8.95,
        "qwen3-next-80b-a3b": 79.7,
    }
    found = numbers({tensor.name: tensor.size for tensor in tensors(completed(PUBLISHED[name]))})
    assert found / 1e9 == pytest.approx(billions[name], rel=0.005)


def test_depth_keeps_the_pattern_of_layers(tmp_path: Path) -> None:
    config = json.loads((make_shape("gemma3-4b", tmp_path, layers=7) / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    config = json.loads((make_shape("gpt-oss-20b", tmp_path, layers=3) / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    config = json.loads((make_shape("qwen3.5-9b", tmp_path, layers=4) / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]


def test_a_small_model_of_these_weights_varies_and_is_usual(tmp_path: Path) -> None:
    """Not flat: the next token depends on the prompt, and log-probabilities are far from uniform and from certain."""
    made("qwen3-30b-a3b", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    assert 0.5 < float(logits.std()) < 3.0
    assert float((logits[0] - logits[1]).std()) > 0.5


def test_norms_biases_sinks_and_states_are_as_usual(tmp_path: Path) -> None:
    gpt = made("gpt-oss-20b", tmp_path / "gpt")
    assert 0.2 < float(gpt["model.layers.0.self_attn.sinks"].float().std()) < 3
    assert float(gpt["model.layers.0.mlp.router.bias"].abs().max()) > 0
    assert abs(float(gpt["model.norm.weight"].float().mean()) - 1) < 0.1
    gemma = made("gemma3-4b", tmp_path / "gemma")
    assert abs(float(gemma["model.norm.weight"].float().mean())) < 0.1
    assert "lm_head.weight" not in gemma
    state = made("qwen3.5-9b", tmp_path / "state")
    assert state["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    steps = torch.nn.functional.softplus(state["model.layers.0.linear_attn.dt_bias"].float())
    assert bool(((steps > 0.0009) & (steps < 0.12)).all())


def unpacked(words: Any, dimension: int) -> Any:
    """Eight numbers of four bits of each int32, lowest bits first, as a new dimension after `dimension`."""
    return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=dimension + 1)


def test_gptq_decodes_to_weights_of_usual_scale(tmp_path: Path) -> None:
    found = made("8B-gptq", tmp_path)
    name = "model.layers.0.mlp.down_proj"
    codes, scales = unpacked(found[f"{name}.qweight"], 0), found[f"{name}.scales"].float()
    weights = (codes.reshape(512, 256) - 8) * scales.repeat_interleave(128, 0)
    assert (unpacked(found[f"{name}.qzeros"], 1) + 1 == 8).all()
    assert found[f"{name}.g_idx"].tolist() == [row // 128 for row in range(512)]
    assert float(weights.std()) == pytest.approx(512**-0.5, rel=0.1)
    assert codes.min() == 0
    assert codes.max() == 15


def test_awq_decodes_to_weights_of_usual_scale(tmp_path: Path) -> None:
    found = made("8B-awq", tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    # Column 8 i + j of a word is at place j of 0 4 1 5 2 6 3 7.
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    codes = unpacked(found[f"{name}.qweight"], 1)[..., order].reshape(256, 256)
    zeros = unpacked(found[f"{name}.qzeros"], 1)[..., order].reshape(2, 256)
    weights = (codes - zeros.repeat_interleave(128, 0)) * found[f"{name}.scales"].float().repeat_interleave(128, 0)
    assert set(zeros.unique().tolist()) == {7, 8, 9}
    assert float(weights.std()) == pytest.approx(256**-0.5, rel=0.15)


def test_fp8_in_blocks_and_whole_decodes_to_weights_of_usual_scale(tmp_path: Path) -> None:
    found = made("deepseek-v3", tmp_path / "blocks", "--layers", "2")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    weights, scales = found[f"{name}.weight"], found[f"{name}.weight_scale_inv"]
    assert weights.dtype == torch.float8_e4m3fn
    assert tuple(scales.shape) == (5, 2)  # 576 x 256
    whole = weights.float() * scales.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)
    assert float(whole.std()) == pytest.approx(256**-0.5, rel=0.1)
    found = made("405B-fp8", tmp_path / "whole")
    weights = found[f"{(name := 'model.layers.0.mlp.up_proj')}.weight"].float() * found[f"{name}.weight_scale"]
    assert float(weights.std()) == pytest.approx(256**-0.5, rel=0.15)


def test_mxfp4_decodes_to_weights_of_usual_scale(tmp_path: Path) -> None:
    found = made("gpt-oss-20b", tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = found[f"{name}_blocks"], found[f"{name}_scales"]
    assert tuple(blocks.shape) == (8, 1024, 8, 16)
    assert tuple(scales.shape) == (8, 1024, 8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
    weights = pairs.flatten(-2) * 2.0 ** (scales.float() - 127).unsqueeze(-1)
    assert float(weights.mean().abs()) < 0.002
    assert 0.5 < float(weights.std()) * 256**0.5 < 2


def test_an_adapter_fits_the_layers_and_changes_them(tmp_path: Path) -> None:
    found = made("8B", tmp_path, "--adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16
    factors = safetensors_torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = [t for t in tensors(json.loads((tmp_path / "config.json").read_text())) if t.kind is Kind.LINEAR]
    assert len(factors) == 2 * len(layers) == 28
    for layer in layers:
        name = f"base_model.model.{layer.name.removesuffix('.weight')}"
        update = factors[f"{name}.lora_B.weight"].float() @ factors[f"{name}.lora_A.weight"].float()
        assert tuple(update.shape) == tuple(found[layer.name].shape)
        assert 0.03 < float(update.std() / found[layer.name].float().std()) < 0.3


def test_large_checkpoints_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.weights.FILE_BYTES", 1 << 20)
    found = made("8B", tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_weights_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    weights = pytest.importorskip("benchmarks.shapes.weights")
    with pytest.raises(ValueError, match="exl2"):
        weights.RandomWeights({"quant_method": "exl2"}, "cpu")
    with pytest.raises(ValueError, match="mamba"):
        list(tensors({"model_type": "mamba", "hidden_size": 8}))


@pytest.mark.parametrize("words", [["8B", "x", "--adapter"], ["8B", "x", "--layers", "0"], ["9B", "x"]])
def test_contradicting_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err
