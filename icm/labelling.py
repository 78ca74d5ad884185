"""`label` and `alabel`: claims in, labels with probabilities out."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from icm.event_loop import finished, resumable
from icm.result import Result, load
from icm.settings import Asked, Written, parsed, quietly
from src.experiments import ICM
from src.experiments.request import RunRequest

NOT_THE_CALLER: Final = (Path(__file__).parent, Path(asyncio.__file__).parent)


def label(
    claims: Any = None,
    *,
    model: str,
    testbed: str | Path | Mapping[str, Any] | None = None,
    template: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    base_url: str | Sequence[str] | None = None,
    runs_dir: str | Path = "runs",
    run: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Label claims by Internal Coherence Maximization. The same call again goes on, or reads the finished run.

    claims: a list of dicts with `question` and `choice` (and `label`, `consistency_id`, `consistency_relation`, where
    they are known; docs/data.md), a data frame of pandas or polars with these columns, a list of plain texts, or the
    path of a data file. Other columns are given back with the labels. Without claims a `testbed` has them.

    model: name under which the model is served; with direct=True a path or id.
    testbed: name of a built-in one, path of a testbed file, or its keys as a dict (docs/testbeds.md).
    template, labels: the keys `template` and `labels` of a testbed, by themselves.
    base_url: the vLLM server, or several; by default VLLM_BASE_URL and the other settings of docs/servers.md.
    runs_dir: where the run's folder and the cached answers are kept, by default `runs` in the current folder; the
        commands' default is `runs` in the project's folder (--runs_dir), unless it is installed as a package.
    run: the name of the run's folder; by default made from the settings.
    quiet: no progress bar.
    settings: any other flag of `icm label` under its name: alpha=50, calibrate="mean", search="ascent",
        batch_size=256, seed=2, columns={"question": "prompt"}, label_rest=False, direct=True, ... (docs/cli.md).
        Defaults are the flags', but for label_rest: claims outside the pool are labelled, too.

    Raises BadInput for what cannot be used, TypeError for a setting that does not exist, ConfigurationError or
    ServerUnreachable where no usable server answers, and another APIError where it fails later. After the last one
    and after KeyboardInterrupt ("interrupt kernel") nothing is lost: the same call goes on.
    """
    settings |= {"model": model, "runs_dir": runs_dir, "run": run, "quiet": quiet}
    return _warned(finished(_labelled(Asked(claims, testbed, template, labels, base_url), settings)))


async def alabel(
    claims: Any = None,
    *,
    model: str,
    testbed: str | Path | Mapping[str, Any] | None = None,
    template: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    base_url: str | Sequence[str] | None = None,
    runs_dir: str | Path = "runs",
    run: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """`label` in a running event loop. Cancelling it stops the run, which the same call resumes."""
    settings |= {"model": model, "runs_dir": runs_dir, "run": run, "quiet": quiet}
    return _warned(await _labelled(Asked(claims, testbed, template, labels, base_url), settings))


async def _labelled(asked: Asked, settings: Mapping[str, Any]) -> Result:
    parser = ICM.build_parser()
    with Written() as written:
        found = parsed(asked, parser, settings, written)
        with resumable():
            folder = await ICM.label(quietly(RunRequest.of(found.flags, parser.contradiction), asked))
    assert folder is not None  # neither --check nor --is_complete was asked for
    return load(folder.path, found.rows)


def _warned(result: Result) -> Result:
    """The result; what may be wrong with its labels becomes a warning at the line that called for it."""
    if result.warning:
        warnings.warn(result.warning, stacklevel=_frames_to_the_caller())
    return result


def _frames_to_the_caller() -> int:
    """How many frames above `_warned` the code stands that asked: past this file, and past asyncio's, which run a
    coroutine that nobody awaits directly."""
    count, frame = 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and Path(frame.f_code.co_filename).parent in NOT_THE_CALLER:
        count, frame = count + 1, frame.f_back
    return count
