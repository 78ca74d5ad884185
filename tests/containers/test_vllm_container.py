"""The container of the vLLM server, as far as it can be checked without a Docker engine: linters, the compose file as
Docker reads it, the make targets with a stand-in for `docker`, and the entry point run outside of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from core.errors import ConfigurationError
from core.llm_api.engines.direct import DirectEngine
from scripts.vllm_command import vllm_installed

REPO_ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(path.relative_to(REPO_ROOT).as_posix() for path in REPO_ROOT.glob("*/Dockerfile"))
ENTRYPOINT = REPO_ROOT / "vllm" / "entrypoint.sh"
COMPOSE = REPO_ROOT / "vllm" / "docker-compose.yml"
TOOLS = Path(sys.executable).parent
TOKEN = "hf_planted0123456789"


def run(*command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "HF_", "MAX_MODEL"))}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=100, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing(dockerfile: str) -> None:
    assert run(TOOLS / "hadolint", dockerfile).stdout == ""


@pytest.mark.parametrize("script", ["vllm/entrypoint.sh", "scripts/launch_vllm_server.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    assert run(TOOLS / "shellcheck", script).stdout == ""


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_exists_and_is_let_through(dockerfile: str) -> None:
    allowed = (REPO_ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert not any("SECRETS" in line for line in allowed if not line.startswith("#"))
    sources = [
        source
        for line in (REPO_ROOT / dockerfile).read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in [word for word in line.split()[1:-1] if not word.startswith("--")]
    ]
    assert sources
    for source in sources:
        assert (REPO_ROOT / source).exists(), source
        assert f"!{source}" in allowed, source


def test_the_image_is_the_pinned_version_of_the_gpu_extra() -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    [pinned] = project["optional-dependencies"]["gpu"]
    version = pinned.removeprefix("vllm==")
    for dockerfile in DOCKERFILES:
        [base] = re.findall(r"^FROM (\S+)", (REPO_ROOT / dockerfile).read_text(), re.MULTILINE)
        assert base == f"vllm/vllm-openai:v{version}", dockerfile
    assert f"icm-vllm:{version}" in (REPO_ROOT / "Makefile").read_text()
    assert f"icm-vllm:{version}" in COMPOSE.read_text()


def test_the_extension_needs_nothing_that_vllm_does_not_bring() -> None:
    """The image installs this package without its requirements."""
    ours = ["orjson", "tenacity", "matplotlib", "bm25s"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ours}))\n"
        "from icm_vllm import block_hashes, block_lookup, label_logprobs, plugin, uncached_tokens\n"
        "plugin.register()"
    )
    run(sys.executable, "-c", code, PYTHONPATH=str(REPO_ROOT))


# ---- compose, as Docker's own program reads it


def compose(**environment: str) -> dict:
    done = run(TOOLS / "docker-compose", "-f", COMPOSE, "config", "--format", "json", **environment)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_compose_has_the_defaults_that_make_has() -> None:
    config = compose()
    service = config["services"]["vllm"]
    assert service["environment"] == {"HF_TOKEN": None, "MAX_MODEL_LEN": "", "VLLM_API_KEY": None, "VLLM_MODEL": "8B"}
    [port] = service["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8000", 8000)
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    [volume] = service["volumes"]
    assert volume["target"] == "/home/icm/.cache/huggingface"
    assert (REPO_ROOT / service["build"]["dockerfile"]).samefile(REPO_ROOT / "vllm" / "Dockerfile")


def test_compose_takes_the_settings() -> None:
    service = compose(VLLM_MODEL="org/m", VLLM_PORT="9", MAX_MODEL_LEN="7", HF_TOKEN=TOKEN)["services"]["vllm"]
    assert service["environment"]["VLLM_MODEL"] == "org/m"
    assert service["environment"]["MAX_MODEL_LEN"] == "7"
    assert service["environment"]["HF_TOKEN"] == TOKEN
    assert service["ports"][0]["published"] == "9"
    assert "VLLM_PORT" not in service["environment"], "it means another port to vLLM"


# ---- make


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    """Environment in which `docker` writes down how it was called."""
    stub = tmp_path / "docker"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$CALLS"; env > "$CALLS.env"\n')
    stub.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "HF_TOKEN": TOKEN}


VOLUME = "-v icm-hf-cache:/home/icm/.cache/huggingface"
KEYS = "-e VLLM_MODEL -e MAX_MODEL_LEN -e HF_TOKEN -e VLLM_API_KEY"
RUN = f"run --name icm-vllm --init --ipc=host --gpus all -p 127.0.0.1:9001:8000 {VOLUME} {KEYS}"
COMPOSED = "compose -f vllm/docker-compose.yml"
IMAGE = "icm-vllm:0.33.0"
TARGETS = {
    "vllm-build": f"build -f vllm/Dockerfile -t {IMAGE} .",
    "vllm-run": f"{RUN} --rm {IMAGE} --seed 1",
    "vllm-run-detached": f"{RUN} --detach --restart unless-stopped {IMAGE} --seed 1",
    "vllm-compose-up": f"{COMPOSED} up --build",
    "vllm-compose-up-detached": f"{COMPOSED} up --build --detach",
    "vllm-compose-down": f"{COMPOSED} down",
    "vllm-compose-logs": f"{COMPOSED} logs --follow",
    "vllm-stop": "stop -t 30 icm-vllm\nrm --force icm-vllm",
    "vllm-logs": "logs --follow icm-vllm",
    "vllm-shell": "exec --interactive --tty icm-vllm bash",
    "vllm-info": "ps --all --filter name=^icm-vllm$ --format state {{.Status}}",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_calls_docker_and_shows_no_key(docker: dict[str, str], target: str) -> None:
    settings = ("VLLM_MODEL=org/m", "VLLM_PORT=9001", "MAX_MODEL_LEN=4096", "ARGS=--seed 1")
    done = run("make", "--no-print-directory", target, *settings, **docker)
    calls = Path(docker["CALLS"]).read_text()
    assert calls.strip() == TARGETS[target]
    assert TOKEN not in calls + done.stdout + done.stderr
    seen = dict(line.split("=", 1) for line in Path(docker["CALLS"] + ".env").read_text().splitlines() if "=" in line)
    assert seen["HF_TOKEN"] == TOKEN, "passed on by name"
    if "run" in target or "compose" in target:
        assert (seen["VLLM_MODEL"], seen["MAX_MODEL_LEN"]) == ("org/m", "4096")
    if "compose" in target:
        assert seen["VLLM_PORT"] == "9001"


def test_vllm_test_checks_the_server_at_the_port() -> None:
    """Shown, not run: it takes a server."""
    shown = run("make", "--dry-run", "vllm-test", "VLLM_PORT=9001", "ARGS=--quick").stdout
    assert "scripts/test_determinism.py --url http://127.0.0.1:9001 --quick" in shown


def test_other_targets_do_not_get_the_settings(tmp_path: Path) -> None:
    """vLLM on the CPU, started by `make icm`, would take VLLM_PORT for a port of its own."""
    makefile = (REPO_ROOT / "Makefile").read_text() + "\n.PHONY: shown\nshown:\n\t@env\n"
    (tmp_path / "Makefile").write_text(makefile)
    shown = run("make", "-f", tmp_path / "Makefile", "shown").stdout
    assert "VLLM_PORT" not in shown
    assert "VLLM_MODEL" not in shown


# ---- the entry point


@pytest.fixture
def fake_vllm(tmp_path: Path) -> str:
    """PYTHONPATH of a package vllm whose server says how it was started; our folder vllm/ stands before it."""
    server = tmp_path / "vllm" / "entrypoints" / "openai"
    server.mkdir(parents=True)
    for folder in (server, server.parent, server.parent.parent):
        (folder / "__init__.py").touch()
    (server / "api_server.py").write_text(
        "import json, os, sys; print(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}))"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path)


def enter(*arguments: str, fake: str, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHON": sys.executable, "PYTHONPATH": fake, "VLLM_MODEL": f"{fake}/model"}
    return run(ENTRYPOINT, *arguments, check=check, **{**own, **settings})


def test_the_entry_point_starts_a_server_with_our_settings(fake_vllm: str) -> None:
    done = enter("--seed", "1", fake=fake_vllm, VLLM_PORT="18431", MAX_MODEL_LEN="4096", HF_TOKEN=TOKEN)
    started = json.loads(done.stdout)
    argv = started["argv"]
    shown = shlex.join(argv)
    assert f"--model {fake_vllm}/model --host 0.0.0.0 --port 18431" in shown
    assert "--max-model-len 4096" in shown
    assert "--enable-prefix-caching" in argv
    assert argv[-2:] == ["--seed", "1"]
    assert started["env"]["VLLM_BATCH_INVARIANT"] == "1"
    assert started["env"]["HF_TOKEN"] == TOKEN
    assert TOKEN not in shown + done.stderr


def test_vllm_does_not_see_the_settings_that_it_would_misread(fake_vllm: str) -> None:
    environment = json.loads(enter(fake=fake_vllm, VLLM_PORT="18431", VLLM_API_KEY="", HF_TOKEN="").stdout)["env"]
    assert not {"VLLM_PORT", "VLLM_MODEL", "VLLM_API_KEY", "HF_TOKEN"} & set(environment)


def test_a_server_without_a_key_says_so_unless_only_this_machine_reaches_it(fake_vllm: str) -> None:
    assert "no VLLM_API_KEY" in enter(fake=fake_vllm, VLLM_PORT="18431").stderr
    assert "no VLLM_API_KEY" not in enter(fake=fake_vllm, VLLM_PORT="18431", VLLM_API_KEY="k").stderr
    assert "no VLLM_API_KEY" not in enter(fake=fake_vllm, VLLM_PORT="18431", VLLM_HOST="127.0.0.1").stderr


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"MAX_MODEL_LEN": "many"}, "expected a number of tokens"),
        ({"MAX_MODEL_LEN": "-1"}, "expected a number of tokens"),
        ({"VLLM_PORT": "tcp://10.0.0.1:8000"}, "a port is a number"),
        ({"VLLM_MODEL": "9B"}, "unknown size"),
    ],
)
def test_the_entry_point_refuses_in_one_line(fake_vllm: str, settings: dict[str, str], complaint: str) -> None:
    done = enter(fake=fake_vllm, check=False, VLLM_API_KEY="k", **settings)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


# ---- a folder called vllm/ is no vLLM


def test_the_folder_does_not_hide_the_package(fake_vllm: str) -> None:
    for order in (f"{REPO_ROOT}:{fake_vllm}", f"{fake_vllm}:{REPO_ROOT}"):
        found = run(sys.executable, "-c", "import vllm; print(vllm.__file__)", PYTHONPATH=order).stdout
        assert found.strip() == f"{fake_vllm}/vllm/__init__.py"


@pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed (make setup-local)")
def test_the_installed_vllm_is_found_from_the_root() -> None:
    code = "import importlib.util as u; print(u.find_spec('vllm').origin)"
    assert "site-packages" in run(sys.executable, "-c", code, PYTHONPATH=".").stdout


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the repository itself is on the path, so that the folder is all there is of that name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(REPO_ROOT)])
    assert importlib.util.find_spec("vllm") is not None, "found, as a package without code"


@pytest.mark.usefixtures("without_vllm")
def test_the_folder_alone_is_not_an_installed_vllm() -> None:
    assert not vllm_installed()


@pytest.mark.usefixtures("without_vllm")
async def test_the_engine_in_process_says_that_vllm_is_missing() -> None:
    engine = DirectEngine("some/model")
    try:
        with pytest.raises(ConfigurationError, match="vLLM cannot be imported"):
            await engine.start()
    finally:
        await engine.aclose()
        sys.modules.pop("vllm", None)
