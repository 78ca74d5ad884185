"""What it saves that the starts of an ascent are asked about a block in one batch: requests and seconds, same labels.

    python scripts/with_server.py -- python benchmarks/ascent_starts.py --model gemma-3-270m --batch_size 32
    VLLM_BASE_URL=... python benchmarks/ascent_starts.py --model NAME --testbed gsm8k --data_dir data --out result.json

Every seed's pool is labelled twice by the server of VLLM_BASE_URL: with each start swept by itself, as earlier versions
did, and with all starts of a round side by side. No answer is kept between the two, but for the server's prefix cache:
each way begins with a flushed one where the server allows that (POST /reset_prefix_cache, with VLLM_SERVER_DEV_MODE=1
in its environment), and which way is first changes from seed to seed. Where it does not, the second way of a seed finds
the first one's prompts cached, a line says so, and seconds say little. Ends with exit code 1 where the two find other
labels or ask another number of questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from core.llm_api.labels import SpelledLabels
from core.llm_api.llm import open_model_api
from core.llm_api.types import PoolScores, Prompt
from core.settings import Settings
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.searches import ascent
from src.icm.searches.seam import Record, Standing
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, Pool, prepare_batches
from src.pipeline.scoring import PoolScorer, Scores

WAYS: Final = {"each start by itself": False, "starts side by side": True}


class Counted:
    """A model, and how many batches and questions it was asked."""

    def __init__(self, api: Scores) -> None:
        self.api = api
        self.batches = self.questions = 0

    async def score(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> PoolScores:
        """See ModelAPI.score."""
        self.batches += 1
        self.questions += len(prompts)
        return await self.api.score(prompts, labels)


class Nowhere:
    """A journal that is not kept."""

    records: Sequence[Record] = ()

    async def write(self, record: Record, standing: Standing) -> None:
        """Keep nothing."""


def pool_of(args: argparse.Namespace, seed: int) -> Pool:
    """The pool of a seed."""
    testbed, claims, path = load_testbed(args.testbed, args.data_dir)
    settings = SearchSettings(search="ascent", seed=seed, ascent_starts=args.starts)
    [pool] = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=args.batch_size,
        consistency="gold-free",
        objective=Objective(args.alpha, args.calibrate),
        settings=settings,
    )
    return pool


async def measured(args: argparse.Namespace, seed: int, way: str) -> tuple[dict[str, Any], object]:
    """One search without a response cache: what it took, and its labels."""
    async with open_model_api(Settings.load({"cache_path": None}), model=args.model, use_vllm=True) as api:
        labelling = await Labelling.open(pool_of(args, seed), api)
        counted = Counted(api)
        ask = PoolScorer(counted, labelling.book, labelling.pool.problem)
        flushed = await flush()
        began = time.perf_counter()
        found = await ascent.search(labelling.pool.problem, ask, Nowhere(), together=WAYS[way])
        seconds = time.perf_counter() - began
        row = {"seed": seed, "way": way, "batches": counted.batches, "questions": counted.questions}
        return row | {"seconds": round(seconds, 3), "flushed": flushed, "U": found.evaluation.utility}, found.labels


async def flush() -> bool:
    """Whether the server has emptied its prefix cache; only servers in development mode do."""
    url = os.environ["VLLM_BASE_URL"].split(",")[0].rstrip("/") + "/reset_prefix_cache"
    async with aiohttp.ClientSession() as session, session.post(url) as answer:
        return answer.status == 200


async def main(args: argparse.Namespace) -> int:
    """Print a row a search, then medians; the exit code."""
    rows, same = [], True
    for number, seed in enumerate(args.seeds):
        found = {}
        for way in sorted(WAYS, reverse=bool(number % 2)):
            row, found[way] = await measured(args, seed, way)
            rows.append(row)
            print(
                f"seed {seed:<4} {way:<22} {row['batches']:>4} batches {row['questions']:>6} questions "
                f"{row['seconds']:>8.2f} s  U {row['U']:.4f}",
                flush=True,
            )
        same &= len(set(found.values())) == 1 and rows[-1]["questions"] == rows[-2]["questions"]
    middle = {
        way: {key: statistics.median(row[key] for row in rows if row["way"] == way) for key in ("batches", "seconds")}
        for way in WAYS
    }
    for way, figures in middle.items():
        print(f"median    {way:<22} {figures['batches']:>4.0f} batches {figures['seconds']:>25.2f} s")
    if not all(row["flushed"] for row in rows):
        print("seconds are not comparable: the prefix cache was not flushed (the server needs VLLM_SERVER_DEV_MODE=1)")
    print("the same labels and questions" if same else "NOT the same labels or questions")
    if args.out:
        told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.out.write_text(json.dumps({"arguments": told, "rows": rows, "medians": middle, "same": same}, indent=1))
    return 0 if same else 1


if __name__ == "__main__":
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name under which the model is served")
    parser.add_argument("--testbed", default="builtin")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=50.0)
    parser.add_argument("--calibrate", choices=("none", "mean"), default="mean")
    parser.add_argument("--starts", type=int, default=4, help="--ascent_starts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    sys.exit(asyncio.run(main(parser.parse_args())))
