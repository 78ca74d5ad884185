"""Scoring needs nothing of core.llm_api.text: that folder may be absent."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fakes.vllm_server import FALSE, TRUE, FakeVLLM

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("core.llm_api.text"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())

import core.llm_api.engines.direct, core.llm_api.engines.external, core.llm_api.engines.llama_server
from core.llm_api.labels import TRUE_FALSE, SpelledLabels
from core.llm_api.llm import open_model_api
from core.llm_api.types import Prompt, Segment
from core.settings import Settings

async def main(urls, model, true, false):
    labels = SpelledLabels(TRUE_FALSE, ((false,), (true,)))
    prompts = [Prompt((Segment("", (5, 6, number)),), name=f"claim {number}", place=number / 10) for number in range(4)]
    async with open_model_api(Settings(vllm_base_url=urls), model=model) as api:
        print(*(await api.score(prompts, labels)).log_odds)
        try:
            await api.chat([])
        except ModuleNotFoundError as error:
            print("no", error)

asyncio.run(main(sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


async def test_a_pool_is_scored_without_the_text_folder() -> None:
    async with FakeVLLM() as one, FakeVLLM() as other:
        for urls in (one.url, f"{one.url},{other.url}"):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, urls, one.model, str(TRUE), str(FALSE)),
                cwd=REPOSITORY,
                stdout=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate()
            scores, refusal = out.decode().splitlines()
            expected = [one.log_odds((5, 6, number)) for number in range(4)]
            assert [abs(float(a) - b) < 1e-12 for a, b in zip(scores.split(), expected, strict=True)] == [True] * 4
            assert refusal.startswith("no core.llm_api.text")
