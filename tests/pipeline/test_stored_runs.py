"""Runs of two labels as they were before there could be more: the same files to the byte, but for what they cost.

stored_run holds one of them whole. The others are known by a digest. `UPDATE_STORED=1` writes the one and prints the
digests; they change only with a new version of the journal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.icm.journal import replay
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.testbeds import ConsistencyMode
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, prepare_batches
from src.results.rows import pool_rows
from src.results.run_folder import RunFolder

STORED = Path(__file__).with_name("stored_run")
COST = (
    *("asked", "from_cache", "tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds"),
    *("asked_ahead", "ahead_used"),
)
RUNS: dict[str, dict[str, Any]] = {
    "tree": {"consistency": "none"},
    "upstream": {"layout": "upstream", "scheduler": "log-upstream"},
    "consistent": {"seed": 3, "initial_T": 0.5},
    "calibrated": {"objective": Objective(30.0, "mean"), "seed": 4},
    "prior": {"objective": Objective(30.0, "mean", 0.8), "seed": 5, "num_seed": 3},
    "context_cap": {"context_cap": 4, "max_tail": 3, "anchors": 1},
    "best_of": {"best_of": 3, "num_seed": 1},
    "local_gain": {"local_gain": True, "objective": Objective(30.0, "mean")},
    "one way": {"mirror": False, "num_seed": 0, "scheduler": "exp"},
}
DIGESTS = {
    "tree": "226f7f618cd5130ca37c95d2409231dca20551608ab57b2a4616a99488ecef0c",
    "upstream": "51125557cbd5d27a051f6b58e5becdf0459046de683083fb0d67fafab0f4701f",
    "consistent": "e786346b537c3265b94c0e79eeeec8121fc0c8145ba8c9e81aa19a34c4130680",
    "calibrated": "6bdefb6dfdec832de6697c2dfd8935f72475bd9db9a88ade6d98b1701029864c",
    "prior": "fae5c39f935abb0e0ca2a94c40b8f011b1f8ffb3cd3c7af73f233c7a978126f9",
    "context_cap": "7ac9ea9f759beb67289ffd103e65e0eab7aba1eb049695933a8c731be5647bce",
    "best_of": "1addbd49d0c37def67d9554009e8d3b20d082d7e43ae603d282a2e89d1679269",
    "local_gain": "a65e9ad48fd34f06427fa2ece547570d5520d174e8d8e5d473a8d3fd07a96f64",
    "one way": "23c17597218fc890cae574f3fc43256462c88b04576ec04ee188bf8615a74b93",
}


def partly_by_context(tokens: Sequence[int]) -> float:
    """A claim's own lean, by its last words, and as much that depends on every token before."""
    return 0.7 + hashed_log_odds(tokens[-14:]) / 2 + hashed_log_odds(tokens) / 2


async def stored_files(folder: Path, **settings: Any) -> tuple[bytes, bytes, bytes]:
    """log.jsonl without costs, labels.jsonl and claims.jsonl of a run on the built-in testbed."""
    consistency: ConsistencyMode = settings.pop("consistency", "gold-free")
    objective = settings.pop("objective", Objective(30.0))
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        claims[:24],
        path,
        batch_size=16,
        consistency=consistency,
        objective=objective,
        settings=SearchSettings(**{"seed": 1, "num_seed": 4, "patience": 12, "K": 90} | settings),
    )
    async with FakeVLLM(log_odds=partly_by_context) as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            labelling = (await Labelling.open(pool, api)).planned_for(4_000)
            with RunFolder(folder) as run:
                state = await labelling.search(run, lambda state, record: None, 0)
                records = run.read_log()
                predictions = {"many-shot": await labelling.label_rest(state)}
                if None in state.labels:
                    predictions["predicted"] = await labelling.predict_unlabelled(state)
                rows = labelling.label_rows(state, predictions, await labelling.zero_shot())
    kept = [{key: value for key, value in record.items() if key not in COST} for record in records]
    replayed = replay(labelling.pool.problem, kept)
    assert replayed is not None
    assert (replayed.labels, replayed.evaluation) == (state.labels, state.evaluation)
    return _lines(kept), _lines(rows), _lines(pool_rows(pool.claims, pool.problem.consistency))


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


@pytest.mark.parametrize("name", RUNS)
async def test_a_run_of_two_labels_is_what_it_was(name: str, tmp_path: Path) -> None:
    files = await stored_files(tmp_path / "run", **RUNS[name])
    digest = hashlib.sha256(b"\n".join(files)).hexdigest()
    if os.environ.get("UPDATE_STORED"):
        print(f'    "{name}": "{digest}",')
        events = [record["event"] for record in map(orjson.loads, files[0].splitlines())]
        print({event: events.count(event) for event in set(events)})
    else:
        assert digest == DIGESTS[name]


async def test_a_stored_run_is_made_again_to_the_byte(tmp_path: Path) -> None:
    names = ("log.jsonl", "labels.jsonl", "claims.jsonl")
    for name, content in zip(names, await stored_files(tmp_path / "run", **RUNS["consistent"]), strict=True):
        if os.environ.get("UPDATE_STORED"):
            STORED.mkdir(exist_ok=True)
            (STORED / name).write_bytes(content)
        assert content == (STORED / name).read_bytes()
