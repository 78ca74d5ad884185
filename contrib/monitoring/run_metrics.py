"""A running ICM search for Prometheus: step time, U, acceptance, computed and cached tokens, and the client's counts.

with published(9465, api, "my-run", pool, progress.update) as on_record:
    await labelling.search(folder, on_record)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from core.errors import ConfigurationError
from core.llm_api.llm import ModelAPI
from core.llm_api.telemetry import Histogram
from src.icm.label_names import TRUE_FALSE_NAMES, Names
from src.icm.searches.seam import Record, Standing
from src.pipeline.labelling import Pool
from src.pipeline.search import OnRecord

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOST: Final = "127.0.0.1"


class RunMetrics:
    """A prometheus_client collector, fed the journal's records as they are written. Counts begin with this process.

    names: of the labels, each counted under its name; of True and False the True ones are, as icm_run_true_labels.
    """

    def __init__(self, run: str, pool_size: int, names: Names = TRUE_FALSE_NAMES) -> None:
        self._labels = {"run": run}
        self._pool_size = pool_size
        self._names = names
        self._decisions = {"accepted": 0, "rejected": 0, "unchanged": 0}
        self._tokens = {"cached": 0, "computed": 0}
        self._steps = Histogram()
        self._now: dict[str, float] = {}
        self._counts: dict[str, int] = {}

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
        if self._names == TRUE_FALSE_NAMES:
            self._now["true_labels"] = state.labels.count(True)
        else:
            self._counts = {name: state.labels.count(label) for label, name in enumerate(self._names)}
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
        if self._counts:
            by_label = [(self._labels | {"label": name}, count) for name, count in self._counts.items()]
            yield gauge("icm_run_labels", "Claims that have a label, by its name; of labels other than True and False.",
                        by_label)  # fmt: skip
        gauges = {"pool_size": float(self._pool_size), **self._now}
        for name, value in gauges.items():
            yield gauge(f"icm_run_{name}", _GAUGES[name], [(self._labels, value)])


_GAUGES = {
    "pool_size": "Claims in the pool.",
    "utility": "U of the labels as they stand.",
    "labelled": "Claims that have a label.",
    "true_labels": "Claims whose label is True.",
    "iteration": "Iterations since the run began, earlier processes included.",
    "acceptance": "Share of the iterations that changed labels.",
    "temperature": "Of the last proposal.",
    "last_step_seconds": "Seconds of the last iteration.",
}


@contextmanager
def published(port: int, api: ModelAPI, run: str, pool: Pool, on_record: OnRecord) -> Iterator[OnRecord]:
    """Serve the metrics of a run and of its client at http://127.0.0.1:PORT/metrics while the block lasts.

    Yields an OnRecord that updates the metrics and calls `on_record`. Raises ConfigurationError where the port is taken
    or prometheus-client is missing.
    """
    from contrib.monitoring.client_metrics import ClientMetrics  # says what to do where the package is missing

    # isort: split
    from prometheus_client import CollectorRegistry, start_http_server

    metrics = RunMetrics(run, pool.problem.size, pool.names)
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(ClientMetrics(api))
    try:
        server, thread = start_http_server(port, addr=HOST, registry=registry)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"cannot publish metrics at port {port}: {error}.", hint="Give another --metrics_port."
        ) from None

    def update(state: Standing, record: Record) -> None:
        metrics.update(state, record)
        on_record(state, record)

    try:
        yield update
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _decision(record: Record) -> str:
    if record["accepted"]:
        return "accepted"
    return "unchanged" if record["predicted"] == record["current"] else "rejected"
