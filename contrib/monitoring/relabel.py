"""Several servers' pages of metrics as one: the same families together, each sample with its server's labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from contrib.monitoring.exposition import gauge

# isort: split
# exposition says what to do where the package is missing.
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

if TYPE_CHECKING:
    from contrib.monitoring.vllm_scrape import Replica


def page(replicas: Sequence[Replica]) -> str:
    """All families of all replicas in Prometheus' text format, and icm_replica_up and icm_replica_scrape_seconds.

    A label of a sample that has the name of an added one is kept as exported_NAME. A page that cannot be read counts as
    that of a server which is down.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(replicas))
    return generate_latest(registry).decode()


class _Merged:
    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        up: list[float] = []
        for replica in self._replicas:
            try:
                found = [] if replica.text is None else list(text_string_to_metric_families(replica.text))
            except Exception:  # noqa: BLE001 - of a page that is none, the parser raises what its parts raise
                found = []
            up.append(float(bool(found)))
            for shown in found:
                merged = families.setdefault(shown.name, Metric(shown.name, shown.documentation, shown.type))
                merged.samples += [_labelled(sample, replica.labels) for sample in shown.samples]
        pairs = list(zip(self._replicas, up, strict=True))
        yield gauge("icm_replica_up", "Whether the server showed its metrics.", [(r.labels, v) for r, v in pairs])
        yield gauge(
            "icm_replica_scrape_seconds", "Seconds that the server took to.", [(r.labels, r.seconds) for r, _ in pairs]
        )
        yield from families.values()


def _labelled(sample: Sample, added: Mapping[str, str]) -> Sample:
    renamed = {f"exported_{name}" if name in added else name: value for name, value in sample.labels.items()}
    return sample._replace(labels={**renamed, **added})
