"""contrib/deploy/: the image of `icm serve` and its Kubernetes manifests, without Docker and without a cluster."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from contrib.serving.command import build_parser
from contrib.serving.guard import OPEN, ROUTES
from contrib.serving.options import TOKEN_NAME, Limits
from contrib.serving.web_server import MARGIN

REPO_ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = REPO_ROOT / "contrib/deploy" / "kubernetes"
BUILT_IN = ("deployment.yaml", "service.yaml", "poddisruptionbudget.yaml")
VERSIONS = sorted({v for v in kubernetes_validate.utils.all_versions() if tuple(map(int, v.split("."))) >= (1, 30)})
LABELS = {"app.kubernetes.io/name": "icm-serve"}


def read(name: str) -> Any:
    return yaml.safe_load((MANIFESTS / name).read_text())


@pytest.fixture
def deployment() -> Any:
    return read("deployment.yaml")


@pytest.fixture
def pod(deployment: Any) -> Any:
    return deployment["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    [container] = pod["containers"]
    return container


# ---- the validator


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_manifests_are_valid(name: str, version: str) -> None:
    kubernetes_validate.validate(read(name), version, strict=True)


def test_the_validator_can_fail(deployment: Any) -> None:
    for damage in (
        lambda spec: spec.update(replicas="three"),
        lambda spec: spec["template"]["spec"]["containers"][0].update(redinessProbe={}),
        lambda spec: spec.pop("selector"),
    ):
        broken = copy.deepcopy(deployment)
        damage(broken["spec"])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_kustomization_names_every_manifest() -> None:
    assert {*read("kustomization.yaml")["resources"], "kustomization.yaml"} == {p.name for p in MANIFESTS.iterdir()}


# ---- what belongs together


def test_three_replicas_with_one_gpu_each(deployment: Any, container: Any) -> None:
    assert deployment["spec"]["replicas"] == 3
    resources = container["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    assert {"cpu", "memory"} <= set(resources["requests"])


def test_a_budget_and_an_update_leave_two_replicas(deployment: Any) -> None:
    budget = read("poddisruptionbudget.yaml")["spec"]
    update = deployment["spec"]["strategy"]["rollingUpdate"]
    assert budget["minAvailable"] == deployment["spec"]["replicas"] - update["maxUnavailable"] == 2
    assert update["maxSurge"] == 0, "there may be no fourth GPU"


def test_the_selectors_find_the_pods(deployment: Any) -> None:
    assert deployment["spec"]["template"]["metadata"]["labels"] == LABELS
    assert deployment["spec"]["selector"]["matchLabels"] == LABELS
    service, monitor = read("service.yaml"), read("servicemonitor.yaml")
    assert service["spec"]["selector"] == LABELS
    assert service["metadata"]["labels"] == monitor["spec"]["selector"]["matchLabels"] == LABELS
    assert read("poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == LABELS


def test_the_ports_are_one(container: Any) -> None:
    [port] = container["ports"]
    [service_port] = read("service.yaml")["spec"]["ports"]
    [endpoint] = read("servicemonitor.yaml")["spec"]["endpoints"]
    assert service_port["targetPort"] == port["name"]
    assert endpoint["port"] == service_port["name"]
    dockerfile = (REPO_ROOT / "contrib/deploy" / "Dockerfile").read_text()
    assert f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert f'"--port", "{port["containerPort"]}"' in dockerfile
    assert f"127.0.0.1:{port['containerPort']}/health" in dockerfile


def test_the_monitor_asks_the_route_that_there_is_with_the_token() -> None:
    """The validator does not know this kind, which the Prometheus operator defines."""
    monitor = read("servicemonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "ServiceMonitor")
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["path"] in ROUTES
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": {"name": "icm", "key": "serve-token"}}


def test_the_probes_ask_what_needs_no_token(container: Any) -> None:
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(probes.values()) <= set(OPEN)
    assert container["readinessProbe"]["timeoutSeconds"] > Limits().canary_seconds


def test_secrets_are_referenced_and_never_written(container: Any) -> None:
    found = {variable["name"]: variable for variable in container["env"]}
    for name in (TOKEN_NAME, "HF_TOKEN"):
        assert "value" not in found[name]
        assert found[name]["valueFrom"]["secretKeyRef"]["name"] == "icm"
    assert not any("Secret" in (path.read_text().split("kind: ")[1].split()[0]) for path in MANIFESTS.iterdir())


def test_the_pod_may_do_nothing_that_it_need_not(pod: Any, container: Any) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {pod['securityContext']['runAsUser']} " in (REPO_ROOT / "contrib/deploy" / "Dockerfile").read_text()
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "a Service named vllm would set VLLM_PORT"


def test_the_pod_waits_for_the_applications_shutdown(pod: Any, container: Any) -> None:
    [_, pause] = container["lifecycle"]["preStop"]["exec"]["command"]
    options = build_parser().parse_args(container["args"])
    vllm = 10
    assert pod["terminationGracePeriodSeconds"] > int(pause) + options.shutdown_seconds + MARGIN + vllm


def test_the_arguments_are_the_commands(container: Any) -> None:
    options = build_parser().parse_args(container["args"])
    assert options.start == "8B"
    assert options.vllm_options[:2] == ["--revision", "$(MODEL_REVISION)"]
    [revision] = [variable["value"] for variable in container["env"] if variable["name"] == "MODEL_REVISION"]
    assert len(revision) == 40, "a commit, not a branch"


def test_the_image_has_the_projects_version(container: Any) -> None:
    version = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"icm-serve:{version}"
    [image] = read("kustomization.yaml")["images"]
    assert (image["name"], image["newTag"]) == ("icm-serve", version)


# ---- the image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile copies, where it copies it to."""
    root = tmp_path_factory.mktemp("image")
    for line in (REPO_ROOT / "contrib/deploy" / "Dockerfile").read_text().splitlines():
        if not line.startswith("COPY "):
            continue
        *sources, target = line.split()[1:]
        for source in sources:
            to = root / target.removeprefix("/")
            if (REPO_ROOT / source).is_dir():
                shutil.copytree(REPO_ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to = to / source if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO_ROOT / source, to)
    return root / "opt" / "icm"


