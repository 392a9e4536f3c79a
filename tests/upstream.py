"""Test suites that other projects publish beside their code: fetched, never kept here."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest


def fetch_tests(library: str, folder: Path) -> Path:
    """The folder tests/ of the source distribution of the version that is installed; skips where it cannot be had."""
    version = importlib.metadata.version(library)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--dest", str(folder), f"{library}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the source distribution of {library} {version} cannot be had: {error}")
    if done.returncode:
        pytest.skip(f"the source distribution of {library} {version} cannot be had: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        # Python 3.11.4 and later unpack nothing outside the folder; earlier ones know no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.glob("*/tests"))


def import_suite(
    folder: Path, name: str, missing: dict[str, tuple[str, ...]], config: pytest.Config
) -> types.ModuleType:
    """Module `name` of a folder of tests, as a part of a package of its own.

    Args:
        folder: what `fetch_tests` returned.
        name: of the module.
        config: pytest's, which is told the suite's marks.
        missing: {module that the suite imports and that is not published: the classes that it wants of it}; they are
            left empty.
    """
    package = f"upstream_{folder.parent.name.partition('-')[0]}"
    sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(folder)]
    for module, classes in missing.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join([package, *parts[:end]])
            sys.modules.setdefault(path, types.ModuleType(path)).__path__ = []
        for item in classes:
            setattr(sys.modules[f"{package}.{module}"], item, type(item, (), {}))
    for mark in set(re.findall(r"\bmark\.(\w+)", (folder / f"{name}.py").read_text(encoding="utf-8"))):
        config.addinivalue_line("markers", f"{mark}: of a suite of others")
    return importlib.import_module(f"{package}.{name}")


def outcomes(case: type[unittest.TestCase]) -> tuple[int, dict[str, str]]:
    """How many tests of a case ran, and {test that failed: last line of its error}."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    failed = result.failures + result.errors
    ran = result.testsRun - len(result.skipped)
    names = [re.search(r"\.(test_\w+)", test.id())[1] for test, _ in failed]  # a subtest has its arguments behind it
    return ran, {name: report.strip().splitlines()[-1] for name, (_, report) in zip(names, failed, strict=True)}
