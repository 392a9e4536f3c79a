"""Packing: the same bytes whatever the workers and interruptions, and a report of every sample left out."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from command_line import error_of, run
from filelock import FileLock
from PIL import Image
from test_data import caption, loader, picture, write_bad_manifest, write_manifest

from fixclip_core.data.captions import CaptionFilters
from fixclip_core.data.check import check_source
from fixclip_core.data.config import DataConfig
from fixclip_core.data.pack import PackOptions, pack


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that packing left, records included; the lock says nothing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_pack(source: Path, out: Path, workers: int = 1, **options: object):
    return pack(DataConfig(source=str(source)), out, PackOptions(**options), workers)


def test_packed_shards_train_like_the_manifest(tmp_path):
    manifest = write_manifest(tmp_path / "in", 30)
    report = run_pack(manifest, tmp_path / "out", shard_size=8)
    assert (report.samples, report.written, report.skipped) == (30, 30, [])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"shard-{i:06d}.tar" for i in range(4)]
    fields = {"shuffle": False, "short_caption": "given"}
    packed = loader(tmp_path / "out", **fields)
    assert packed.batches.source.sizes == [8, 8, 8, 6], "index.json spares the counting"
    for a, b in zip(loader(manifest, **fields).epoch(0), packed.epoch(0), strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.long_ids, b.long_ids)
        assert torch.equal(a.short_ids, b.short_ids)


def test_workers_and_sources_do_not_change_the_shards(tmp_path):
    manifest = write_manifest(tmp_path / "in", 30)
    run_pack(manifest, tmp_path / "one", shard_size=4)
    run_pack(manifest, tmp_path / "two", shard_size=4, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "two")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.tar")}
    run_pack(manifest, tmp_path / "two", shard_size=4)
    assert contents(tmp_path / "two") == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "a finished pack is left alone"


def test_files_that_were_decoded_before_are_not_decoded_again(tmp_path):
    manifest = write_manifest(tmp_path / "in", 3)
    damaged = tmp_path / "in" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert [sample.reason for sample in run_pack(manifest, tmp_path / "out").skipped] == ["truncated_image"]
    assert run_pack(manifest, tmp_path / "trusting", decoded_before=True).written == 3


def test_every_bad_sample_is_reported_and_the_rest_packed(tmp_path):
    manifest, reasons = write_bad_manifest(tmp_path / "in", good=20)
    report = run_pack(manifest, tmp_path / "out", shard_size=7, workers=2)
    assert [sample.reason for sample in report.skipped] == list(reasons.values())
    assert report.written == 20
    written = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert written["counts"] == report.counts()
    assert written["skipped"][0] == {
        "reason": "truncated_image",
        "file": f"{manifest}:21",
        "key": "truncated.jpg",
        "detail": written["skipped"][0]["detail"],
        "index": 20,
    }
    part = loader(tmp_path / "out", last_batch="keep", max_bad_share=0.0)
    assert sum(len(batch) for batch in part.epoch(0)) == 20


PACK = "import sys; from fixclip_cli.main import app; app(sys.argv[1:])"


@pytest.mark.parametrize(("workers", "blows"), [(1, (4,)), (2, (2, 7))])
def test_kill_9_then_the_same_shards(tmp_path, workers, blows):
    manifest, _ = write_bad_manifest(tmp_path / "in", good=283)
    for i in range(0, 280, 3):  # slow enough to be caught in the middle of a shard
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i, (160, 160)))
    cut = tmp_path / "cut"
    run_pack(manifest, tmp_path / "whole", shard_size=20)
    whole = contents(tmp_path / "whole")
    options = ["--shard-size", "20", "--no-filter", "--workers", str(workers)]
    killed = 0
    for wanted in blows:  # records to wait for
        process = subprocess.Popen(
            [sys.executable, "-c", PACK, "data", "pack", str(manifest), str(cut), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list((cut / ".pack").glob("shard-*.json"))) < wanted:
            time.sleep(0.001)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        shards = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cut.glob("*.tar")}
        assert shards.items() <= whole.items(), "a shard in place is complete"
    assert killed
    run_pack(manifest, cut, workers, shard_size=20)
    assert contents(cut) == whole


def test_a_lost_or_cut_shard_is_packed_again(tmp_path):
    manifest = write_manifest(tmp_path / "in", 20)
    out = tmp_path / "out"
    run_pack(manifest, out, shard_size=5)
    before = contents(out)
    (out / "shard-000001.tar").unlink()
    os.truncate(out / "shard-000002.tar", 1000)
    (out / "index.json").unlink()
    (out / ".pack" / "stray.tmp").write_text("left by a killed run")
    run_pack(manifest, out, shard_size=5)
    assert contents(out) == before


def test_changed_options_or_inputs_are_refused(tmp_path):
    manifest = write_manifest(tmp_path / "in", 20)
    out = tmp_path / "out"
    run_pack(manifest, out, shard_size=5)
    with pytest.raises(ValueError, match="packed with shard_size=5, not 6"):
        run_pack(manifest, out, shard_size=6)
    with pytest.raises(ValueError, match="packed with resize=None, not 9"):
        run_pack(manifest, out, shard_size=5, resize=9)
    with pytest.raises(ValueError, match=r"packed with filters=None, not \{'min_words': 8"):
        run_pack(manifest, out, shard_size=5, filters=CaptionFilters())
    (tmp_path / "in" / "7.png").write_bytes(picture(99))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"shard-000001\.tar: captions or images changed") as caught:
            run_pack(manifest, out, shard_size=5, workers=workers)
        assert "Traceback" not in str(caught.value)
    (out / ".pack" / "shard-000001.json").unlink()
    run_pack(manifest, out, shard_size=5)
    with tarfile.open(out / "shard-000001.tar") as tar:
        stored = tar.extractfile("000000007.png")
        assert stored is not None
        assert stored.read() == picture(99)
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:15]))
    with pytest.raises(ValueError, match="packed with samples=20, not 15"):
        run_pack(manifest, out, shard_size=5)


def test_a_part_can_be_packed(tmp_path):
    manifest = write_manifest(tmp_path / "in", 10)
    report = pack(DataConfig(source=str(manifest), start=4, stop=9), tmp_path / "out", PackOptions(shard_size=2))
    assert (report.samples, report.written) == (5, 5)
    with pytest.raises(ValueError, match=r"stop=11: .* has only 10 samples"):
        pack(DataConfig(source=str(manifest), stop=11), tmp_path / "more", PackOptions())


def test_foreign_folders_and_files_are_refused(tmp_path):
    manifest = write_manifest(tmp_path / "in", 4)
    with pytest.raises(ValueError, match="not empty and not from a pack"):
        run_pack(manifest, tmp_path / "in")
    with pytest.raises(ValueError, match="cannot be written"):
        run_pack(manifest, manifest / "below-a-file")


@pytest.mark.parametrize("workers", [1, 2])
def test_no_space_left_is_one_clear_error_and_no_shard(tmp_path, workers):
    manifest = write_manifest(tmp_path / "in", 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"shard-00000\d\.tar: \[Errno \d+\] File too large") as caught:
            run_pack(manifest, tmp_path / "out", workers, shard_size=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.tar"))
    run_pack(manifest, tmp_path / "whole", shard_size=50)
    run_pack(manifest, tmp_path / "out", shard_size=50)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_packs_into_one_folder_do_not_mix(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "in", 4)
    run_pack(manifest, tmp_path / "out")
    monkeypatch.setattr("fixclip_core.data.pack._LOCK_SECONDS", 0)
    with (
        FileLock(tmp_path / "out" / ".pack" / "lock"),
        pytest.raises(ValueError, match="another process is packing into this folder"),
    ):
        run_pack(manifest, tmp_path / "out")


def test_filters_decide_and_are_counted(tmp_path):
    manifest = write_manifest(tmp_path / "in", 10)
    with manifest.open("a") as file:
        file.write(json.dumps({"image": "0.png", "long": "Short."}) + "\n")
        file.write(json.dumps({"image": "0.png", "long": "again and " * 30}) + "\n")
    report = run_pack(manifest, tmp_path / "out", filters=CaptionFilters())
    assert report.counts() == {"too_short": 1, "repetition": 1}
    assert run_pack(manifest, tmp_path / "all").written == 12


@pytest.mark.parametrize(("side", "size"), [("shortest", (64, 32)), ("longest", (32, 16))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_resize_and_formats(tmp_path, side, size, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, original in (("large", (200, 100)), ("small", (30, 15))):
        (folder / f"{name}.{kind.lower()}").write_bytes(picture(0, original, kind))
        (folder / f"{name}.txt").write_text(caption(0))
    names = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "png"}
    run_pack(folder, tmp_path / "out", resize=32, side=side)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "bigdata")}
    (large,) = (
        data
        for name, data in files.items()
        if name.startswith("000000000.") and "txt" not in name and "json" not in name
    )
    assert Image.open(io.BytesIO(large)).size == size
    assert files[f"000000001.{names[kind]}"] == (
        picture(0, (30, 15), kind) if kind != "BMP" else files["000000001.png"]
    ), "a small image is stored as it is"
    assert json.loads(files["000000000.json"])["image"].startswith("large")


def test_scenes_can_be_packed(tmp_path):
    report = pack(DataConfig(source="scenes", start=5, stop=9), tmp_path / "out", PackOptions())
    assert report.written == 4
    direct = loader("scenes", start=5, stop=9, shuffle=False, short_caption="given")
    packed = loader(tmp_path / "out", shuffle=False, short_caption="given")
    for a, b in zip(direct.epoch(0), packed.epoch(0), strict=True):
        assert torch.equal(a.long_ids, b.long_ids)
        assert torch.equal(a.short_ids, b.short_ids)
        assert a.image.shape == b.image.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shard_size": 0}, "shard_size=0"), ({"resize": 0}, "resize=0"), ({"side": "left"}, "side='left'")],
)
def test_bad_options_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        PackOptions(**options)


# -- check, and the command line -----------------------------------------------------------------------------


def test_check_counts_what_is_there(tmp_path):
    manifest, reasons = write_bad_manifest(tmp_path, good=20)
    with manifest.open("a") as file:
        file.write(json.dumps({"image": "0.png", "long": "A short one."}) + "\n")
        file.write(json.dumps({"image": "0.png", "long": "w1 x2 y3 " * 200, "short": "Many words."}) + "\n")
    report = check_source(DataConfig(source=str(manifest)), CaptionFilters())
    assert (report.samples, report.checked) == (20 + len(reasons) + 2,) * 2
    assert [sample.reason for sample in report.skipped] == list(reasons.values())
    assert report.filtered == {"too_short": 1, "repetition": 1}
    assert report.short_captions == 21
    assert report.tokens.tolist()[-2] == len(["<start>", "a", "short", "one", ".", "<end>"])
    assert (report.tokens > 248).sum() == 1
    assert [key for key, _ in report.examples] == ["0.png", "1.png", "2.png"]
    spread = check_source(DataConfig(source=str(manifest)), CaptionFilters(), limit=10, decode=False)
    assert spread.checked == 10
    with pytest.raises(ValueError, match="limit=0"):
        check_source(DataConfig(source=str(manifest)), CaptionFilters(), limit=0)


def test_the_commands(tmp_path):
    manifest, _ = write_bad_manifest(tmp_path / "in", good=20)
    out = tmp_path / "out"
    result = run("data", "pack", manifest, out, "--shard-size", 6)
    assert result.exit_code == 0, result.output
    assert "truncated_image" in result.output
    assert "truncated.jpg" in result.output
    assert f"{manifest}:21" in result.output
    assert "20 of 37 samples packed" in result.output
    result = run("data", "check", manifest, "--limit", 0)
    assert result.exit_code == 0, result.output
    assert "37 samples, 37 looked at" in result.output
    assert "over 77: 0.0%, over 248 (cut): 0.0%" in result.output
    assert "0.png: Picture number 0" in result.output
    (out / "index.json").unlink()
    result = run("data", "index", out)
    assert "20 samples in 7 shards" in result.output
    assert len(json.loads((out / "index.json").read_bytes())["shardlist"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "nowhere.jsonl", "out"], "nowhere.jsonl: cannot be read"),
        (["pack", "nowhere", "out", "--min-letter-share", "3"], "min_letter_share=3.0"),
        (["pack", "nowhere", "out", "--start", "3", "--stop", "2"], "stop=2"),
        (["check", "nowhere"], "does not exist"),
        (["index", "nowhere"], "no .tar shards"),
    ],
)
def test_commands_show_one_clear_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(run("data", *arguments))


def test_nothing_packed_is_an_error(tmp_path):
    manifest = write_manifest(tmp_path / "in", 3)
    result = run("data", "pack", manifest, tmp_path / "out", "--image-root", tmp_path)
    assert "not a single sample could be packed" in error_of(result)


def test_plain_wordings_are_packed_with_their_captions(tmp_path):
    """The field `plain` of a manifest, of shards and of scenes is what state alignment reads."""
    run_pack(Path("scenes-mixed:8"), tmp_path / "out", shard_size=8)
    before, after = (
        next(loader(source, batch_size=8, shuffle=False, short_caption="given").epoch(0))
        for source in ("scenes-mixed:8", tmp_path / "out")
    )
    assert not torch.equal(before.plain_ids, before.long_ids)
    assert torch.equal(before.plain_ids, after.plain_ids)
