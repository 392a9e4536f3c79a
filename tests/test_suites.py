"""The benchmarks' loaders, on small folders of the published layouts."""

import json

import pytest
from PIL import Image

from fixclip_core.evaluation import benchmarks as suites
from fixclip_core.evaluation.benchmarks import SUITES, load_benchmark


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def urban_1k(folder):
    for number in (221, 222, 30):
        picture(folder / "image" / f"{number}.jpg")
        write(folder / "caption" / f"{number}.txt", f"caption of {number}\nsecond line\n")
    return {f"image/{n}.jpg": [f"caption of {n}"] for n in (221, 222, 30)}


def sharegpt4v_1k(folder):
    items = []
    for number in range(1003):
        image = f"sam/images/sa_{number}.jpg"
        conversations = [{"from": "human", "value": "describe"}, {"from": "gpt", "value": f"caption {number}"}]
        items.append({"id": str(number), "image": image, "conversations": conversations})
    for item in items[:3]:
        picture(folder / item["image"])
    write(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", items)
    return {item["image"]: [f"caption {number}"] for number, item in enumerate(items[:3])}


def dci(folder):
    expected = {}
    for number in range(4):
        picture(folder / "photos" / f"sa_{number}.jpg")
        item = {
            "image": f"sa_{number}.jpg",
            "short_caption": f"short {number}",
            "extra_caption": "extra",
            "mask_data": {},
        }
        write(folder / "annotations" / f"sa_{number}-data.json", item)
        expected[f"photos/sa_{number}.jpg"] = [f"short {number}\nextra"]
    names = [f"sa_{number}-data.json" for number in range(4)]
    write(folder / "splits.json", {"train": names[:2], "valid": names[2:3], "test": names[3:]})
    return expected


def iiw(folder):
    entries = [
        ("IIW-400", {"image/key": "aar_test_04600"}, "docci_aar/aar_test_04600.jpg"),
        ("DCI_Test", {"image": "sa_7.jpg"}, "dci/sa_7.jpg"),
        ("DOCCI_Test", {"image": "test_00012"}, "docci/test_00012.jpg"),
    ]
    for name, keys, image in entries:
        picture(folder / image)
        write(folder / name / "data.jsonl", json.dumps({**keys, "IIW": f"dense {name}", "IIW-P5B": "machine"}) + "\n")
    return {image: [f"dense {name}"] for name, _, image in entries}


def docci(folder):
    rows = [("test_0.jpg", "test"), ("train_0.jpg", "train"), ("test_1.jpg", "test"), ("qual_dev_0.jpg", "qual_dev")]
    lines = [{"image_file": image, "split": split, "description": f"about {image}"} for image, split in rows]
    write(folder / "docci_descriptions.jsonlines", "\n".join(json.dumps(line) for line in lines))
    for image in ("test_0.jpg", "test_1.jpg"):
        picture(folder / "images" / image)
    return {f"images/{image}": [f"about {image}"] for image in ("test_0.jpg", "test_1.jpg")}


def coco(folder):
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (139, 285)]
    annotations = [
        {"id": 10 * k + image["id"], "image_id": image["id"], "caption": f"{image['id']} caption {k}"}
        for k in range(6)  # a few of COCO's images have more than five
        for image in images
    ]
    write(folder / "annotations" / "captions_val2017.json", {"images": images, "annotations": annotations})
    for image in images:
        picture(folder / "val2017" / image["file_name"])
    return {f"val2017/{i['file_name']}": [f"{i['id']} caption {k}" for k in range(5)] for i in images}


def flickr30k_all(folder):
    names = ["1000092795.jpg", "10002456.jpg", "1000268201.jpg"]
    lines = [f"{name}#{k}\tcaption {k} of {name} ." for name in names for k in range(5)]
    write(folder / "results_20130124.token", "\n".join(lines) + "\n")
    for name in names:
        picture(folder / "flickr30k-images" / name)
    return {f"flickr30k-images/{name}": [f"caption {k} of {name} ." for k in range(5)] for name in names}


def flickr30k_1k(folder):
    expected = flickr30k_all(folder)
    splits = {"1000092795.jpg": "train", "10002456.jpg": "test", "1000268201.jpg": "val"}
    write(
        folder / "dataset_flickr30k.json",
        {"images": [{"filename": name, "split": split, "sentences": []} for name, split in splits.items()]},
    )
    return {"flickr30k-images/10002456.jpg": expected["flickr30k-images/10002456.jpg"]}


LAYOUTS = {
    "urban-1k": urban_1k,
    "sharegpt4v-1k": sharegpt4v_1k,
    "dci": dci,
    "iiw": iiw,
    "docci": docci,
    "coco-val2017": coco,
    "flickr30k-1k": flickr30k_1k,
    "flickr30k-all": flickr30k_all,
}


def test_every_suite_has_a_layout_here():
    assert LAYOUTS.keys() == SUITES.keys()


