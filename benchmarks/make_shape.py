"""Make a model folder of a known shape without weights: enough for a vLLM server started with --load-format dummy.

    python benchmarks/make_shape.py 8B /tmp/llama-8b
    scripts/launch_vllm_server.sh /tmp/llama-8b --load-format dummy --served-model-name llama-8b
    python benchmarks/make_shape.py deepseek-v3 /tmp/deepseek-v3 --layers 5 --weights      # 5 layers of full width
    python benchmarks/make_shape.py gpt-oss-20b /tmp/tiny-gpt-oss --tiny --weights         # the same layers, narrow

The time of arithmetic does not depend on the weights, so random weights of the same shape are as fast as the real
model. The answers mean nothing. The tokenizer has one token a word, so that a claim of 40 words has 40 tokens; it also
has the words of the built-in claims.

vLLM's dummy weights are too small to show differences in rounding. --weights writes random weights of usual scale as a
published checkpoint stores them, quantized where it is (needs PyTorch and safetensors; on a GPU seconds for 16 GB), for
scripts/test_determinism.py. benchmarks/shapes/published.py says where each shape is from. Exit code 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes.published import AWQ, FP8_BLOCKS, GPTQ, PUBLISHED, completed, narrowed
from core.flags import FlagParser
from src.pipeline.datafiles import load_testbed

# The pieces of a byte-level pre-tokenizer: words, numbers and marks, each with the blank before it, and blanks.
_PIECE: Final = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")

LABELS: Final = (" True", " False")
WORDS: Final = 4000
BOS: Final = "<|begin_of_text|>"
TOKENIZER: Final = "tokenizer"
"""A folder of the tokenizer alone, for vLLM's --tokenizer: beside a config.json of Qwen2's, transformers 5 reads any
tokenizer.json as pieces of Qwen's own words, and every word here becomes one unknown token."""

LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    # Next to no arithmetic, to measure everything around the model. For a CPU.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 8192,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
    # Every linear layer but the last in fp8, activations scaled as they come.
    "405B-fp8": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 126,
        "num_key_value_heads": 8,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    },
}

_8B: Final = SHAPES["8B"]
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    **{name: LLAMA | shape for name, shape in SHAPES.items()},
    "8B-fp8-blocks": LLAMA | _8B | {"quantization_config": FP8_BLOCKS},
    "8B-awq": LLAMA | _8B | {"quantization_config": AWQ},
    "8B-gptq": LLAMA | _8B | {"quantization_config": GPTQ},
    **PUBLISHED,
    **{
        f"{name}-bf16": {key: value for key, value in PUBLISHED[name].items() if key != "quantization_config"}
        for name in ("deepseek-v3", "gpt-oss-20b")
    },
}
"""Every shape: what its config.json says."""


def word(number: int) -> str:
    """The text of one token: letters only, for digits are tokens of their own. Numbers wrap around at WORDS."""
    return " w" + "".join(chr(ord("a") + number % WORDS // 26**place % 26) for place in range(3))


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json that maps every word, label and blank line to one token."""
    # The byte-level alphabet writes a blank as Ġ and a line feed as Ċ.
    texts = [BOS, "<unk>", "ĊĊ", *("Ġ" + label.strip() for label in LABELS)]
    texts += ["Ġ" + word(number).strip() for number in range(WORDS)]
    texts += sorted({_as_bytes(piece) for piece in _built_in_pieces() if piece.isascii()} - set(texts))
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": BOS,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(texts)}, "unk_token": "<unk>"},
    }


def _built_in_pieces() -> set[str]:
    _, claims, _ = load_testbed("builtin", Path())
    return {piece for claim in claims for piece in _PIECE.findall(claim.text)}


def _as_bytes(piece: str) -> str:
    return piece.replace(" ", "Ġ").replace("\n", "Ċ")


def make_shape(name: str, folder: Path, layers: int | None = None, *, tiny: bool = False) -> Path:
    """Write config.json and the tokenizer of the shape `name` into `folder`, which is made where it is missing.

    layers: this many in place of the shape's. With half of them each of two GPUs has as much as each of four has of
    all. tiny: the narrow variant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = narrowed(CONFIGS[name]) if tiny else CONFIGS[name]
    files = {
        "config.json": completed(config | ({} if layers is None else {"num_hidden_layers": layers})),
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "unk_token": "<unk>"},
    }
    if config["model_type"] == "qwen2":
        (folder / TOKENIZER).mkdir(exist_ok=True)
        files |= {f"{TOKENIZER}/{file}": files[file] for file in ("tokenizer.json", "tokenizer_config.json")}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder and say where it is."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(CONFIGS), metavar="SHAPE", help=", ".join(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="that many layers, in place of the shape's own")
    parser.add_argument("--tiny", action="store_true", help="a narrow variant with few layers, for a CPU")
    parser.add_argument("--weights", action="store_true", help="also write random weights of a model's usual scale")
    parser.add_argument("--adapter", action="store_true", help="with --weights: also a LoRA adapter, in FOLDER/adapter")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.layers < 1:
        parser.error("--layers must be at least 1")
    if args.adapter and not args.weights:
        parser.error("--adapter is for --weights")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{args.folder} cannot be made: {error.strerror}")
    print(make_shape(args.shape, args.folder, args.layers, tiny=args.tiny), flush=True)
    if args.weights:
        # PyTorch is not needed for the rest.
        from benchmarks.shapes.weights import write_weights

        write_weights(args.folder, adapter=args.adapter)
    return 0


if __name__ == "__main__":
    sys.exit(main())
