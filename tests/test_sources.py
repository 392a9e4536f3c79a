"""Sources: nothing disappears. What is in a folder, an archive or a table is read, counted or named in an error."""

import contextlib
import csv
import io
import json
import os
import re
import struct
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import error_of, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from test_data import caption, loader, picture, write_manifest, write_shards
from test_pack import contents
from webdataset.writer import TarWriter

from fixclip_core.data.captions import CaptionFilters
from fixclip_core.data.config import DataConfig
from fixclip_core.data.images import image_extensions, is_system_file
from fixclip_core.data.pack import PackOptions, pack
from fixclip_core.data.samples import BadSampleError, Sample, check_captions, decode_image
from fixclip_core.data.sources import open_source
from fixclip_core.data.sources.manifest import read_manifest
from fixclip_core.data.sources.shards import index_tar, write_index


def read_all(source: object, **fields: object) -> list[Sample]:
    opened = open_source(DataConfig.model_validate({"source": str(source), **fields}))
    return [opened.read(index) for index in range(sum(opened.sizes))]


def reason_of(source: object, index: int = 0, **fields: object) -> tuple[str, str]:
    """Why a sample cannot be used, and the detail."""
    opened = open_source(DataConfig.model_validate({"source": str(source), **fields}))
    with pytest.raises(BadSampleError) as caught:
        check_captions(opened.read(index))
    return caught.value.skipped.reason, caught.value.skipped.detail


# -- pictures of every mode ----------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(Sample("file", "key", data, "", None))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


GREY_16 = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)


def grey(levels_HW: np.ndarray, white: int) -> np.ndarray:
    return np.repeat((levels_HW / white * 255)[..., None], 3, -1)


def tiff_12_bits(levels_HW: np.ndarray) -> bytes:
    """Two levels in three bytes, as scanners and microscopes write them; Pillow reads such files and writes none."""
    packed = bytearray()
    for a, b in levels_HW.reshape(-1, 2).tolist():
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    height, width = levels_HW.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 134), (277, 1), (278, height)]
    tags += [(279, len(packed)), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def inverted(tiff: bytes) -> bytes:
    """The same file with PhotometricInterpretation 0: white is zero."""
    entry = struct.pack("<HHII", 262, 3, 1, 1)
    assert tiff.count(entry) == 1
    return tiff.replace(entry, struct.pack("<HHII", 262, 3, 1, 0))


@pytest.mark.parametrize(
    ("data", "expected_HWC"),
    [
        (encoded(Image.fromarray(GREY_16), "PNG"), grey(GREY_16, 65535)),
        (encoded(Image.fromarray(GREY_16), "TIFF"), grey(GREY_16, 65535)),
        (encoded(Image.fromarray(GREY_16.astype(">u2")), "TIFF"), grey(GREY_16, 65535)),
        (encoded(Image.fromarray(GREY_16), "JPEG2000"), grey(GREY_16, 65535)),
        (encoded(Image.fromarray(GREY_16), "PPM"), grey(GREY_16, 65535)),
        (inverted(encoded(Image.fromarray(GREY_16), "TIFF")), 255 - grey(GREY_16, 65535)),
        (tiff_12_bits(GREY_16 >> 4), grey(GREY_16 >> 4, 4095)),
    ],
    ids=["png", "tiff", "tiff big-endian", "jpeg2000", "pgm", "tiff white is zero", "tiff 12 bits"],
)
def test_grey_of_more_than_8_bits_keeps_its_levels(data, expected_HWC):
    """`convert("RGB")` makes all but 256 of the 65,536 levels white."""
    assert np.abs(decoded(data) - expected_HWC).max() <= 0.5


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


CMYK = NOISE.astype(float)
FLAT = Image.new("RGB", (8, 8), (200, 50, 30))


@pytest.mark.parametrize(
    ("image", "kind", "expected_HWC", "tolerance"),
    [
        (Image.fromarray(NOISE[..., 0]), "PNG", grey(NOISE[..., 0], 255), 0),
        (Image.fromarray(NOISE[..., 0] > 127), "PNG", grey(NOISE[..., 0] > 127, 1), 0),
        (Image.fromarray(NOISE[..., :2]), "PNG", grey(NOISE[..., 0], 255), 0),
        (Image.fromarray(NOISE), "PNG", NOISE[..., :3], 0),
        (Image.fromarray(NOISE[..., :3]), "TIFF", NOISE[..., :3], 0),
        (Image.fromarray(NOISE, "RGBX"), "TIFF", NOISE[..., :3], 0),
        (Image.fromarray(NOISE, "CMYK"), "TIFF", (255 - CMYK[..., :3]) * (255 - CMYK[..., 3:]) / 255, 1),
        (FLAT.quantize(4), "PNG", np.asarray(FLAT), 0),
        (FLAT, "JPEG", np.asarray(FLAT), 3),
        (lab(FLAT), "TIFF", np.asarray(FLAT), 3),
    ],
    ids=["L", "1", "LA", "RGBA", "RGB", "RGBX", "CMYK", "P", "YCbCr", "LAB"],
)
@pytest.mark.filterwarnings("ignore")
def test_modes_of_8_bits(image, kind, expected_HWC, tolerance):
    assert np.abs(decoded(encoded(image, kind)) - expected_HWC).max() <= tolerance


@pytest.mark.parametrize("levels_HW", [GREY_16.astype(np.float32), GREY_16.astype(np.int32)], ids=["F", "I"])
def test_modes_without_a_white_are_a_counted_reason(levels_HW):
    with pytest.raises(BadSampleError, match=r"unsupported_image .* stands for white") as caught:
        decode_image(Sample("file", "key", encoded(Image.fromarray(levels_HW), "TIFF"), "", None))
    assert caught.value.skipped.reason == "unsupported_image"


# -- folders -------------------------------------------------------------------------------------------------


def write_pair(folder: Path, name: str, index: int = 0, text: str = ".txt") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(index))
    path.with_suffix(text).write_text(caption(index))