@pytest.fixture(params=SUITES)
def small(request, tmp_path, monkeypatch):
    """A benchmark of a few images that counts as complete: name, folder, expected pairs."""
    expected = LAYOUTS[request.param](tmp_path)
    size = 1000 if request.param == "sharegpt4v-1k" else len(expected)
    suite = SUITES[request.param]
    monkeypatch.setitem(suites.SUITES, request.param, suites.Suite(suite.load, size, suite.protocol))
    return request.param, tmp_path, expected


def test_layout(small):
    name, folder, expected = small
    # 1,000 pictures would be slow: only the first of ShareGPT4V's exist here.
    benchmark = load_benchmark(name, folder, partial=name == "sharegpt4v-1k")
    found = {
        image.relative_to(folder).as_posix(): captions
        for image, captions in zip(benchmark.images, benchmark.captions, strict=True)
    }
    assert found == expected
    assert benchmark.protocol.startswith(SUITES[name].protocol)
    assert ("PARTIAL" in benchmark.protocol) == (name == "sharegpt4v-1k")


def test_a_missing_image_is_named(small):
    name, folder, expected = small
    image = folder / next(iter(expected))
    image.unlink()
    if len(expected) == 1:
        with pytest.raises(ValueError, match=f"none of the 1 images of {name} is there, e.g. {image}"):
            load_benchmark(name, folder, partial=True)
    else:
        assert len(load_benchmark(name, folder, partial=True).images) == len(expected) - 1
    with pytest.raises(ValueError, match=rf"{image} is missing \(\d+ of \d+ images of {name} are\)"):
        load_benchmark(name, folder)


def test_every_annotation_file_is_named_when_it_is_missing(small):
    name, folder, _ = small
    if name == "urban-1k":
        for path in (folder / "caption").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match=r"caption: no .txt files; expected Urban-1k's captions"):
            load_benchmark(name, folder)
        (folder / "caption").rmdir()
        with pytest.raises(ValueError, match=r"caption: no such folder; expected Urban-1k's captions"):
            load_benchmark(name, folder)
        return
    annotations = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".jsonlines", ".token")]
    assert annotations
    for path in annotations:
        content = path.read_text()
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path}: no such file; expected \w+"):
            load_benchmark(name, folder)
        path.write_text("{ broken")
        with pytest.raises(ValueError, match=str(path)):
            load_benchmark(name, folder)
        path.write_text(content)


def test_an_incomplete_benchmark_is_refused_or_labelled(tmp_path):
    urban_1k(tmp_path)
    with pytest.raises(ValueError, match="lists 3 images, but urban-1k has 1000"):
        load_benchmark("urban-1k", tmp_path)
    assert "PARTIAL: 3 of 1000 images, not comparable" in load_benchmark("urban-1k", tmp_path, partial=True).protocol


def test_wrong_names_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"'urban1k': did you mean 'urban-1k'\? Known are urban-1k, sharegpt4v-1k"):
        load_benchmark("urban1k", tmp_path)
    with pytest.raises(ValueError, match="no such folder; expected dci there"):
        load_benchmark("dci", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("urban-1k", "caption/221.txt", "\n", "221.txt: the first line"),
        ("sharegpt4v-1k", "share-captioner_coco_lcs_sam_1246k_1107.json", [{"image": "a.jpg"}], "entry 0 has no"),
        ("dci", "annotations/sa_1-data.json", {"image": "sa_1.jpg", "short_caption": "a"}, "no `extra_caption`"),
        ("dci", "splits.json", ["sa_1-data.json"], "not laid out like those of dci"),
        ("coco-val2017", "annotations/captions_val2017.json", {"images": [{}], "annotations": []}, "KeyError"),
        ("iiw", "DCI_Test/data.jsonl", {"IIW": "a"}, r"data.jsonl:1: no `image`"),
        ("iiw", "IIW-400/data.jsonl", {"image/key": "a", "IIW-P5B": "a"}, "no `IIW`"),
        ("docci", "docci_descriptions.jsonlines", '{"split": "test"}\n', r"jsonlines:1: no `image_file`"),
        ("docci", "docci_descriptions.jsonlines", "[1]\n", r"jsonlines:1: no `split`"),
        ("coco-val2017", "annotations/captions_val2017.json", [], "no `images`"),
        (
            "coco-val2017",
            "annotations/captions_val2017.json",
            {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "a"}]},
            "image 7 has 1 captions, not 5",
        ),
        ("flickr30k-all", "results_20130124.token", "a.jpg#0 no tab", r"token:1: expected NAME.jpg#NUMBER"),
        (
            "flickr30k-1k",
            "dataset_flickr30k.json",
            {"images": [{"filename": "x.jpg", "split": "test"}]},
            "no captions of x.jpg",
        ),
    ],
)
def test_malformed_annotations(tmp_path, name, file, content, message):
    LAYOUTS[name](tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, tmp_path)
