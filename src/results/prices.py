"""Reading a price file: what models cost, when, and by which source. No price is built in."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.icm.testbeds import BadInput
from src.results.costs import Bill, Price, charges, usage_of
from src.results.run_record import RunRecord
from src.results.run_schema import first_complaint

ANY_MODEL = "*"


class ModelPrice(BaseModel):
    """Prices of one model; the units are in the names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_per_million_tokens: float = Field(0.0, ge=0, allow_inf_nan=False)
    cached_input_per_million_tokens: float | None = Field(None, ge=0, allow_inf_nan=False)
    output_per_million_tokens: float = Field(0.0, ge=0, allow_inf_nan=False)
    per_thousand_requests: float = Field(0.0, ge=0, allow_inf_nan=False)
    per_hour: float = Field(0.0, ge=0, allow_inf_nan=False)


class PriceFile(BaseModel):
    """Prices by the name under which a model is served; "*" is every other model. date: when they were looked up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str = Field(min_length=1, max_length=12)
    date: datetime.date
    source: str = ""
    models: dict[str, ModelPrice]

    def price_of(self, run: RunRecord) -> Price | None:
        """The price of a run's model, None where the file has none."""
        names = (run.model, str(run.settings.get("model")), ANY_MODEL)
        found = next((self.models[name] for name in names if name in self.models), None)
        if found is None:
            return None
        return Price(self.currency, self.date, self.source, **found.model_dump())


def read_prices(path: Path) -> PriceFile:
    """The price file at `path` (YAML). Raises BadInput naming the first thing wrong with it."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return PriceFile.model_validate(document)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        raise BadInput(f"{path}: {first_complaint(error)}") from None


def bill_of(run: RunRecord, prices: PriceFile | None) -> Bill | None:
    """The run's bill, None without a price for its model."""
    price = prices.price_of(run) if prices else None
    if price is None:
        return None
    usage = usage_of(run)
    return Bill(price, charges(usage, price), usage.complete)
