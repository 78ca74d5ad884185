from __future__ import annotations

from core.llm_api.http.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
from core.llm_api.types import PrefixCacheCounters

# Lines of a real vLLM 0.32 server, a second engine added.
TEXT = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a } b"} 309579.0
vllm:prefix_cache_queries_total{engine="1",model_name="a } b"} 1e+06
vllm:prefix_cache_queries_created{engine="0",model_name="gemma"} 1.795267089678516e+09
vllm:prefix_cache_hits_total{engine="0",model_name="gemma"} 280960.0
vllm:prefix_cache_hits_total{engine="1",model_name="gemma"} 40.0
vllm:external_prefix_cache_queries_total{engine="0",model_name="gemma"} 77.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="gemma"} 77.0
"""
BLOCKS = 'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="43690"} 1.0\n'
STATED = 'vllm:cache_config_info{block_size="32",kv_cache_size_tokens="541465",num_gpu_blocks="43690"} 1.0\n'
UNKNOWN = 'vllm:cache_config_info{block_size="32",kv_cache_size_tokens="None",num_gpu_blocks="None"} 1.0\n'


def test_counters_are_summed_over_engines_and_nothing_else() -> None:
    assert prefix_cache_counters(TEXT) == PrefixCacheCounters(1_309_579, 281_000)


def test_counters_absent() -> None:
    assert prefix_cache_counters("") is None
    assert prefix_cache_counters("\n".join(line for line in TEXT.splitlines() if "hits" not in line)) is None
    assert prefix_cache_counters("vllm:prefix_cache_queries_total garbage\n{}") is None


def test_capacity_as_stated_else_from_blocks() -> None:
    assert kv_cache_capacity(BLOCKS) == 43690 * 32
    assert kv_cache_capacity(STATED) == 541_465
    assert kv_cache_capacity(BLOCKS + STATED) == 541_465  # the smallest engine
    assert kv_cache_capacity(UNKNOWN) is None
    assert kv_cache_capacity("") is None


def test_block_size_is_the_larger_of_what_is_stated() -> None:
    gemma = 'vllm:cache_config_info{block_size="16",effective_attention_block_size="32"} 1.0\n'
    assert kv_block_size(BLOCKS) == 32
    assert kv_block_size(gemma) == 32
    assert kv_block_size('vllm:cache_config_info{block_size="None"} 1.0\n') is None
    assert kv_block_size("") is None
