from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigurationError
from core.settings import _BARE_NAMES, REPO_ROOT, Settings, read_secrets

KEY = "sk-planted-0123456789"


@pytest.fixture
def load(tmp_path: Path):
    def load(secrets: str = "", yaml: str = "", env: dict[str, str] | None = None, **overrides: object) -> Settings:
        (tmp_path / "SECRETS").write_text(secrets)
        (tmp_path / "client.yaml").write_text(yaml)
        return Settings.load(
            overrides, secrets_path=tmp_path / "SECRETS", config_path=tmp_path / "client.yaml", environ=env or {}
        )

    return load


def test_defaults(load) -> None:
    settings = load()
    assert settings.vllm_base_url == ("http://localhost:8000",)
    assert not settings.vllm_configured
    assert (settings.connect_timeout, settings.read_timeout, settings.max_attempts) == (10, 900, 6)
    assert (settings.retry_deadline, settings.max_concurrent_requests) == (1800, 64)
    assert (settings.prompts_per_request, settings.cache_path, settings.missing_label) == (None, None, "error")


def test_precedence(load) -> None:
    sources = {
        "yaml": "read_timeout: 1\nmax_attempts: 1\nconnect_timeout: 1\nretry_deadline: 1\n",
        "secrets": "ICM_READ_TIMEOUT=2\nICM_MAX_ATTEMPTS=2\nICM_CONNECT_TIMEOUT=2\n",
        "env": {"ICM_READ_TIMEOUT": "3", "ICM_MAX_ATTEMPTS": "3"},
    }
    settings = load(**sources, read_timeout=4, max_attempts=None)
    assert (settings.read_timeout, settings.max_attempts) == (4, 3)
    assert (settings.connect_timeout, settings.retry_deadline) == (2, 1)


def test_a_bare_name_of_another_program_is_not_ours(load) -> None:
    assert load(env={"READ_TIMEOUT": "1"}).read_timeout == 900


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("https://h/base/v1/", "https://h/base"),
    ],
)
def test_vllm_url_with_or_without_v1(load, given: str, expected: str) -> None:
    settings = load(env={"VLLM_BASE_URL": given})
    assert settings.vllm_base_url == (expected,)
    assert settings.vllm_configured


@pytest.mark.parametrize(
    ("given", "expected"),
    [("https://h", "https://h/v1"), ("https://h/v1/", "https://h/v1"), ("https://h/api/x", "https://h/api/x")],
)
def test_api_root(load, given: str, expected: str) -> None:
    assert load(env={"LLAMA_API_BASE": given}).llama_api_base == expected


def test_several_servers_keep_their_order(load) -> None:
    settings = load(env={"VLLM_BASE_URL": " http://b:1/v1, http://a:1/ ,"})
    assert settings.vllm_base_url == ("http://b:1", "http://a:1")


@pytest.mark.parametrize(
    ("given", "complaint"), [("http://a:1,http://A:1/v1", "names a server twice"), (" , ", "names no server")]
)
def test_a_list_of_servers_that_cannot_be_meant_is_refused(load, given: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"vllm_base_url \(from the environment\): {complaint}"):
        load(env={"VLLM_BASE_URL": given})


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", f"http://user:{KEY}@h", f"http://h/?k={KEY}"])
def test_bad_urls_are_refused_without_showing_them(load, url: str) -> None:
    for name in ("VLLM_BASE_URL", "LLAMA_API_BASE"):
        with pytest.raises(ConfigurationError) as caught:
            load(env={name: url})
        assert KEY not in str(caught.value)
        assert name.lower() in str(caught.value)


def test_secrets_syntax(load) -> None:
    text = f"""\ufeff# comment
    export API_KEY='{KEY}'   # quoted
VLLM_API_KEY = "a#b"
HF_TOKEN=bare#token # comment
USE_VLLM=true
OTHER_PROGRAMS_KEY=x=y=z
MODEL_REVISION=
"""
    settings = load(text)
    assert settings.api_key.get_secret_value() == KEY
    assert settings.vllm_api_key.get_secret_value() == "a#b"
    assert settings.hf_token.get_secret_value() == "bare#token"
    assert settings.use_vllm is True
    assert settings.model_revision is None


