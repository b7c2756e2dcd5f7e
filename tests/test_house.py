"""The house: which room may use which (import-linter), how long a file may be, and what a start may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixer.base.data_folder import DataFolder

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "fixer").rglob("*.py"))
TABLES = {"family_table.py"}
"""Files that hold a table may be longer than others."""

LONGER = {"search.py"}
"""Over 400 lines today; none may be added."""


def test_imports_go_one_way():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long_and_no_private_name_crosses(module):
    text = module.read_text()
    if module.name not in TABLES | LONGER:
        assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fixer"):
            private = [name.name for name in node.names if name.name.startswith("_") and not name.name.startswith("__")]
            assert not private, private


@pytest.mark.parametrize("package", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_a_package_has_nothing_but_a_docstring(package):
    body = ast.parse((package / "__init__.py").read_text()).body
    if package.name not in ("fixer", "child"):
        assert len(body) == 1
        assert isinstance(body[0], ast.Expr)


def imported(program: str) -> set[str]:
    code = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_a_second_start_imports():
    """Compiling, measuring and drawing come in only where they are needed."""
    names = imported("import fixer.serve.serve")
    heavy = {"multiprocessing", "sqlite3", "rich", "click", "torch", "triton", "fixer.kernel.pool", "huggingface_hub"}
    assert not heavy & names
    assert len(names) < 300  # 210 before the rooms: each module is a smaller file now, and msgspec brings 12


def test_what_the_help_imports():
    names = {name for name in imported("import fixer.cli") if name.startswith("fixer.")}
    rooms = {name.split(".")[1] for name in names}
    assert rooms <= {"cli", "base", "commands"}, names


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert ".test_" not in f".{node.module or ''}", path
                assert not any(name.name.startswith("test_") for name in node.names), path


def test_the_data_folders_names_stand_in_one_place():
    """`DataFolder` has every name in it, and the README's table is its docstring's."""
    names = {name for name, value in vars(DataFolder).items() if isinstance(value, property)}
    known = {str(getattr(DataFolder(Path()), name)) for name in names}
    for module in MODULES:
        if module.name != "data_folder.py":
            found = set(re.findall(r'(?:home|data|data_home\(\)) / "([\w.]+)"', module.read_text())) & known
            assert not found, (module, found)
    readme, told = (ROOT / "README.md").read_text(), DataFolder.__doc__ or ""
    for name in known:
        assert f"`{name}`" in told or f"`{name}/" in told, name
        assert f"`{name}`" in readme or f"`{name}/" in readme, name