HIDDEN = ("._0.png", ".1.png", "__MACOSX/0.png", ".cache/0.png", "@eaDir/0.png", "Thumbs.db", ".DS_Store", "a/._b.png")


def test_hidden_and_system_files_are_no_samples(tmp_path, caplog):
    folder = tmp_path / "data"
    for i in range(3):
        write_pair(folder, f"{i}.png", i)
    for name in HIDDEN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert [sample.key for sample in read_all(folder)] == ["0.png", "1.png", "2.png"]
    assert not caplog.records
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    (tmp_path / "._s-0.tar").write_bytes(b"\0\5\x16\7")
    assert [sample.key for sample in read_all(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["0.jpg", "a/b.png", "../0.jpg", "./0.jpg", "thumbs.png", "a.b/c..jpg", "/a/0.jpg"])
def test_ordinary_names_are_no_system_files(name):
    assert not is_system_file(name)


def test_every_picture_that_pillow_reads_is_a_sample_and_the_rest_is_counted(tmp_path, caplog):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "tga": "TGA", "pgm": "PPM", "PNG": "PNG", "dib": "DIB"}
    for extension, kind in kinds.items():
        (tmp_path / f"{kind}.{extension}").write_bytes(picture(0, kind=kind))
        (tmp_path / f"{kind}.txt").write_text(caption(0))
    for name in ("a.heic", "b.heic", "c.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    samples = read_all(tmp_path)
    assert sorted(Path(sample.key).suffix[1:] for sample in samples) == sorted(kinds)
    for sample in samples:
        assert decode_image(sample).size == (12, 10)
    assert "other files than images are left out: 2 .heic, 1 .mp4, 1 .txt" in caplog.text
    assert {"mpeg", "pdf", "eps", "h5", "iim"}.isdisjoint(image_extensions()), "those Pillow does not decode itself"


def test_linked_folders_and_the_case_of_extensions(tmp_path, caplog):
    folder = tmp_path / "data"
    write_pair(folder, "0.JPG", text=".TXT")
    write_pair(tmp_path / "elsewhere", "1.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert [sample.long for sample in read_all(folder)] == [caption(0)]
    assert "1 linked folders are not followed, the first is" in caplog.text


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write_pair(tmp_path, "0.png")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("root may read everything")
        with pytest.raises(ValueError, match="locked: cannot be read: Permission denied"):
            read_all(tmp_path)
    finally:
        locked.chmod(0o700)


def test_caption_extensions_are_named(tmp_path, caplog):
    write_pair(tmp_path, "0.png", text=".caption")
    (tmp_path / "0.short.caption").write_text("Noise.")
    (tmp_path / "0.sum").write_text("Sum.")
    assert reason_of(tmp_path) == ("no_caption", "there is no 0.txt")
    assert "left out: 2 .caption, 1 .sum; are the captions in the .caption? Then caption_key=caption" in caplog.text
    for key in ("caption", ".caption"):
        (sample,) = read_all(tmp_path, caption_key=key)
        assert (sample.long, sample.short) == (caption(0), "Noise.")
    (sample,) = read_all(tmp_path, caption_key="caption", short_key="sum")
    assert sample.short == "Sum."


def test_folders_without_images_say_what_is_there(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images .*save_to_disk.*it holds 1 \.\w+, 1 \.\w+"):
        read_all(tmp_path)


# -- Hugging Face's folders ----------------------------------------------------------------------------------


def write_metadata(folder: Path, rows: list[dict[str, str]], kind: str) -> None:
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder_of_hugging_face(tmp_path, kind, caplog):
    manifest = write_manifest(tmp_path / "plain", 12)
    for half in range(2):
        folder = tmp_path / "hf" / f"part{half}"
        folder.mkdir(parents=True)
        rows = []
        for i in range(half * 6, half * 6 + 6):
            (folder / f"{i}.png").write_bytes(picture(i))
            rows.append({"file_name": f"{i}.png", "text": caption(i), "licence": "CC0"})
        write_metadata(folder, rows, kind)
    (tmp_path / "hf" / "part0" / "extra.png").write_bytes(picture(0))
    samples = read_all(tmp_path / "hf")
    assert [sample.long for sample in samples] == [caption(i) for i in range(12)]
    assert samples[7].key == "part1/7.png"
    assert f"part1/metadata.{kind}:" in samples[7].file
    assert samples[7].extra == {"licence": "CC0"}
    assert "1 of 13 images are in no metadata file" in caplog.text
    for a, b in zip(loader(manifest).epoch(0), loader(tmp_path / "hf").epoch(0), strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.long_ids, b.long_ids)
    alone = read_all(tmp_path / "hf" / "part1" / f"metadata.{kind}")
    assert [sample.key for sample in alone] == [f"{i}.png" for i in range(6, 12)]


def test_text_files_beside_the_images_come_before_metadata(tmp_path):
    write_pair(tmp_path, "0.png")
    write_metadata(tmp_path, [{"file_name": "0.png", "text": "Other."}], "jsonl")
    assert [sample.long for sample in read_all(tmp_path)] == [caption(0)]


def write_dataset(folder: Path, sizes: list[int], embed: bool = True, **columns: str) -> Path:
    """A split as `Dataset.save_to_disk` leaves it: Arrow streams, and state.json that lists them."""
    pyarrow = pytest.importorskip("pyarrow")
    names = {"image": "image", "text": "text"} | columns
    folder.mkdir(parents=True)
    number = 0
    for part, size in enumerate(sizes):
        rows = []
        for _ in range(size):
            (folder / f"{number}.png").write_bytes(picture(number))
            image = {"bytes": picture(number) if embed else None, "path": f"{number}.png"}
            rows.append({names["image"]: image, names["text"]: caption(number), "number": number})
            number += 1
        table = pyarrow.Table.from_pylist(rows)
        with (
            pyarrow.OSFile(str(folder / f"data-{part:05d}-of-{len(sizes):05d}.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=2)
    files = [{"filename": f"data-{part:05d}-of-{len(sizes):05d}.arrow"} for part in range(len(sizes))]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("embed", [True, False])
def test_data_sets_that_hugging_face_saved(tmp_path, embed):
    folder, manifest = write_dataset(tmp_path / "set", [5, 7], embed), write_manifest(tmp_path / "plain", 12)
    assert open_source(DataConfig(source=str(folder))).sizes == [5, 7]
    for workers in (0, 1):
        fields = {"shuffle": False, "workers": workers}
        for a, b in zip(loader(manifest, **fields).epoch(0), loader(folder, **fields).epoch(0), strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.long_ids, b.long_ids)
            assert a.keys == b.keys
    sample = read_all(folder)[6]
    assert (sample.extra, sample.file) == ({"number": 6}, f"{folder / 'data-00001-of-00002.arrow'}:1")
    report = pack(DataConfig(source=str(folder)), tmp_path / "out", PackOptions())
    assert (report.written, report.skipped) == (12, [])


def test_data_sets_name_their_columns_and_splits(tmp_path):
    folder = write_dataset(tmp_path / "set" / "train", [2], image="picture", text="title")
    with pytest.raises(ValueError, match=r"train: expected `\w+`, .*found picture, title, number"):
        read_all(folder)
    assert len(read_all(folder, image_key="picture", caption_key="title")) == 2
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="splits train, test: give the folder of one"):
        read_all(tmp_path / "set")
    arrow = folder / "data-00000-of-00001.arrow"
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow: cannot be read"):
        read_all(folder, image_key="picture", caption_key="title")
    (folder / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_all(folder)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"reading it needs pyarrow: pip install 'fixclip\[parquet\]'"):
        read_all(tmp_path / "metadata.parquet")


# -- tables: columns, quotes, lines --------------------------------------------------------------------------


def write_table(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "m.csv",
            "filepath,title\na,b\n",
            r"m\.csv:1: .*found filepath, title; .*=filepath caption_key=title",
        ),
        ("m.csv", "Image,Long\na,b\n", r"found Image, Long; .*image_key=Image caption_key=Long .*--image-key"),
        ("m.csv", "image, long\na,b\n", r"image_key=image caption_key= long"),
        ("m.csv", "x,y\na,b\n", r"image_key=\.\.\. caption_key=\.\.\. .*data\.image_key"),
        ("m.csv", "image;long\na;b\n", r"m\.csv:1: .*separated by semicolons: save it with commas"),
        ("m.csv", "image\tlong\na\tb\n", r"m\.csv:1: .*separated by tabs: name the file \.tsv"),
        ("m.tsv", "image,long\na,b\n", r"m\.tsv:1: .*separated by commas: name the file \.csv"),
        ("m.csv", "image,long,long\na,b,c\n", r"m\.csv:1: .*more than one column 'long'"),
        ("m.jsonl", '{"file_name": "a", "text": "b"}\n', r"image_key=file_name caption_key=text"),
    ],
)
def test_other_columns_are_named_with_the_way_out(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_all(write_table(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "filepath,title,sum\n0.png,A b.,\n0.png,C d.,E.\n"),
        ("m.tsv", "filepath\ttitle\tsum\n0.png\tA b.\t\n0.png\tC d.\tE.\n"),
        ("m.jsonl", '{"filepath": "0.png", "title": "A b."}\n{"filepath": "0.png", "title": "C d.", "sum": "E."}\n'),
    ],
)
def test_columns_can_be_named(tmp_path, name, text):
    (tmp_path / "0.png").write_bytes(picture(0))
    path = write_table(tmp_path, name, text)
    keys = {"image_key": "filepath", "caption_key": "title"}
    assert [(sample.key, sample.long, sample.short) for sample in read_all(path, **keys)] == [
        *[("0.png", "A b.", None), ("0.png", "C d.", None)]
    ]
    if name != "m.jsonl":
        assert [sample.short for sample in read_all(path, **keys, short_key="sum")] == [None, "E."]
    with pytest.raises(ValueError, match=r":1: caption_key='text' names no column; there are filepath, title"):
        read_all(path, image_key="filepath", caption_key="text")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('image,long\na,b\nc,"d\ne,f\ng,h\n', 3),
        ('image,long\na,"b\nc,"d"\ne,f\n', 2),
        ('image,long\na,"b\n"c","d"\n', 2),
        ('image,long\na,b\nc,"d', 3),
        ('image,"long\na,b\n', 1),
    ],
)
def test_a_quote_that_is_not_closed_swallows_nothing(tmp_path, text, line):
    """Python's reader took all up to the next quote, or the end of the file, for one caption."""
    with pytest.raises(ValueError, match=rf"m\.csv:{line}: a quote that is opened here is not closed"):
        list(read_manifest(write_table(tmp_path, "m.csv", text)))


cells = st.text(st.sampled_from('ab,"\n \t;'), max_size=6)


@given(rows=st.lists(st.tuples(cells.filter(bool), cells), min_size=1, max_size=6))
def test_tables_that_python_wrote_are_read_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "long"), *rows])
    assert [(row["image"], row["long"]) for row in read_manifest(path)] == rows


