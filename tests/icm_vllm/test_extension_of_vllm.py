"""The extension on the real vLLM of this environment: it finds its places there, and nothing but time changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_server
REPOSITORY = Path(__file__).resolve().parents[2]

PROGRAM = """
import random
import torch
from icm_vllm import pools
from icm_vllm.block_hashes import PathHasher
from icm_vllm.plugin import register
from icm_vllm.prompt_tree import PromptTree
register(); register()
from vllm.lora.ops import torch_ops
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256

fast = core.get_request_block_hasher
print("installed", hasattr(fast, "remembers"), hasattr(FullAttentionManager.find_longest_cache_hit, "remembers"),
      hasattr(GPUModelRunner.add_requests, "uncached_only"), pools.installed())

init_none_hash(sha256)
spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
config = KVCacheConfig(num_blocks=120, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
manager = KVCacheManager(config, max_model_len=4096, scheduler_block_size=16, hash_block_size=16, enable_caching=True,
                         max_in_flight_tokens=4096)
rng = random.Random(0)
pieces = [[rng.randrange(1000) for _ in range(21)] for _ in range(8)]
found = []
for number in range(300):
    # A small cache: blocks are evicted all the time.
    tokens = sum((rng.choice(pieces) for _ in range(rng.randrange(1, 12))), [])
    request = Request(request_id=str(number), prompt_token_ids=tokens, pooling_params=None,
                      sampling_params=SamplingParams(max_tokens=1), block_hasher=fast(16, sha256))
    blocks, hit = manager.get_computed_blocks(request)[:2]
    assert manager.allocate_slots(request, len(tokens) - hit, hit, blocks) is not None
    request.num_computed_tokens = len(tokens)
    found.append((hit, len(request.block_hashes), hash(request.block_hashes[-1]) if request.block_hashes else 0))
    manager.free(request)
print("found", found)

# Trees for several adapters in turns, two of them of one name: vLLM's own hashes.
own = fast(16, sha256)
own = getattr(own, "hasher", own)
path = PathHasher(own, 16)
adapters = [None, LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b"), LoRARequest("a", 3, "/c")]
hashed = {}
for number in range(60):
    parents = [rng.randrange(-1, node) for node in range(12)]
    tree = PromptTree(pieces, parents, [rng.randrange(8) for _ in parents], [rng.randrange(12) for _ in range(8)])
    adapter = rng.choice(adapters)
    for tokens, path.shared in tree.prompts():
        by_path, by_vllm = (
            Request(request_id="0", prompt_token_ids=tokens, pooling_params=None, lora_request=adapter,
                    sampling_params=SamplingParams(max_tokens=1), block_hasher=hasher)
            for hasher in (path, own)
        )
        assert by_path.block_hashes == by_vllm.block_hashes
        hashed.setdefault(id(adapter), set()).update(by_path.block_hashes)
print("hashed", len(hashed), path.fresh < len(tokens))

# Two requests of two and three rows on a CPU: of no adapter, and of the first one.
small, large = torch.full((5, 3), 7.0), torch.ones(5, 4)
metadata = torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([-1, 0]), 2, 3, 5
torch_ops.sgmv_shrink(torch.ones(5, 6), torch.ones(1, 3, 6), small, *metadata, 0.5)
torch_ops.sgmv_expand_slice(small, torch.ones(1, 2, 3), large, *metadata, 1, 2, add_inputs=True)
print("adapters", large.tolist() == [[1.0] * 4] * 2 + [[1.0, 10.0, 10.0, 1.0]] * 3)
"""


def run(fast: bool) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(REPOSITORY)}
    environment["ICM_FAST_PREFIXES"] = "1" if fast else "0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("installed", "found", "hashed", "adapters"))]


def test_it_is_installed_where_it_is_asked_for_and_finds_the_same_blocks() -> None:
    fast, plain = run(fast=True), run(fast=False)
    assert fast[0] == "installed True True True True"
    assert plain[0] == "installed False False False False"
    assert fast[1] == plain[1]
    assert fast[2] == plain[2] == "hashed 4 True"
    assert fast[3] == "adapters True"  # without ours before 0.33 the first request is computed with the second one's
    assert any(hit for hit, _, _ in eval(fast[1].removeprefix("found ")))


GUARDED = """
import asyncio
from types import SimpleNamespace
from fastapi import FastAPI
try:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
except ImportError:  # before 0.29
    from vllm.entrypoints.serve.utils.server_utils import AuthenticationMiddleware
from icm_vllm.prompt_tree import ADAPTER_PATH, PATH
from icm_vllm.label_logprobs import LabelLogprobs

app = FastAPI()
app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="some model")])
# In the order in which vLLM adds them: --api-key first, --middleware last, which makes it the outermost.
app.add_middleware(AuthenticationMiddleware, tokens=["right"])
app.add_middleware(LabelLogprobs)

async def call(method, path, key):
    sent = []
    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}
    async def send(message):
        sent.append(message)
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    await app(scope, receive, send)
    return sent[0]["status"]

async def main():
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    async def receive():
        return next(messages)
    async def send(message):
        pass
    await app({"type": "lifespan"}, receive, send)
    ways = (("GET", PATH), ("POST", PATH), ("POST", ADAPTER_PATH))
    print("statuses", [await call(*way, key) for way in ways for key in (None, "wrong", "right")])

app.state.engine_client = SimpleNamespace(model_config=SimpleNamespace(max_model_len=10))
asyncio.run(main())
"""


def test_the_route_lies_behind_the_servers_key() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # With the right key a body of {} is refused for what it lacks.
    assert "statuses [401, 401, 200, 401, 401, 400, 401, 401, 400]" in done.stdout
