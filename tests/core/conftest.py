from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fakes.vllm_server import FakeVLLM


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM() as fake:
        yield fake