def run(image: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(image), "ICM_SECRETS": os.devnull},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_application_runs_from_what_is_copied(image: Path, tmp_path: Path) -> None:
    done = run(image, "-m", "contrib.serving.command", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import core.vllm_server as s, contrib.serving.options as o; print(s.LAUNCHER, o.DEFAULT_DOCUMENTS)\n"
        "assert s.LAUNCHER.exists() and o.DEFAULT_DOCUMENTS.is_dir()"
    )
    done = run(image, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(image)) for path in done.stdout.split())


def test_the_launcher_finds_its_settings_in_the_image(image: Path) -> None:
    assert (image / "configs" / "vllm_config.yaml").is_file()
    assert os.access(image / "scripts" / "launch_vllm_server.sh", os.X_OK)


def test_nothing_is_imported_that_the_image_does_not_bring(image: Path, tmp_path: Path) -> None:
    """It installs three packages of base.lock; the others that vLLM does not bring must not be needed."""
    dockerfile = (REPO_ROOT / "contrib/deploy" / "Dockerfile").read_text()
    added = {"bm25s", "orjson", "tenacity"}
    assert f"'/^({'|'.join(sorted(added))})==/," in dockerfile
    base, local = (
        {line.split("==")[0] for line in (REPO_ROOT / "requirements" / name).read_text().splitlines() if "==" in line}
        for name in ("base.lock", "local.lock")
    )
    assert added <= base
    modules = {"python-dateutil": "dateutil", "graphql-core": "graphql", "importlib-resources": "importlib_resources"}
    missing = sorted(modules.get(name, name.replace("-", "_")) for name in base - local - added)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import contrib.serving.app, contrib.serving.command, contrib.serving.web_server\n"
    )
    done = run(image, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
