"""`import charter` names the file or folder of the user that would be imported instead of a package of Charter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import charter
from charter.shadowing import PACKAGES

ROOT = Path(charter.__file__).parents[1]


def run_script(folder, code):
    (folder / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_all_packages_are_checked():
    assert {"charter", "benchmarks", *PACKAGES} == {init.parent.name for init in ROOT.glob("*/__init__.py")}


@pytest.mark.parametrize("name", ["engine/__init__.py", "schemas.py", "trainer/__init__.py"])
def test_package_of_the_user_is_named(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    result = run_script(tmp_path, "import charter")
    hidden = path.parent if path.stem == "__init__" else path
    assert result.returncode == 1
    assert f"ImportError: {hidden} hides the package `{hidden.stem}` of Charter in {ROOT}" in result.stderr
    assert f"rename {hidden}" in result.stderr


def test_module_that_is_already_imported_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "engine.py").touch()
    code = "import sys\nsys.path.insert(0, 'other')\nimport engine\nsys.path.remove('other')\nimport charter"
    result = run_script(tmp_path, code)
    assert "hides the package `engine`" in result.stderr and "is already imported" in result.stderr


def test_folders_without_modules_do_not_matter(tmp_path):
    for name in PACKAGES:  # a package that is found later has precedence over a folder without an __init__.py
        (tmp_path / name).mkdir()
    (tmp_path / "data.py").touch()
    result = run_script(tmp_path, "import charter, engine.errors, schemas.records, trainer\nprint(engine.errors.__file__)")
    assert result.stdout.strip() == str(ROOT / "engine" / "errors.py"), result.stderr
