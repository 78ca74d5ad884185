"""Where the settings of the model layer come from, as one typed, frozen object.

    settings = Settings.load(overrides={"read_timeout": 60}, secrets_path=None, config_path=None)

Sources, first one wins: overrides (the command line) > environment > SECRETS file > YAML config > defaults. A setting
is named in lower case in overrides and YAML (`vllm_base_url`). In the environment and in SECRETS the eight names that
users know keep their upper-case form (`VLLM_BASE_URL`), and every other one is prefixed (`ICM_READ_TIMEOUT`), because a
bare READ_TIMEOUT could belong to any program.

No value ever reaches an error message or a repr: only its name, its source and its line number do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from core.errors import ConfigurationError
from icm_vllm.prompt_tree import MAX_PROMPTS_PER_REQUEST

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
KEPT_IN: Final = REPO_ROOT if (REPO_ROOT / "pyproject.toml").is_file() else Path()
"""Where runs/ and data/ are unless told otherwise: this folder; installed as a package, whose folder may go with the
next version, the current one."""
DEFAULT_SECRETS: Final = REPO_ROOT / "SECRETS"
DEFAULT_CONFIG: Final = REPO_ROOT / "configs" / "client.yaml"

MissingLabelPolicy = Literal["error", "floor"]

_BARE_NAMES: Final = (
    "vllm_base_url",
    "vllm_api_key",
    "llama_server_url",
    "llama_api_base",
    "api_key",
    "use_vllm",
    "model_revision",
    "hf_token",
)
_SECRET_NAMES: Final = ("vllm_api_key", "api_key", "hf_token")
_LINE: Final = re.compile(r"^(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)$")
_QUOTED: Final = re.compile(r"""^(?:"([^"]*)"|'([^']*)')\s*(?:#.*)?$""")


