"""Who imports whom, as docs/architecture.md says: downwards only, and the algorithm asks nobody."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = (
    ("icm_vllm",),
    ("core",),
    ("src.icm",),
    ("src.results",),
    ("src.pipeline",),
    ("contrib",),
    ("src.experiments",),
    ("icm",),
)
"""The packages, each row below the next one."""
ROWS_OF_CORE = (
    ("core.errors", "core.cpu", "core.flags", "core.packages", "core.vllm_log"),
    ("core.settings", "core.files"),
    ("core.vllm_server", "core.llm_api.types", "core.llm_api.telemetry"),
    ("core.llm_api.labels",),
    ("core.llm_api.tokens",),
    ("core.llm_api.http", "core.llm_api.in_process", "core.llm_api.special_tokens"),
    ("core.llm_api.response_cache", "core.llm_api.text"),
    ("core.llm_api.answer_store", "core.llm_api.engines"),
    ("core.llm_api.llm",),
    ("core.llm_api.local_model", "core.determinism"),
)
"""The modules and folders of core: each imports rows below it, and nothing beside it."""
NEEDS_TEXT = {"core/llm_api/local_model.py"}
"""Modules of core outside of core.llm_api.text that import it when they are imported themselves."""
WHAT_PROMPTS_ARE_MADE_OF = {f"core.llm_api.{name}" for name in ("types", "labels", "tokens")}
"""What src/icm may know of core: texts, tokens and labels. Whoever tokenizes is handed to it."""
PURE = {"asyncio", "aiohttp", "io", "os", "pathlib", "shutil", "socket", "sqlite3", "subprocess", "threading", "urllib"}
"""What src/icm imports none of: files, processes, network."""


def imports(package: str) -> dict[str, set[str]]:
    """Module -> everything that it imports, by full name."""
    folder = REPOSITORY / package.replace(".", "/")
    found = {}
    for file in sorted(folder.rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                holds_modules = node.module in ("core", "core.llm_api")  # and nothing else
                names |= {f"{node.module}.{each.name}" for each in node.names} if holds_modules else {node.module or ""}
        found[str(file.relative_to(REPOSITORY))] = names
    assert found, package
    return found


def imported_at_once(file: Path) -> set[str]:
    """What is imported whenever the module is, not in a function's body and not for type checkers alone."""
    tree = ast.parse(file.read_text())
    return {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_package_stands_in_a_row() -> None:
    packages = {f"src.{folder.name}" for folder in (REPOSITORY / "src").iterdir() if (folder / "__init__.py").exists()}
    assert packages | {"contrib", "core", "icm", "icm_vllm"} == {package for row in ROWS for package in row}


def test_imports_go_downwards() -> None:
    for height, row in enumerate(ROWS):
        above = [package for higher in ROWS[height + 1 :] for package in higher]
        above += ["scripts", "benchmarks", "tests"]
        for package in row:
            for module, names in imports(package).items():
                upwards = {name for name in names for other in above if within(name, other)}
                assert not upwards, f"{module} imports {upwards}"


def test_the_algorithm_asks_no_engine_and_no_file() -> None:
    for module, names in imports("src.icm").items():
        ours = {name for name in names if within(name, "core")}
        assert ours <= WHAT_PROMPTS_ARE_MADE_OF, f"{module} imports {ours}"
        outside = {name for name in names if name.partition(".")[0] in PURE}
        assert not outside, f"{module} imports {outside}"


def row_in_core(name: str) -> tuple[int, str]:
    """(height, module or folder) of a module of core."""
    found = [(height, part) for height, row in enumerate(ROWS_OF_CORE) for part in row if within(name, part)]
    assert len(found) == 1, f"{name} stands in {len(found)} rows of core"
    return found[0]


def test_imports_inside_core_go_downwards() -> None:
    for module, names in imports("core").items():
        name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name in ("core", "core.llm_api"):
            continue
        height, part = row_in_core(name)
        for other in names:
            if within(other, "core") and not within(other, part):
                assert row_in_core(other)[0] < height, f"{module} imports {other}"


def test_scoring_imports_no_text() -> None:
    for file in sorted((REPOSITORY / "core").rglob("*.py")):
        module = str(file.relative_to(REPOSITORY))
        if not module.startswith("core/llm_api/text/") and module not in NEEDS_TEXT:
            texts = {name for name in imported_at_once(file) if within(name, "core.llm_api.text")}
            assert not texts, f"{module} imports {texts}"


@pytest.mark.parametrize("folder", ["benchmarks", "fakes", "scripts"])
def test_nothing_that_tests_import_imports_tests(folder: str) -> None:
    for module, names in imports(folder).items():
        ours = {name for name in names if within(name, "tests")}
        assert not ours, f"{module} imports {ours}"
