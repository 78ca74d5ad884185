"""What a run cost: tokens, requests, seconds, and money where prices are known."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from src.results.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class Usage:
    """A run's consumption; None where the engine did not say.

    prompt_tokens: sent, cached ones included; search_tokens: those of the search, as the engine counted them or else as
    they were sent. output_tokens: one for each prompt that reached the engine. seconds: of
    the search; of several parts the sum, which is more than the time that passed where they overlap. complete: False
    where the run was resumed, or is not finished, and requests of earlier processes are not counted.
    """

    prompt_tokens: float
    cached_tokens: float | None
    computed_tokens: float | None
    output_tokens: float
    requests: float | None
    asked: float
    from_cache: float
    seconds: float
    complete: bool
    search_tokens: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that a prefix cache held."""
        if self.cached_tokens is None or self.computed_tokens is None:
            return None
        sent = self.cached_tokens + self.computed_tokens
        return self.cached_tokens / sent if sent else None


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one model, as the user wrote it down on `date`. Units are in the fields' names."""

    currency: str
    date: date
    source: str
    input_per_million_tokens: float = 0.0
    cached_input_per_million_tokens: float | None = None
    output_per_million_tokens: float = 0.0
    per_thousand_requests: float = 0.0
    per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Charge:
    """One line of a bill."""

    what: str
    quantity: float
    unit: str
    amount: float


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run cost in money. complete: see Usage."""

    price: Price
    charges: list[Charge]
    complete: bool

    @property
    def total(self) -> float:
        return sum(charge.amount for charge in self.charges)


def usage_of(run: RunRecord) -> Usage:
    """From the search's counts, or the last process's where they are larger (it also asked the baselines)."""
    cost, api = run.cost, run.model_api
    sent, api_sent = cost.get("tokens_sent", 0), api.get("prompt_tokens", 0)
    prompts = cost.get("asked", 0) - cost.get("from_cache", 0)
    cached, computed = cost.get("tokens_cached"), cost.get("tokens_computed")
    if cached == computed == 0 and sent:  # the engine did not say: a sum over no values
        cached = computed = None
    return Usage(
        prompt_tokens=max(sent, api_sent),
        search_tokens=sent if cached is None or computed is None else cached + computed,
        cached_tokens=cached,
        computed_tokens=computed,
        output_tokens=max(prompts, api.get("engine_prompts", 0)),
        requests=api.get("requests"),
        asked=cost.get("asked", 0),
        from_cache=cost.get("from_cache", 0),
        seconds=cost.get("seconds", 0.0),
        complete=bool(api) and api_sent >= sent,
    )


def charges(usage: Usage, price: Price) -> list[Charge]:
    """The bill, line by line; lines without a price are left out."""
    cached = usage.cached_tokens or 0.0
    if price.cached_input_per_million_tokens is None:
        cached = 0.0
    cached = min(cached, usage.prompt_tokens)
    lines = [
        ("prompt tokens", usage.prompt_tokens - cached, "1M tokens", 1e6, price.input_per_million_tokens),
        ("cached prompt tokens", cached, "1M tokens", 1e6, price.cached_input_per_million_tokens or 0.0),
        ("output tokens", usage.output_tokens, "1M tokens", 1e6, price.output_per_million_tokens),
        ("requests", usage.requests or 0.0, "1000 requests", 1e3, price.per_thousand_requests),
        ("server time", usage.seconds / 3600, "hour", 1.0, price.per_hour),
    ]
    return [
        Charge(what, quantity, unit, quantity / scale * rate)
        for what, quantity, unit, scale, rate in lines
        if rate and quantity
    ]