class Settings(BaseModel):
    """Every setting of the model layer. Times in seconds, sizes in tokens, prompts or requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    vllm_base_url: tuple[str, ...] = ("http://localhost:8000",)
    vllm_api_key: SecretStr | None = None
    llama_server_url: str | None = None
    llama_api_base: str | None = None
    api_key: SecretStr | None = None
    use_vllm: bool | None = None
    model_revision: str | None = None
    hf_token: SecretStr | None = None

    connect_timeout: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    read_timeout: float = Field(default=900.0, gt=0)
    liveness_timeout: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=6, ge=1)
    retry_base: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    retry_deadline: float = Field(default=1800.0, gt=0)
    prompts_per_request: int | None = Field(default=None, ge=1, le=MAX_PROMPTS_PER_REQUEST)
    max_concurrent_requests: int = Field(default=64, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    cache_path: Path | None = None
    missing_label: MissingLabelPolicy = "error"
    check_continuation: bool = True

    @property
    def vllm_configured(self) -> bool:
        """Whether someone named a vLLM server, as opposed to the default URL."""
        return "vllm_base_url" in self.model_fields_set

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, object] | None = None,
        *,
        secrets_path: Path | None = None,
        config_path: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read every source and validate the result.

        overrides: settings by lower-case name; None values mean "not given". secrets_path: default is $ICM_SECRETS,
        then SECRETS at the repository root. config_path: default is configs/client.yaml. The default files may be
        absent; a file that was named must exist. environ: default is os.environ. Raises ConfigurationError.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, object] = {}
        origin: dict[str, str] = {}

        def take(source: str, found: Mapping[str, object]) -> None:
            for name, value in found.items():
                if value is not None and value != "" and name not in values:
                    values[name], origin[name] = value, source

        named_secrets = secrets_path or (Path(environ["ICM_SECRETS"]) if environ.get("ICM_SECRETS") else None)
        secrets = named_secrets or DEFAULT_SECRETS
        config = config_path or DEFAULT_CONFIG
        take("the command line", {} if overrides is None else overrides)
        take("the environment", _by_setting(environ))
        take(str(secrets), _by_setting(read_secrets(secrets, required=named_secrets is not None)))
        take(str(config), _read_yaml(config, required=config_path is not None))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error, origin) from None

    @field_validator("vllm_base_url", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> tuple[str, ...]:
        return server_urls(value)

    @field_validator("llama_server_url")
    @classmethod
    def _server_root(cls, value: str | None) -> str | None:
        return None if value is None else _clean_url(value.strip()).removesuffix("/v1").rstrip("/")

    @field_validator("llama_api_base")
    @classmethod
    def _api_root(cls, value: str | None) -> str | None:
        """The URL that /completions is appended to. A bare host gets /v1; any other path is kept."""
        if value is None:
            return None
        url = _clean_url(value.strip())
        return url if urlsplit(url).path else url + "/v1"

    @field_validator("vllm_api_key", "api_key", "hf_token")
    @classmethod
    def _printable(cls, value: SecretStr | None) -> SecretStr | None:
        """A key goes into an HTTP header: blanks or control characters would break or forge one."""
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("holds blanks or characters that no HTTP header can carry")
        return SecretStr(key) if key else None

    @field_validator("cache_path")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()


def server_urls(value: object) -> tuple[str, ...]:
    """The roots of vLLM servers, from a text with commas or a list. Raises ValueError, without the URL, for what cannot
    be their addresses."""
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ValueError("must be a URL, or several with commas between them")
    urls = tuple(_clean_url(t.strip()).removesuffix("/v1").rstrip("/") for t in texts if t.strip())
    if not urls:
        raise ValueError("names no server")
    if len({url.lower() for url in urls}) != len(urls):
        raise ValueError("names a server twice")
    return urls


def read_secrets(path: Path, *, required: bool = False) -> dict[str, str]:
    """KEY=VALUE lines: `#` comments, optional quotes, an optional leading `export`. The last of equal keys wins.

    Raises ConfigurationError with file and line number, never the line: half of it may be a key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        if required:
            raise ConfigurationError(f"there is no SECRETS file at {path}.", hint="Copy SECRETS.example.") from None
        return {}
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not a text file in UTF-8.") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}.") from None
    secrets: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise _malformed(path, number)
        key, raw = match.groups()
        if raw[:1] in ("'", '"'):
            quoted = _QUOTED.match(raw)
            if quoted is None:
                raise _malformed(path, number)
            secrets[key] = quoted[1] if quoted[1] is not None else quoted[2]
        else:
            secrets[key] = re.split(r"(?:^|\s)#", raw, maxsplit=1)[0].strip()
    return secrets


def _malformed(path: Path, number: int) -> ConfigurationError:
    return ConfigurationError(f"{path}, line {number}: expected KEY=VALUE.", hint="See SECRETS.example.")


def _by_setting(source: Mapping[str, str]) -> dict[str, object]:
    """The settings among upper-case names; names of other programs are ignored."""
    names = {name: name.upper() if name in _BARE_NAMES else f"ICM_{name.upper()}" for name in Settings.model_fields}
    return {name: source[key] for name, key in names.items() if key in source}


def _read_yaml(path: Path, *, required: bool) -> dict[str, object]:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigurationError(f"there is no configuration file at {path}.") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {type(error).__name__}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{path}{where}: not valid YAML.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(f"{path}: expected `setting: value` lines.")
    for name in content:
        if name not in Settings.model_fields:
            raise ConfigurationError(f"{path}: unknown setting {name!r}.", hint="configs/client.yaml lists them all.")
        if name in _SECRET_NAMES and content[name] is not None:
            raise ConfigurationError(
                f"{path}: {name} does not belong in a configuration file.",
                hint=f"Put {name.upper()} into SECRETS or the environment.",
            )
    return content


def _clean_url(url: str) -> str:
    """The URL without trailing slashes. Raises ValueError, without the URL, for what cannot be a server's address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or password; use the setting for the key")
    if parts.query or parts.fragment:
        raise ValueError("must not hold a query or a fragment")
    return url.rstrip("/")


def _explain(error: ValidationError, origin: Mapping[str, str]) -> ConfigurationError:
    """One line for the first complaint: setting, source and rule, but not the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    rule = first["msg"].removeprefix("Value error, ")
    return ConfigurationError(f"{name} (from {origin.get(name, 'the defaults')}): {rule}.")