def test_loose_quotes_within_a_line_are_read_as_before(tmp_path):
    path = write_table(tmp_path, "m.csv", 'image,long\na,"The "big" dog"\nb,6" wide\n\nc,"two\nlines"\n')
    assert [row["long"] for row in read_manifest(path)] == ['The big" dog"', '6" wide', "two\nlines"]


@pytest.mark.parametrize("name", ["m.csv", "m.json", "m.jsonl"])
@pytest.mark.parametrize("line", [1, 700, 1999])
def test_broken_utf8_names_its_own_line(tmp_path, name, line):
    rows = {
        "m.csv": ["image,long", *["a,b"] * 1999],
        "m.json": ["[", *['{"image": "a", "long": "b"},'] * 1998, "0]"],
        "m.jsonl": ['{"image": "a", "long": "b"}'] * 2000,
    }[name]
    data = [row.encode() for row in rows]
    data[line - 1] += b"\xff"
    (tmp_path / name).write_bytes(b"\n".join(data))
    with pytest.raises(ValueError, match=rf"{name}:{line}: ") as caught:
        list(read_manifest(tmp_path / name))
    assert "line 1 " not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"image": "a", "long": "b"}\n{"image": "a" "long"}\n', r"m\.jsonl:2: .*Expecting.*at column 15$"),
        ("m.json", '[{"image": "a", "long": "b"}]\n\n[{"image": "c", "long": "d"}]', r"m\.json:3: something follows"),
        ("m.json", '[\n{"image": "a", "long": "b"}', r"m\.json:2: expected a comma or the list's end"),
        ("m.jsonl", '{"image": "a", "long": "b"}\n' + "[" * 100_000, r"m\.jsonl:2: .*nested too deeply"),
        ("m.json", '[{"image": "a", "long": "b"},\n' + "[" * 100_000, r"m\.json:2: .*nested too deeply"),
        ("m.jsonl", '{"a":' * 100_000, r"m\.jsonl:1: .*nested too deeply"),
    ],
)
def test_json_that_goes_wrong_names_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        list(read_manifest(write_table(tmp_path, name, text)))


