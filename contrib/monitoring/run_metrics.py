"""A running ICM search for Prometheus: step time, U, acceptance, computed and cached tokens, and the client's counts.

    with published(9465, api, "my-run", pool, progress.update) as heard:
        await labelling.search(folder, heard)

Without a port nothing is served, and no package is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from core.errors import ConfigurationError
from core.llm_api.llm import ModelAPI
from core.llm_api.telemetry import Histogram
from src.icm.searches.seam import Record, Standing
from src.pipeline.labelling import Pool
from src.pipeline.search import OnRecord

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOST: Final = "127.0.0.1"


class RunMetrics:
    """A prometheus_client collector, fed the journal's records as they are written. Counts begin with this process."""

    def __init__(self, run: str, pool_size: int) -> None:
        self._labels = {"run": run}
        self._pool_size = pool_size
        self._decisions = {"accepted": 0, "rejected": 0, "unchanged": 0}
        self._tokens = {"cached": 0, "computed": 0}
        self._steps = Histogram()
        self._now: dict[str, float] = {}
        self._labelled: list[int] = []

    def update(self, state: Standing, record: Record) -> None:
        """Take in one record: it is an OnRecord."""
        for name in self._tokens:
            self._tokens[name] += record.get(f"tokens_{name}", 0)
        if record["event"] == "evaluation":
            self._decisions["accepted" if record["accepted"] else "rejected"] += 1
            self._steps.observe(record["seconds"])
            self._now["last_step_seconds"] = record["seconds"]
        if record["event"] == "step":
            self._decisions[_decision(record)] += 1
            self._steps.observe(record["seconds"])
            self._now["temperature"] = record["T"]
            self._now["last_step_seconds"] = record["seconds"]
        self._now["utility"] = state.evaluation.utility
        self._now["labelled"] = len(state.labelled)
        if state.evaluation.num_labels == 2:
            self._now["true_labels"] = sum(label is True for label in state.labels)
        else:
            self._labelled = [state.labels.count(label) for label in range(state.evaluation.num_labels)]
        self._now["iteration"] = state.iteration
        self._now["acceptance"] = state.accepted / state.iteration if state.iteration else 0.0

    def collect(self) -> Iterator[Metric]:
        """All families, as a prometheus_client registry asks for them."""
        from contrib.monitoring.exposition import counter, gauge, histogram

        yield counter(
            "icm_run_iterations",
            "Iterations, by what became of the proposal; unchanged: it has that label already.",
            [(self._labels | {"decision": name}, count) for name, count in self._decisions.items()],
        )
        yield counter(
            "icm_run_tokens",
            "Prompt tokens of the search, by whether the engine had them in its prefix cache.",
            [(self._labels | {"state": name}, count) for name, count in self._tokens.items()],
        )
        yield histogram("icm_run_step_seconds", "Seconds of an iteration.", [(self._labels, self._steps)])
        if self._labelled:
            by_label = [(self._labels | {"label": str(at)}, count) for at, count in enumerate(self._labelled)]
            yield gauge("icm_run_labels", "Claims that have a label, by its index; of more than two labels.", by_label)
        gauges = {"pool_size": float(self._pool_size), **self._now}
        for name, value in gauges.items():
            yield gauge(f"icm_run_{name}", _GAUGES[name], [(self._labels, value)])


_GAUGES = {
    "pool_size": "Claims in the pool.",
    "utility": "U of the labels as they stand.",
    "labelled": "Claims that have a label.",
    "true_labels": "Claims whose label is True.",
    "iteration": "Iterations since the run began, earlier sessions included.",
    "acceptance": "Share of the iterations that changed labels.",
    "temperature": "Of the last proposal.",
    "last_step_seconds": "Seconds of the last iteration.",
}


@contextmanager
def published(port: int | None, api: ModelAPI, run: str, pool: Pool, on_record: OnRecord) -> Iterator[OnRecord]:
    """Serve the metrics of a run and of its client at http://127.0.0.1:PORT/metrics while the block lasts.

    Yields what hears the journal's records, and tells `on_record` of them. port: None serves nothing. Raises
    ConfigurationError where the port is taken or prometheus-client is missing.
    """
    if port is None:
        yield on_record
        return
    from contrib.monitoring.client_metrics import ClientMetrics  # says what to do where the package is missing

    # isort: split
    from prometheus_client import CollectorRegistry, start_http_server

    metrics = RunMetrics(run, pool.problem.size)
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(ClientMetrics(api))
    try:
        server, thread = start_http_server(port, addr=HOST, registry=registry)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"cannot publish metrics at port {port}: {error}.", hint="Give another --metrics_port."
        ) from None

    def heard(state: Standing, record: Record) -> None:
        metrics.update(state, record)
        on_record(state, record)

    try:
        yield heard
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _decision(record: Record) -> str:
    if record["accepted"]:
        return "accepted"
    return "unchanged" if record["predicted"] == record["current"] else "rejected"
