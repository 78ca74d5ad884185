"""ICM as a library: claims in, labels with probabilities out.

    import icm

    result = icm.label(claims, model="MODEL", base_url="http://localhost:8000", calibrate="mean", alpha=50)
    result.labels, result.probabilities, result.to_pandas(), result.plot()

`label` is the command `icm label`: the same settings under the same names, the same run folders and response cache, so
that the same call again asks nothing twice. docs/library.md has the reference.
"""

from core.errors import APIError, ConfigurationError, ServerUnreachable
from icm.labelling import alabel, label
from icm.landscape import LandscapeResult, alandscape, landscape
from icm.result import Result, load
from src.icm.values import BadInput

__all__ = [
    "APIError",
    "BadInput",
    "ConfigurationError",
    "LandscapeResult",
    "Result",
    "ServerUnreachable",
    "alabel",
    "alandscape",
    "label",
    "landscape",
    "load",
]