# -- archives ------------------------------------------------------------------------------------------------


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def keys_of(path: Path) -> list[str]:
    return [key for key, _ in index_tar(path).samples]


NAMES = [f"{i:04d}" for i in range(10)]


@pytest.fixture
def shard(tmp_path):
    return write_shards(tmp_path / "shards", [10], index=False) / "s-00.tar"


@pytest.mark.parametrize("member", [0, 3, 10, 16, 29])
def test_a_damaged_header_costs_its_own_sample_only(shard, member, caplog):
    position = headers(shard)[member]
    data = bytearray(shard.read_bytes())
    data[position + 148 : position + 156] = b"garbage!"
    shard.write_bytes(data)
    opened = open_source(DataConfig(source=str(shard)))
    assert sum(opened.sizes) == 10
    whole = []
    for index in range(10):
        with contextlib.suppress(BadSampleError):
            sample = opened.read(index)
            whole += [sample.key] if sample.long and sample.short else []
    assert whole == [name for i, name in enumerate(NAMES) if i != member // 3]
    assert f"{shard}: damaged between bytes {position:,} and" in caplog.text


@pytest.mark.parametrize("cut", ["within a file", "behind a file", "within a header"])
def test_an_archive_that_is_cut_off_says_so(shard, cut, caplog):
    begin = headers(shard)[18]
    os.truncate(shard, begin + {"within a file": 512 + 20, "behind a file": 0, "within a header": 100}[cut])
    opened = open_source(DataConfig(source=str(shard)))
    assert sum(opened.sizes) == (7 if cut == "within a file" else 6)
    assert caplog.text.count(f"{shard}: ") == 1
    assert ", after " in caplog.text


def test_whole_archives_are_not_called_damaged(tmp_path, caplog):
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = add_to_tar(
            tmp_path / f"{kind}.tar", [(f"{'b' * 120}.{end}", b"x" * 700) for end in ("png", "txt")], kind
        )
        assert [(len(key), len(members)) for key, members in index_tar(path).samples] == [(120, 2)]
    with TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "a", "png": picture(0), "txt": caption(0)})
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for path in tmp_path.glob("*.tar"):
        assert not index_tar(path).damage, path


