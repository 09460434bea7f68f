"""The direction of imports: prunefront <- latency_tables <- workers <- search <- service, and store beside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("prunefront", "latency_tables", "workers", "search", "store", "service")
MAY_IMPORT = {
    "prunefront": {"prunefront"},
    "latency_tables": {"prunefront", "latency_tables"},
    "workers": {"prunefront", "latency_tables", "workers"},
    "search": {"prunefront", "latency_tables", "workers", "search", "store"},
    # The store knows the exceptions of the library and the time; it knows no model, task or route.
    "store": {"prunefront", "store"},
    "service": set(PACKAGES),
}
HEAVY = {"torch", "timm", "optuna", "fastapi", "sqlalchemy", "numpy", "pandas", "matplotlib"}
SOURCES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not path.is_relative_to(ROOT / "prunefront/cli")
)
COMMANDS = sorted((ROOT / "prunefront/cli").glob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Modules named by the import statements of a tree, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            yield node.module or ""


def imported_at_start(path: Path) -> Iterator[str]:
    """Modules that importing the file imports: outside functions and outside ``if TYPE_CHECKING``."""
    statements = ast.parse(path.read_text()).body
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield from imported_modules(statement)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_comes_before_it(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    imported = {module.partition(".")[0] for module in imported_modules(ast.parse(path.read_text()))}

    assert imported & set(PACKAGES) <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", sorted((ROOT / "store").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_store_needs_only_the_errors_of_the_library(path: Path) -> None:
    imported = {module for module in imported_modules(ast.parse(path.read_text())) if module.startswith("prunefront")}

    assert imported <= {"prunefront.errors"}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_command_imports_the_application_and_torch_only_when_it_runs(path: Path) -> None:
    imported = {module.partition(".")[0] for module in imported_at_start(path)}

    assert not imported & (HEAVY | set(PACKAGES) - {"prunefront"})


@pytest.mark.parametrize("path", [*SOURCES, *COMMANDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_named_for_what_did_not_fit_elsewhere(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    folders |= {parent for folder in folders for parent in folder.parents if parent.is_relative_to(ROOT / "tests")}

    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
