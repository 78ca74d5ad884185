"""The schema holds what it says: schemathesis asks every route what it allows, and what it does not."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contrib.serving.options import Limits
from tests.contrib.serving.conftest import Serve, WritingVLLM

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
# /score takes one of two forms. Fuzzing breaks one of them and may hit the other, which is rightly accepted; the broken
# forms of the coverage phase, and test_score.py's, are all refused.
FUZZING = """
[[operations]]
include-name = "POST /score"
checks.negative_data_rejection.enabled = false
"""
TOKEN = "planted-token-0123456789"


@pytest.fixture
async def model() -> AsyncIterator[WritingVLLM]:
    """With a context that holds whatever the schema allows: that 256 long claims do not fit no schema can say."""
    async with WritingVLLM(max_model_len=10_000_000) as fake:
        yield fake


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("phase", "token"),
    [("coverage", None), ("fuzzing", None), ("fuzzing", TOKEN)],
    ids=["coverage", "fuzzing", "token"],
)
async def test_schemathesis_finds_no_500_and_nothing_that_the_schema_does_not_say(
    serve: Serve, tmp_path: Path, phase: str, token: str | None
) -> None:
    (tmp_path / "schemathesis.toml").write_text(FUZZING if phase == "fuzzing" else "")
    authorization = [] if token is None else ["--header", f"Authorization: Bearer {token}"]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with serve(Limits(concurrent=8), token=token) as site:
        process = await asyncio.create_subprocess_exec(
            *(SCHEMATHESIS, "--config-file", "schemathesis.toml", "run", f"{site.url}/openapi.json"),
            *("--phases", phase, "--max-examples", "25", "--seed", "1", "--no-color", *authorization),
            cwd=tmp_path,  # it keeps a folder of what it found
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await process.communicate())[0].decode()
        metrics = (await site.get("/metrics", headers=headers))[1]
    assert process.returncode == 0, said[:4000] + said[-2000:]
    statuses = {
        line.split('status="')[1][:3] for line in metrics.splitlines() if line.startswith("icm_serving_requests_total{")
    }
    assert "200" in statuses
    assert "422" in statuses
    assert not {"500", "502", "504"} & statuses


async def test_the_schema_declares_the_token_and_every_refusal(serve: Serve) -> None:
    async with serve(token=TOKEN) as site:
        schema = json.loads((await site.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}))[1])
    assert set(schema["paths"]) == {"/query", "/score", "/health", "/ready", "/metrics"}
    query = schema["paths"]["/query"]["post"]
    assert query["security"] == [{"bearer": []}]
    assert "security" not in schema["paths"]["/health"]["get"]
    assert set(query["responses"]) >= {"200", "400", "401", "408", "413", "415", "422", "429", "502", "503", "504"}
    assert "Retry-After" in query["responses"]["429"]["headers"]