def test_joined_archives_are_read_to_the_end(tmp_path, shard):
    joined = tmp_path / "joined.tar"
    joined.write_bytes(shard.read_bytes() * 2)
    assert keys_of(joined) == NAMES * 2
    assert not index_tar(joined).damage


def test_what_is_no_archive_says_so(tmp_path):
    for name, data in (("zeros", b""), ("page", b"<html>404</html>" * 99), ("gz", b"\x1f\x8b" + bytes(range(256)) * 9)):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        index = index_tar(path)
        assert not index.samples
        assert "damaged" in index.damage


def write_tar(path: Path, names: list[str]) -> Path:
    contents = (picture(i) if name.endswith("png") else caption(i).encode() for i, name in enumerate(names))
    return add_to_tar(path, zip(names, contents, strict=True))


def add_to_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_names_that_come_again_are_samples_of_their_own(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["a.png", "a.txt", "a.png", "a.txt", "a.txt", "b.png", "b.txt"])
    assert [(key, list(members)) for key, members in index_tar(path).samples] == [
        *[("a", ["png", "txt"]), ("a", ["png", "txt"]), ("a", ["txt"]), ("b", ["png", "txt"])]
    ]


@pytest.mark.parametrize(
    ("names", "reason", "detail"),
    [
        (["a.png", "b.png", "a.txt", "b.txt"], "no_caption", "must follow each other .*`tar --sort=name`"),
        (
            ["a.txt", "b.txt", "a.png", "b.png"],
            "missing_file",
            "must follow each other .*`tar --sort=name`",
        ),
        (["a.1.png", "a.1.txt"], "missing_file", r"no image among 1\.png, 1\.txt: .* first dot .*image_key=1\.png"),
        (["a.heic", "a.txt"], "missing_file", "no image among heic, txt; image_key names another"),
        (["a.png", "a.caption"], "no_caption", r"there is no \.txt, nor `long` in \.json, among png, caption"),
    ],
)
def test_the_usual_causes_are_said_in_words(tmp_path, names, reason, detail):
    path = write_tar(tmp_path / "s.tar", names)
    found, said = reason_of(path)
    assert found == reason
    assert re.search(detail, said), said
    message = error_of(run("data", "check", path), code=1)
    assert "not a single sample can be used" in message
    assert said in message


