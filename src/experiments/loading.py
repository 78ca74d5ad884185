"""The claims of a request, and the pools that are drawn from them. No model is asked."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.experiments.request import DataRequest, RunRequest
from src.icm.testbeds import BadInput, Claim, Testbed
from src.pipeline.continuing import Continued, read_continued
from src.pipeline.datafiles import load_data_file, load_testbed, load_testbed_file
from src.pipeline.known import KnownLabels, known_labels, merged
from src.pipeline.labelling import Pool, prepare_batches
from src.pipeline.testbed_files import read_testbed, testbed_path
from src.results.run_folder import RunFolder

log = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 3

Loaded = tuple[Testbed, list[Claim], Path, list[str]]
"""A testbed, its claims, their file, and why each row was left out."""


def load(request: DataRequest) -> Loaded:
    """The claims of --data or --testbed. Without --skip_bad_rows raises BadInput for the first row to leave out."""
    bad: list[str] = []
    reading = request.reading()
    if (file := testbed_path(request.testbed)) is not None:
        testbed, claims, path = load_testbed_file(read_testbed(file), file, request.data_dir, request.data, bad.append)
    elif request.data is not None:
        testbed, claims, path = load_data_file(request.data, reading, bad.append)
    else:
        testbed, claims, path = load_testbed(request.testbed, request.data_dir, bad.append)
    check_bad_rows(request, path, bad)
    return testbed, claims, path, bad


def check_bad_rows(request: DataRequest, path: Path, bad: Sequence[str]) -> None:
    """Raises BadInput for rows that cannot be used (bad: why, for each); with --skip_bad_rows it warns."""
    if not bad:
        return
    if not request.skip_bad_rows:
        others = f" ({len(bad)} rows cannot be used)" if len(bad) > 1 else ""
        raise BadInput(f"{bad[0]}{others}. Correct it, or leave such rows out with --skip_bad_rows")
    shown = "; ".join(complaint.removeprefix(f"{path}:") for complaint in bad[:SHOWN_BAD_ROWS])
    more = "; ..." if len(bad) > SHOWN_BAD_ROWS else ""
    count = f"{len(bad)} rows are" if len(bad) > 1 else "1 row is"
    warn_once(f"{path}: {count} left out (--skip_bad_rows): line {shown}{more}")


def pool_of(request: RunRequest, held_out: Collection[int] = (), loaded: Loaded | None = None) -> Pool:
    """The pool and its constraints, from flags and files alone. held_out: rows that must not be in it. loaded: the
    claims, where they were loaded before."""
    [pool] = pools_of(request, 1, held_out, loaded)
    return pool if request.label_rest else replace(pool, rest=(), left_out=len(pool.rest))


def pools_of(
    request: RunRequest, count: int | None, held_out: Collection[int] = (), loaded: Loaded | None = None
) -> list[Pool]:
    """As pool_of, for `count` pools that share no claim; None: as many as hold all claims."""
    search = request.search
    if search.initial_T <= 0 or search.final_T <= 0 or search.decay <= 0:
        raise BadInput("--initial_T, --final_T and --decay must be above 0")
    testbed, claims, path, bad = loaded or load(request.data)
    reading = testbed.reading if testbed.digest else request.data.reading()
    known = known_labels(request.data.known, testbed, claims, path, reading)
    if known is not None and request.data.gold_seeds:
        raise BadInput(
            f"--gold_seeds {request.data.gold_seeds} and known labels ({' and '.join(known.sources)}) contradict each "
            "other: gold labels take the place of labels that are given"
        )
    claims = [claim for claim in claims if claim.row not in held_out]
    name = request.continue_from
    continued = None if name is None else read_continued(name, request.output.runs_dir, testbed, claims, path)
    if continued is not None and request.continue_as_before:
        continued = replace(continued, as_before=True)
    if continued is not None and continued.known:
        kept = {claims[at].row: label for at in continued.known if (label := continued.labels[at]) is not None}
        known = merged(KnownLabels(kept, (f"the known ones of {continued.run}",)), known)
    outside = None
    if continued is not None and not request.continue_without_outside:
        outside = _known_outside(continued, claims, known)
    if request.seeds_by_default and (known is not None or request.data.gold_seeds):
        search = replace(search, num_seed=0)
    pools = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=request.data.batch_size,
        count=count,
        consistency=request.data.consistency,
        objective=request.objective,
        settings=search,
        continued=continued,
        known=known,
        known_outside=outside,
        seeds_of_gold=request.data.gold_seeds,
    )
    if (complaint := prior_complaint(request, pools)) is not None:
        warn_once(complaint)
    return [replace(pool, bad_rows=tuple(bad)) for pool in pools]


def prior_complaint(request: RunRequest, pools: Sequence[Pool]) -> str | None:
    """One line where no labels of the pools' claims that break no constraint have the share of True that --prior says,
    or where --prior auto estimates a share that they fix; None elsewhere. pools: of two labels.
    """
    objective = request.objective
    if objective.prior is None and not objective.estimate_prior:
        return None
    size = sum(len(pool.claims) for pool in pools)
    bounds = [pool.problem.consistency.trues(len(pool.claims)) for pool in pools]
    least, most = sum(low for low, _ in bounds) / size, sum(high for _, high in bounds) / size
    half = 0.5 / size  # of one claim: a share that is rounded to claims is meant so
    if objective.prior is None:
        if least < most:
            return None
        flag = "--prior auto"
    else:
        if least - half <= objective.prior <= most + half:
            return None
        flag = f"--prior {objective.prior:g}"
    share = f"at {least:.2f}" if least == most else f"between {least:.2f} and {most:.2f}"
    return (
        f"{flag}: what must hold in each group keeps the share of True among the pool's claims {share}, whatever "
        "--prior says; --consistency none lets the labels have another share"
    )


def _known_outside(continued: Continued, claims: Sequence[Claim], known: KnownLabels | None) -> KnownLabels | None:
    """The known labels of claims outside the other run's pool that nothing here names anew; None: there are none."""
    named = {} if known is None else known.labels
    kept = {claims[at].row: label for at, label in continued.known_outside.items() if claims[at].row not in named}
    return KnownLabels(kept, (f"the known ones of {continued.run}",)) if kept else None


@functools.cache
def warn_once(text: str) -> None:
    """Warn only once, even if many batches of a data set are labelled."""
    log.warning("%s", text)


def bad_rows_record(pool: Pool) -> dict[str, Any]:
    """For run.json: the rows that were left out; {} where there are none."""
    bad = pool.bad_rows
    return {"bad_rows": {"count": len(bad), "first": list(bad[:SHOWN_BAD_ROWS])}} if bad else {}


def warn_of_leaks(request: RunRequest, pool: Pool) -> None:
    """Warn where the constraints are made from gold labels."""
    if request.data.consistency == "upstream" and pool.testbed.upstream_leaks:
        print(
            "warning: --consistency upstream makes its keys from gold labels: accuracy is not unsupervised",
            file=sys.stderr,
        )


def print_continuing(request: RunRequest, pool: Pool, folder: RunFolder | None) -> None:
    """Print which labels the search starts with, and which of the other run's it cannot take over. folder: of the run,
    None where nothing is written."""
    if pool.continued is not None:
        file = request.data.name_of(pool.testbed)
        outside = len(pool.rest) + pool.left_out
        for line in pool.continued.notes(
            file=file,
            model=request.model.model,
            pool=len(pool.claims),
            outside=0 if request.label_rest else outside,
            batch_size=request.data.batch_size,
            listed="" if folder is None else str(folder.gone_path),
        ):
            print(line, file=sys.stderr)
