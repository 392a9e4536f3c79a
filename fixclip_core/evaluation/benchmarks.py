"""The retrieval benchmarks that long-text CLIPs are compared on, read in the layouts they are published in.

Scores of one benchmark differ between papers by split, number of captions and context length, so every
benchmark carries its protocol with it, and an incomplete folder is an error rather than a better score.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fixclip_core.data.images import is_system_file
from fixclip_core.data.sources.manifest import jsonl_items
from fixclip_core.files import parse_json

# What a loader yields: an image file and its captions.
Pair = tuple[Path, list[str]]


@dataclass(frozen=True)
class Benchmark:
    """Image files with their captions, and how they were chosen.

    Attributes:
        name: one of SUITES.
        protocol: the split and the captions used, in words.
        images: image files, each once.
        captions: the captions of each image.
    """

    name: str
    protocol: str
    images: list[Path]
    captions: list[list[str]]


@dataclass(frozen=True)
class Suite:
    """How to read a benchmark: a loader of a folder's pairs, their number, and the protocol in words."""

    load: Callable[[Path], Iterator[Pair]]
    num_images: int
    protocol: str


def load_benchmark(name: str, folder: str | Path, partial: bool = False) -> Benchmark:
    """Read a benchmark.

    Args:
        name: one of SUITES.
        folder: where it was unpacked.
        partial: take the images that are there, and say so in the protocol, instead of refusing.

    Raises:
        ValueError: an unknown name, or a file that is missing or malformed; the message says which one and where
            it was expected.
    """
    if name not in SUITES:
        near = get_close_matches(name, SUITES, n=1, cutoff=0.0)
        raise ValueError(f"benchmark {name!r}: did you mean {near[0]!r}? Known are {', '.join(SUITES)}")
    suite, folder = SUITES[name], Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected {name} there")
    try:
        pairs = list(suite.load(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: an annotation file is not laid out like those of {name}: {error!r}") from None
    there = [(image, captions) for image, captions in pairs if image.is_file()]
    protocol = suite.protocol
    if partial:
        if not there:
            raise ValueError(f"{folder}: none of the {len(pairs)} images of {name} is there, e.g. {pairs[0][0]}")
        if len(there) < suite.num_images:
            protocol += f"; PARTIAL: {len(there)} of {suite.num_images} images, not comparable"
    elif len(there) < len(pairs):
        missing = next(image for image, _ in pairs if not image.is_file())
        raise ValueError(f"{missing} is missing ({len(pairs) - len(there)} of {len(pairs)} images of {name} are)")
    elif len(pairs) != suite.num_images:
        raise ValueError(
            f"{folder} lists {len(pairs)} images, but {name} has {suite.num_images}; allow a partial benchmark to "
            "evaluate these alone"
        )
    return Benchmark(name, protocol, [image for image, _ in there], [captions for _, captions in there])


# --- one loader each -------------------------------------------------------------------------------------


def _urban_1k(folder: Path) -> Iterator[Pair]:
    texts = _folder(folder / "caption", "Urban-1k's captions, one .txt an image").glob("*.txt")
    captions = sorted(path for path in texts if not is_system_file(path.name))
    if not captions:
        raise ValueError(f"{folder / 'caption'}: no .txt files; expected Urban-1k's captions, one an image")
    for path in captions:
        lines = _text(path).splitlines()
        if not lines or not lines[0].strip():
            raise ValueError(f"{path}: the first line, Urban-1k's caption, is empty")
        yield folder / "image" / f"{path.stem}.jpg", [lines[0]]


def _sharegpt4v_1k(folder: Path) -> Iterator[Pair]:
    path = _file(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", "ShareGPT4V's captions")
    for number, item in enumerate(_json(path)[:1000]):
        try:
            image, caption = item["image"], item["conversations"][1]["value"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{path}: entry {number} has no `image` or no `conversations[1].value`") from None
        yield folder / image, [caption]


def _dci(folder: Path) -> Iterator[Pair]:
    splits = _file(folder / "splits.json", "DCI's lists of annotation files")
    for name in (name for names in _json(splits).values() for name in names):
        path = _file(folder / "annotations" / name, f"an annotation of DCI that {splits} lists")
        item = _json(path)
        _require(item, ("image", "short_caption", "extra_caption"), path)
        yield folder / "photos" / item["image"], [f"{item['short_caption']}\n{item['extra_caption']}"]


def _iiw(folder: Path) -> Iterator[Pair]:
    for name, images in (("IIW-400", "docci_aar"), ("DCI_Test", "dci"), ("DOCCI_Test", "docci")):
        for place, item in _json_lines(_file(folder / name / "data.jsonl", f"the descriptions of {name}")):
            image = item.get("image", item.get("image/key"))
            if not isinstance(image, str):
                raise ValueError(f"{place}: no `image` or `image/key`")
            _require(item, ("IIW",), place)
            yield folder / images / (image if image.endswith(".jpg") else f"{image}.jpg"), [item["IIW"]]


def _docci(folder: Path) -> Iterator[Pair]:
    for place, item in _json_lines(_file(folder / "docci_descriptions.jsonlines", "DOCCI's descriptions")):
        _require(item, ("split", "image_file", "description"), place)
        if item["split"] == "test":
            yield folder / "images" / item["image_file"], [item["description"]]


def _coco(folder: Path) -> Iterator[Pair]:
    path = _file(folder / "annotations" / "captions_val2017.json", "COCO's captions")
    content = _json(path)
    _require(content, ("images", "annotations"), path)
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        if len(captions[image["id"]]) < 5:
            raise ValueError(f"{path}: image {image['id']} has {len(captions[image['id']])} captions, not 5")
        yield folder / "val2017" / image["file_name"], captions[image["id"]][:5]


def _flickr30k_all(folder: Path) -> Iterator[Pair]:
    path = _file(folder / "results_20130124.token", "Flickr30k's captions")
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(_text(path).splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise ValueError(f"{path}:{number}: expected NAME.jpg#NUMBER, a tab and a caption, got {line[:80]!r}")
        captions[name.rpartition("#")[0]].append(caption)
    for name in captions:
        yield folder / "flickr30k-images" / name, captions[name]


def _flickr30k_1k(folder: Path) -> Iterator[Pair]:
    path = _file(folder / "dataset_flickr30k.json", "Karpathy's splits of Flickr30k")
    content = _json(path)
    _require(content, ("images",), path)
    test = {item["filename"] for item in content["images"] if item.get("split") == "test"}
    found = [pair for pair in _flickr30k_all(folder) if pair[0].name in test]
    if len(found) < len(test):
        missing = min(test - {image.name for image, _ in found})
        raise ValueError(f"{folder / 'results_20130124.token'} has no captions of {missing}, a test image of {path}")
    yield from found


SUITES = {
    "urban-1k": Suite(_urban_1k, 1000, "all images, 1 caption each"),
    "sharegpt4v-1k": Suite(
        _sharegpt4v_1k, 1000, "first 1,000 entries, held out of Long-CLIP's training, 1 caption each"
    ),
    "dci": Suite(_dci, 7805, "all splits, 1 caption each: short and extra caption joined"),
    "iiw": Suite(_iiw, 612, "IIW-400, DCI-Test and DOCCI-Test together, 1 caption each: the human one"),
    "docci": Suite(_docci, 5000, "test split, 1 caption each"),
    "coco-val2017": Suite(_coco, 5000, "val2017, the first 5 captions each"),
    "flickr30k-1k": Suite(_flickr30k_1k, 1000, "Karpathy's 1k test split, 5 captions each"),
    "flickr30k-all": Suite(_flickr30k_all, 31783, "all 31,783 images (not the 1k test split), 5 captions each"),
}


# --- reading with errors that name the place -------------------------------------------------------------


def _file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {what} there")
    return path


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected {what} there")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, item in jsonl_items(path):
        yield f"{path}:{number}", item


def _require(item: Any, keys: tuple[str, ...], place: object) -> None:
    missing = [key for key in keys if not isinstance(item, dict) or key not in item]
    if missing:
        raise ValueError(f"{place}: no `{missing[0]}`")