def test_extensions_of_shards_can_be_named(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["a.1.png", "a.png", "a.caption", "a.sum"])
    (sample,) = read_all(path, image_key="1.png", caption_key=".caption", short_key="sum")
    assert (sample.image, sample.long, sample.short) == (picture(0), caption(2), caption(3))


def test_a_damaged_shard_is_named_where_its_index_still_fits(shard, caplog):
    write_index(shard.parent, {shard.name: 6})
    os.truncate(shard, headers(shard)[18])
    assert len(read_all(shard.parent)) == 6
    assert caplog.text.count(f"{shard}: cut off at byte") == 1


def test_shards_that_only_the_index_names_are_not_silent(tmp_path, caplog):
    folder = write_shards(tmp_path / "in", [2, 3])
    (folder / "s-01.tar").unlink()
    assert len(read_all(folder)) == 2
    assert "1 shards of its index are not there, the first is s-01.tar" in caplog.text


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("scenes:3", ["image_root", "image_key", "caption_key", "short_key"]),
        ("s.tar", ["image_root"]),
        ("folder", ["image_root", "image_key"]),
    ],
)
def test_fields_that_would_not_act_are_refused(tmp_path, monkeypatch, source, names):
    write_tar(tmp_path / "s.tar", ["a.png", "a.txt"])
    write_pair(tmp_path / "folder", "0.png")
    monkeypatch.chdir(tmp_path)
    for name in names:
        with pytest.raises(ValueError, match=rf"{name}='x' does not act on .*: leave it out, or null"):
            open_source(DataConfig.model_validate({"source": source, name: "x"}))


