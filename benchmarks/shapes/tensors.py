"""The tensors of a checkpoint of each architecture: names as published checkpoints have them, sizes, and what each is.

vLLM's load_weights (vllm/model_executor/models/) is the reader that they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

Config = dict[str, Any]


class Kind(Enum):
    """What a tensor is, which says how large its numbers usually are."""

    LINEAR = auto()
    """(out, in) of a layer; stored as the checkpoint's quantization says."""
    PLAIN = auto()
    """(out, in) that quantized checkpoints keep as it is: routers, gates, the last layer."""
    EMBEDDING = auto()
    NORM = auto()
    """Around 1."""
    NORM_FROM_0 = auto()
    """Around 0, for norms that multiply by 1 + weight."""
    BIAS = auto()
    SINKS = auto()
    CORRECTION = auto()
    """float32, added to the scores of experts when they are chosen."""
    CONVOLUTION = auto()
    DECAY = auto()
    """float32: the logarithm of a state's decay."""
    TIME_STEP = auto()
    EXPERTS_MXFP4 = auto()
    """(experts, out, in), stored as two tensors, NAME_blocks and NAME_scales."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its name with `.weight` where it has that, and its size before quantization."""

    name: str
    size: tuple[int, ...]
    kind: Kind


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, in order. Raises ValueError for an architecture that is not here."""
    kind, hidden = config["model_type"], config["hidden_size"]
    if kind not in _LAYERS:
        raise ValueError(f"there are no names of tensors for model_type {kind!r}")
    norm = Kind.NORM_FROM_0 if kind in _NORMS_FROM_0 else Kind.NORM
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden), Kind.EMBEDDING)
    for number in range(config["num_hidden_layers"]):
        for tensor in _LAYERS[kind](config, number, norm):
            yield Tensor(f"model.layers.{number}.{tensor.name}", tensor.size, tensor.kind)
    yield Tensor("model.norm.weight", (hidden,), norm)
    if not config.get("tie_word_embeddings"):
        yield Tensor("lm_head.weight", (config["vocab_size"], hidden), Kind.PLAIN)


def _linear(name: str, out: int, into: int, kind: Kind = Kind.LINEAR, *, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, into), kind)
    if bias:
        yield Tensor(f"{name}.bias", (out,), Kind.BIAS)


def _norm(name: str, size: int, kind: Kind) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (size,), kind)


def _attention(config: Config, norm: Kind, *, gated: bool = False) -> Iterator[Tensor]:
    hidden, heads, keys = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    all_biases = bool(config.get("attention_bias"))
    biases = all_biases or config["model_type"] == "qwen2"
    yield from _linear("self_attn.q_proj", heads * size * (2 if gated else 1), hidden, bias=biases)
    yield from _linear("self_attn.k_proj", keys * size, hidden, bias=biases)
    yield from _linear("self_attn.v_proj", keys * size, hidden, bias=biases)
    yield from _linear("self_attn.o_proj", hidden, heads * size, bias=all_biases)
    if config["model_type"] in _NORMS_OF_QUERIES:
        yield from _norm("self_attn.q_norm", size, norm)
        yield from _norm("self_attn.k_norm", size, norm)


def _gated_mlp(name: str, hidden: int, between: int) -> Iterator[Tensor]:
    yield from _linear(f"{name}.gate_proj", between, hidden)
    yield from _linear(f"{name}.up_proj", between, hidden)
    yield from _linear(f"{name}.down_proj", hidden, between)


def _two_norms(config: Config, norm: Kind) -> Iterator[Tensor]:
    yield from _norm("input_layernorm", config["hidden_size"], norm)
    yield from _norm("post_attention_layernorm", config["hidden_size"], norm)


def _dense(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    yield from _two_norms(config, norm)
    yield from _attention(config, norm)
    yield from _gated_mlp("mlp", config["hidden_size"], config["intermediate_size"])


def _gemma3(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    yield from _dense(config, number, norm)
    yield from _norm("pre_feedforward_layernorm", config["hidden_size"], norm)
    yield from _norm("post_feedforward_layernorm", config["hidden_size"], norm)


def _experts(config: Config, count: int) -> Iterator[Tensor]:
    for expert in range(count):
        yield from _gated_mlp(f"mlp.experts.{expert}", config["hidden_size"], config["moe_intermediate_size"])


def _qwen3_moe(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    yield from _two_norms(config, norm)
    yield from _attention(config, norm)
    yield from _linear("mlp.gate", config["num_experts"], config["hidden_size"], Kind.PLAIN)
    yield from _experts(config, config["num_experts"])


def _deepseek_v3(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    of_queries, of_keys = config["q_lora_rank"], config["kv_lora_rank"]
    yield from _two_norms(config, norm)
    yield from _linear("self_attn.q_a_proj", of_queries, hidden)
    yield from _norm("self_attn.q_a_layernorm", of_queries, norm)
    yield from _linear("self_attn.q_b_proj", heads * (plain + rotated), of_queries)
    yield from _linear("self_attn.kv_a_proj_with_mqa", of_keys + rotated, hidden)
    yield from _norm("self_attn.kv_a_layernorm", of_keys, norm)
    yield from _linear("self_attn.kv_b_proj", heads * (plain + value), of_keys)
    yield from _linear("self_attn.o_proj", hidden, heads * value)
    if number < config["first_k_dense_replace"]:
        yield from _gated_mlp("mlp", hidden, config["intermediate_size"])
        return
    count = config["n_routed_experts"]
    yield from _linear("mlp.gate", count, hidden, Kind.PLAIN)
    yield Tensor("mlp.gate.e_score_correction_bias", (count,), Kind.CORRECTION)
    yield from _gated_mlp("mlp.shared_experts", hidden, config["moe_intermediate_size"] * config["n_shared_experts"])
    yield from _experts(config, count)


def _gpt_oss(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    hidden, between, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _two_norms(config, norm)
    for tensor in _attention(config, norm):
        yield Tensor(tensor.name, tensor.size, Kind.PLAIN if tensor.kind is Kind.LINEAR else tensor.kind)
    yield Tensor("self_attn.sinks", (config["num_attention_heads"],), Kind.SINKS)
    yield from _linear("mlp.router", count, hidden, Kind.PLAIN, bias=True)
    yield Tensor("mlp.experts.gate_up_proj", (count, 2 * between, hidden), Kind.EXPERTS_MXFP4)
    yield Tensor("mlp.experts.gate_up_proj_bias", (count, 2 * between), Kind.BIAS)
    yield Tensor("mlp.experts.down_proj", (count, hidden, between), Kind.EXPERTS_MXFP4)
    yield Tensor("mlp.experts.down_proj_bias", (count, hidden), Kind.BIAS)


def _delta_net(config: Config, *, fused: bool) -> Iterator[Tensor]:
    """A layer that keeps a state. fused: the projections are two tensors, not four."""
    hidden = config["hidden_size"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    heads, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
    values = heads * size
    if fused:
        yield from _linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        yield from _linear("linear_attn.in_proj_ba", 2 * heads, hidden)
    else:
        yield from _linear("linear_attn.in_proj_qkv", 2 * keys + values, hidden)
        yield from _linear("linear_attn.in_proj_z", values, hidden)
        yield from _linear("linear_attn.in_proj_b", heads, hidden)
        yield from _linear("linear_attn.in_proj_a", heads, hidden)
    yield Tensor(
        "linear_attn.conv1d.weight", (2 * keys + values, 1, config["linear_conv_kernel_dim"]), Kind.CONVOLUTION
    )
    yield Tensor("linear_attn.A_log", (heads,), Kind.DECAY)
    yield Tensor("linear_attn.dt_bias", (heads,), Kind.TIME_STEP)
    yield from _norm("linear_attn.norm", size, Kind.NORM)
    yield from _linear("linear_attn.out_proj", hidden, values)


def _qwen3_5(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    yield from _two_norms(config, norm)
    if config["layer_types"][number] == "linear_attention":
        yield from _delta_net(config, fused=False)
    else:
        yield from _attention(config, norm, gated=True)
    yield from _gated_mlp("mlp", config["hidden_size"], config["intermediate_size"])


def _qwen3_next(config: Config, number: int, norm: Kind) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield from _two_norms(config, norm)
    if config["layer_types"][number] == "linear_attention":
        yield from _delta_net(config, fused=True)
    else:
        yield from _attention(config, norm, gated=True)
    yield from _linear("mlp.gate", config["num_experts"], hidden, Kind.PLAIN)
    yield from _gated_mlp("mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
    yield from _linear("mlp.shared_expert_gate", 1, hidden, Kind.PLAIN)
    yield from _experts(config, config["num_experts"])


_LAYERS = {
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "gemma3_text": _gemma3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "qwen3_5_text": _qwen3_5,
    "qwen3_next": _qwen3_next,
}
_NORMS_FROM_0 = ("gemma3_text", "qwen3_5_text", "qwen3_next")
_NORMS_OF_QUERIES = ("qwen3", "qwen3_moe", "gemma3_text", "qwen3_5_text", "qwen3_next")
