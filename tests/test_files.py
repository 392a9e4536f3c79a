"""Outputs: whole or not there, found out in time, and one writer at a time."""

import os
import platform
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixclip_core import files
from fixclip_core.files import lock_folder, prepare_folder, write_atomically


@contextmanager
def full_disk(size):
    """No file can grow beyond this many bytes: the operating system's own error, wherever it is met."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "content", [bytes(5000), lambda path: save_file({"x": torch.zeros(5000)}, path)], ids=["bytes", "safetensors"]
)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, content):
    file = tmp_path / "weights"
    write_atomically(file, b"before")
    with full_disk(1000), pytest.raises(OSError, match=r"weights.*|.*weights") as caught:
        write_atomically(file, content)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """A process is killed while it writes; the next write of the file clears up after it, and after nobody else."""
    code = """
import os, signal, sys
from pathlib import Path
from fixclip_core.files import write_atomically
write_atomically(Path(sys.argv[1]), lambda path: (path.write_text("half"), os.kill(os.getpid(), signal.SIGKILL)))
"""
    file = tmp_path / "a[1].json"
    killed = subprocess.run([sys.executable, "-c", code, str(file)])
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "half"
    running = tmp_path / f".a[1].json.{platform.node()}.{os.getppid()}.tmp"
    elsewhere = tmp_path / ".a[1].json.another-host.4194303.tmp"
    for other in (running, elsewhere):
        other.touch()
    write_atomically(file, b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {file.name, running.name, elsewhere.name}


def test_a_locked_folder_names_who_holds_it_until_it_is_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    code = """
import sys, time
from pathlib import Path
from fixclip_core.files import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"process {process.pid} on .* is writing there; wait for it"):
        lock_folder(tmp_path)
    threading.Timer(0.5, process.kill).start()
    lock = lock_folder(tmp_path, wait=True)
    process.wait()
    assert f"process {process.pid} on " in caplog.text
    assert "is writing there; waiting until it is done" in caplog.text
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


def test_an_output_folder_is_tried_out(tmp_path):
    prepare_folder(tmp_path / "new" / "folder", 1000)
    assert not list((tmp_path / "new" / "folder").iterdir())
    prepare_folder(tmp_path / "new" / "folder", empty=True)
    with pytest.raises(ValueError, match="new exists and is not empty; nothing was written"):
        prepare_folder(tmp_path / "new", empty=True)
    with pytest.raises(ValueError, match=r"too little disk space: .* GiB free, 1000000.00 GiB needed"):
        prepare_folder(tmp_path, 10**6 * 2**30)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        prepare_folder(tmp_path / "file")
    for unwritable in (tmp_path / "file" / "below", Path("/proc/fixclip")):
        with pytest.raises(ValueError, match="cannot be written to"):
            prepare_folder(unwritable)