def test_samples_beyond_the_index_are_not_silent(tmp_path, caplog):
    folder = write_shards(tmp_path / "in", [5])
    index = json.loads((folder / "index.json").read_text())
    index["shardlist"][0]["nsamples"] = 3
    (folder / "index.json").write_text(json.dumps(index))
    assert len(read_all(folder)) == 3
    assert caplog.text.count("holds 5 samples, but only the 3 that its index counts are used") == 1


# -- the commands --------------------------------------------------------------------------------------------


def test_index_does_not_seal_a_loss(shard):
    os.truncate(shard, headers(shard)[18])
    message = error_of(run("data", "index", shard.parent))
    assert "no index was written, 1 of 1 shards are damaged: s-00.tar: cut off at byte" in message
    assert "fixclip data pack" in message
    assert not (shard.parent / "index.json").exists()


def test_check_shows_details_and_fails_where_nothing_can_be_used(tmp_path):
    manifest = write_manifest(tmp_path, 3)
    with manifest.open("a") as file:
        file.write('{"image": "[/b]absent.png", "long": "A b c."}\n{"image": "\\udce9.png", "long": "A b c."}\n')
    result = run("data", "check", manifest)
    assert result.exit_code == 0, result.output
    assert "detail" in result.output
    assert "there is no" in result.output
    assert "[/b]absent.png" in result.output
    message = error_of(run("data", "check", manifest, "--image-root", tmp_path / "elsewhere"), code=1)
    assert "not a single sample can be used: 5 missing_file" in message
    assert "is image_root what paths are relative to?" in message


def test_commands_take_the_names_of_columns(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0))
    table = write_table(tmp_path, "m.csv", f"filepath,title\n0.png,{caption(0)}\n")
    message = error_of(run("data", "check", table))
    assert "image_key=filepath caption_key=title" in message
    names = ["--image-key", "filepath", "--caption-key", "title"]
    assert "1 usable" in run("data", "check", table, *names).output
    assert "1 of 1 samples packed" in run("data", "pack", table, tmp_path / "out", *names).output


@pytest.mark.parametrize("existed", [False, True])
def test_a_pack_that_filters_out_everything_leaves_nothing_behind(tmp_path, existed):
    manifest = tmp_path / "m.jsonl"
    (tmp_path / "0.png").write_bytes(picture(0))
    manifest.write_text('{"image": "0.png", "long": "Too short."}\n' * 3)
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    message = error_of(run("data", "pack", manifest, out, "--shard-size", "2"))
    assert "3 too_short" in message
    assert "--min-words 8" in message
    assert "--no-filter" in message
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())
    assert "3 of 3 samples packed" in run("data", "pack", manifest, out, "--shard-size", "2", "--no-filter").output


def test_a_pack_that_found_something_is_kept(tmp_path):
    manifest = write_manifest(tmp_path / "in", 4)
    config = DataConfig(source=str(manifest))
    options = PackOptions(filters=CaptionFilters())
    pack(config, tmp_path / "out", options)
    before = contents(tmp_path / "out")
    assert pack(config, tmp_path / "out", options).written == 4
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"packed with caption_key=None, not 'long'"):
        pack(
            DataConfig(source=str(manifest), caption_key="long"),
            tmp_path / "out",
            PackOptions(filters=CaptionFilters()),
        )


def test_json_of_100_000_brackets_costs_one_sample(tmp_path):
    path = tmp_path / "s.tar"
    deep = b'{"long": ' + b"[" * 900 + b"]" * 900 + b"}"
    members = [("a.png", picture(0)), ("a.txt", caption(0).encode()), ("a.json", b"[" * 100_000)]
    members += [("b.png", picture(1)), ("b.txt", caption(1).encode()), ("b.json", deep)]
    members += [("c.png", picture(2)), ("c.json", deep)]
    add_to_tar(path, members)
    report = pack(DataConfig(source=str(path)), tmp_path / "out", PackOptions())
    assert [(skipped.key, skipped.reason) for skipped in report.skipped] == [("a", "wrong_type"), ("c", "wrong_type")]
    assert report.written == 1
