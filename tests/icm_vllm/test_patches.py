"""The list of what is replaced in vLLM is what the code replaces; the package needs nothing else of this project."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from icm_vllm import patches
from icm_vllm.patches import PATCHES, TRIED, Found, Patch

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "icm_vllm"
READ_ONLY = {
    # Modules that are only looked at or called.
    "vllm.platforms",
    "vllm.tokenizers.registry",
    "vllm.sampling_params",
    "vllm.v1.request",
    "vllm.lora.request",
    "vllm.v1.engine",
    "vllm.v1.metrics.stats",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm._custom_ops",
    "vllm.v1.engine.core",
    "vllm.config",
    "vllm.model_executor.layers.fused_moe.config",
    "vllm.model_executor.layers.fused_moe.experts.triton_moe",
    "vllm.model_executor.layers.quantization.awq_triton",
}


def modules_of_vllm(path: Path) -> set[str]:
    """Every module of vLLM that a file names, in an import or as a text."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            named.add(node.module or "")
    return {name for name in named if name.startswith("vllm.") and name != "vllm." and " " not in name}


def test_every_module_of_vllm_that_a_file_names_is_listed_or_only_read() -> None:
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name in ("patches.py", "plugin.py"):
            continue
        listed = {module for patch in PATCHES if patch.by == path.stem for module in patch.modules}
        assert modules_of_vllm(path) - READ_ONLY <= listed | {"vllm.general_plugins"}, path.name


def test_every_patch_names_a_file_of_this_package_that_names_its_module() -> None:
    for patch in PATCHES:
        text = (PACKAGE / f"{patch.by}.py").read_text(encoding="utf-8")
        for target in patch.targets:
            name = target.partition(":")[2].rpartition(".")[2]
            assert name in text, (patch.by, target)


def test_no_other_package_of_this_project_is_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in ("core", "src")], path


def test_its_own_wheel_holds_it_and_nothing_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as tar:  # a copy: a build leaves folders behind
        tar.add(PACKAGE, "icm_vllm", filter=lambda member: None if "__pycache__" in member.name else member)
    with tarfile.open(tmp_path / "source.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"),
            *("-w", str(tmp_path), str(tmp_path / "icm_vllm")),
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )
    [wheel] = tmp_path.glob("icm_vllm-*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        [entry_points] = [name for name in names if name.endswith("entry_points.txt")]
        assert "icm = icm_vllm.plugin:register" in content.read(entry_points).decode()
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(REPOSITORY)) for path in PACKAGE.rglob("*.py")}


def test_a_missing_name_is_refused_only_where_it_is_required_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    there, gone = "json:dumps", "json:no_such.name"
    listed = (
        Patch((gone, there), "a", "why"),
        Patch((gone,), "b", "why"),
        Patch((gone,), "c", "why", "cpu", required=True),
        Patch((gone,), "d", "why", "gpu", required=True),
        Patch((gone,), "e", "why", "any", required=True),
    )
    monkeypatch.setattr(patches, "PATCHES", listed)
    found = patches.look("cpu")
    assert {row.by: row.state for row in found} == {
        "a": "has",
        "b": "lacks",
        "c": "refused",
        "d": "lacks",
        "e": "refused",
    }
    assert found[1] == Found("b", gone, "any", "lacks", "module 'json' has no attribute 'no_such'")
    assert found[0].reason == ""


def test_a_file_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patches, "look", lambda here: [])
    monkeypatch.setattr(patches, "_installed", lambda name: True)
    monkeypatch.setattr(patches.metadata, "version", lambda name: "0.32.0")
    platform = SimpleNamespace(is_cpu=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    assert patches.main(["--json", str(tmp_path / "none" / "x")]) == 2
    assert capsys.readouterr().err == f"cannot write {tmp_path / 'none' / 'x'}: No such file or directory\n"


@pytest.mark.real_server
def test_this_vllm_has_what_is_replaced_on_a_cpu(tmp_path: Path) -> None:
    written = tmp_path / "patches.json"
    done = subprocess.run(
        [sys.executable, "-m", "icm_vllm.patches", "--json", str(written)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(f"vLLM {version} on a cpu" in line for version in TRIED for line in lines), lines
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert len(rows) == len(PATCHES)
    assert all(state == "has" for state, device, *_ in rows if device != "gpu"), lines
    document = json.loads(written.read_text())
    assert document["vllm"] in TRIED
    assert document["device"] == "cpu"
    assert [row["target"] for row in document["patches"]] == [patch.targets[0] for patch in PATCHES]
