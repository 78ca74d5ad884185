"""Metric families from plain numbers: what every collector here is made of.

Prometheus' client library is an extra. Importing this without it raises an error that says how to get it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from core.errors import ConfigurationError
from core.llm_api.telemetry import Histogram

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError:
    raise ConfigurationError(
        "metrics need the package prometheus-client.", hint="Install it: pip install 'icm-elicitation[metrics]'"
    ) from None


def histogram(name: str, about: str, by_labels: Iterable[tuple[Mapping[str, str], Histogram]]) -> Metric:
    """One family of histograms of seconds, one for each label set; all must name the same labels."""
    rows = list(by_labels)
    family = HistogramMetricFamily(name, about, labels=_names([labels for labels, _ in rows]))
    for labels, counted in rows:
        buckets = [("+Inf" if bound == float("inf") else repr(bound), count) for bound, count in counted.cumulative()]
        family.add_metric(list(labels.values()), buckets=buckets, sum_value=counted.total)
    return family


def counter(name: str, about: str, rows: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
    """One family of counters, one value for each label set; it is shown as NAME_total."""
    listed = list(rows)
    family = CounterMetricFamily(name, about, labels=_names([labels for labels, _ in listed]))
    for labels, value in listed:
        family.add_metric(list(labels.values()), value)
    return family


def gauge(name: str, about: str, rows: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
    """One family of gauges, one value for each label set."""
    listed = list(rows)
    family = GaugeMetricFamily(name, about, labels=_names([labels for labels, _ in listed]))
    for labels, value in listed:
        family.add_metric(list(labels.values()), value)
    return family


def _names(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return list(rows[0]) if rows else []