@pytest.mark.parametrize(
    "line", [KEY, f"API KEY={KEY}", f'API_KEY="{KEY}', f"=x{KEY}", f"API_KEY='a'{KEY}", f"9A={KEY}"]
)
def test_malformed_secrets_name_the_line_not_its_content(load, tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"SECRETS, line 3: expected KEY=VALUE") as caught:
        load(f"# first\nUSE_VLLM=1\n{line}\n")
    assert KEY not in str(caught.value)
    assert KEY not in repr(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no SECRETS file"):
        Settings.load(environ={"ICM_SECRETS": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigurationError, match="no configuration file"):
        Settings.load(config_path=tmp_path / "nowhere", environ={})
    assert read_secrets(tmp_path / "nowhere") == {}


def test_secrets_from_the_environments_path(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("MODEL_REVISION=abc")
    assert Settings.load(environ={"ICM_SECRETS": str(tmp_path / "s")}).model_revision == "abc"


def test_binary_secrets(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_secrets(tmp_path / "s")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("reed_timeout: 1", "unknown setting 'reed_timeout'"),
        ("- a", "expected `setting: value`"),
        ("a: b: c", "line 1: not valid YAML"),
        (f"api_key: {KEY}", "does not belong"),
        ("prompts_per_request: 1025", "prompts_per_request"),
        ("max_attempts: 0", "max_attempts"),
        ("missing_label: zero", "missing_label"),
    ],
)
def test_bad_yaml(load, yaml: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load(yaml=yaml)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("bad", [f"{KEY} x", f"{KEY}\nHost: evil", f"{KEY}\u00e9"])
def test_keys_that_break_headers_are_refused_unseen(load, bad: str) -> None:
    with pytest.raises(ConfigurationError, match="api_key") as caught:
        load(env={"API_KEY": bad})
    assert KEY not in str(caught.value)


def test_no_value_of_a_rejected_setting_is_shown(load) -> None:
    with pytest.raises(ConfigurationError, match=r"use_vllm \(from the environment\)") as caught:
        load(env={"USE_VLLM": KEY})
    assert KEY not in str(caught.value)
    assert KEY not in repr(caught.value.__cause__) + repr(caught.value.__context__)


def test_keys_are_in_no_repr(load) -> None:
    settings = load(f"API_KEY={KEY}\nVLLM_API_KEY={KEY}\nHF_TOKEN={KEY}\n")
    assert KEY not in repr(settings) + str(settings) + settings.model_dump_json()


def test_frozen(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().read_timeout = 1


def test_the_example_files_hold_every_key_and_only_defaults() -> None:
    example = read_secrets(REPO_ROOT / "SECRETS.example", required=True)
    assert set(example) == {
        "VLLM_BASE_URL", "VLLM_API_KEY", "LLAMA_SERVER_URL", "LLAMA_API_BASE", "API_KEY", "USE_VLLM",
        "MODEL_REVISION", "HF_TOKEN", "ICM_SERVE_TOKEN",
    }  # fmt: skip
    config = (REPO_ROOT / "configs" / "client.yaml").read_text()
    for name in set(Settings.model_fields) - {"vllm_api_key", "api_key", "hf_token"}:
        assert f"\n{name}: " in config
    loaded = Settings.load(config_path=REPO_ROOT / "configs" / "client.yaml", environ={})
    assert loaded.model_dump(exclude={"vllm_base_url"}) | {} == Settings().model_dump(exclude={"vllm_base_url"})


def test_every_setting_is_in_the_page_of_environment_variables() -> None:
    page = (REPO_ROOT / "docs" / "environment.md").read_text()
    names = [name.upper() if name in _BARE_NAMES else f"ICM_{name.upper()}" for name in Settings.model_fields]
    assert [name for name in (*names, "ICM_SECRETS", "ICM_SERVE_TOKEN") if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["CONNECT_TIMEOUT", "RETRY_BASE"])
def test_a_time_that_must_end_is_finite(load, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name.lower()} .from the environment.: .*finite"):
        load(env={f"ICM_{name}": "inf"})
