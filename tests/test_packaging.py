"""The package contains all its files, and skipped Kafka tests fail where Kafka is required."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import charter

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_is_listed():
    rooms = {package.split(".")[0] for package in PACKAGES}
    packages = {".".join(init.parent.relative_to(ROOT).parts) for room in rooms for init in (ROOT / room).rglob("__init__.py")}
    assert sorted(PACKAGES) == sorted(packages)
    assert rooms | {"benchmarks"} == {init.parent.name for init in ROOT.glob("*/__init__.py")}


def test_every_data_file_is_packaged():
    globs = PROJECT["tool"]["setuptools"]["package-data"]
    rooted = {ROOT / package.replace(".", "/"): patterns for package, patterns in globs.items()}
    packaged = {path for folder, patterns in rooted.items() for glob in patterns for path in folder.glob(glob)}
    rooms = {package.split(".")[0] for package in PACKAGES}
    files = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == packaged


def test_version_is_defined_once():
    assert charter.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize(("required", "code"), [("1", 1), ("", 0)])
def test_skipped_kafka_tests_fail_where_kafka_is_required(required, code):
    environment = {key: value for key, value in os.environ.items() if key not in ("KAFKA_HOME", "CHARTER_TEST_BOOTSTRAP")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "1",
        "-m",
        "kafka",
        "-k",
        "test_create_topics_is_idempotent",
        "tests/engine/test_bus_contract.py",
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"CHARTER_REQUIRE_KAFKA": required}, capture_output=True, text=True, check=False
    )
    assert "1 skipped" in result.stdout
    assert result.returncode == code
    assert ("1 Kafka tests were skipped" in result.stdout) == bool(code)
