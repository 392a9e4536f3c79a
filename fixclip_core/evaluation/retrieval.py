"""Numbers for a CLIP: retrieval in both directions and zero-shot classification.

Shape letters: I images, T texts, E embedding width.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fixclip_core.data.samples import BadSampleError, Sample, Skipped, check_captions, decode_image
from fixclip_core.data.sources import Source
from fixclip_core.evaluation.benchmarks import Benchmark

# Cosines closer than this are one score: float32 matrix products of other block sizes differ by less.
TIE_TOLERANCE = 1e-6
TIE_RULE = "a tie counts against the match; cosines within 1e-6 are ties"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["fp32", "bf16", "fp16"]


@torch.no_grad()
def retrieval_metrics(
    image_features_IE: Tensor,
    text_features_TE: Tensor,
    text_to_image: Tensor | Sequence[int],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 4096,
    progress: bool = False,
) -> dict[str, float]:
    """Recall at k from images to texts and from texts to images, by cosine similarity.

    An image is found at rank 1 + (texts of other images that score at least as high as its best text), a text
    at rank 1 + (other images that score at least as high as its own). A tie thus counts against the match, so
    an encoder that maps everything to one point scores 0, not 1; scores within 1e-6 are ties. Images may have
    any number of texts, at least one each. Memory beyond the features is one block of chunk_size squared.

    Args:
        image_features_IE: (I, E) on any device; need not be normalised.
        text_features_TE: (T, E) on the same device.
        text_to_image: (T,) index of each text's image.
        ks: the ranks to report.
        chunk_size: rows and columns of a block of scores.
        progress: show a bar.

    Returns:
        "image_to_text_recall_at_K" and "text_to_image_recall_at_K" for every K, as fractions of 1.

    Raises:
        ValueError: shapes that do not fit, an index outside the images, an image without a text, or features
            that are not finite (their ranks would look perfect).
    """
    text_to_image_T = torch.as_tensor(text_to_image, device=image_features_IE.device)
    _check_retrieval_input(image_features_IE, text_features_TE, text_to_image_T)
    image_IE = F.normalize(image_features_IE.float(), dim=-1)
    text_TE = F.normalize(text_features_TE.float(), dim=-1)
    starts_T = range(0, len(text_TE), chunk_size)
    own_score_T = torch.cat(
        [(text_TE[s : s + chunk_size] * image_IE[text_to_image_T[s : s + chunk_size]]).sum(-1) for s in starts_T]
    )
    best_score_I = own_score_T.new_full((len(image_IE),), -torch.inf)
    best_score_I.scatter_reduce_(0, text_to_image_T, own_score_T, "amax")

    rank_I = torch.ones(len(image_IE), dtype=torch.long, device=image_IE.device)
    rank_T = torch.ones(len(text_TE), dtype=torch.long, device=image_IE.device)
    for i in tqdm(range(0, len(image_IE), chunk_size), desc="ranking", disable=not progress):
        images = slice(i, i + chunk_size)
        index_I1 = torch.arange(i, min(i + chunk_size, len(image_IE)), device=image_IE.device)[:, None]
        for t in starts_T:
            texts = slice(t, t + chunk_size)
            score_IT = image_IE[images] @ text_TE[texts].T + TIE_TOLERANCE
            foreign_IT = text_to_image_T[texts] != index_I1
            rank_I[images] += ((score_IT >= best_score_I[images, None]) & foreign_IT).sum(1)
            rank_T[texts] += ((score_IT >= own_score_T[texts]) & foreign_IT).sum(0)
    return {
        f"{direction}_recall_at_{k}": (rank <= k).double().mean().item()
        for direction, rank in (("image_to_text", rank_I), ("text_to_image", rank_T))
        for k in ks
    }


def _check_retrieval_input(image_IE: Tensor, text_TE: Tensor, text_to_image_T: Tensor) -> None:
    if image_IE.ndim != 2 or text_TE.ndim != 2 or image_IE.shape[1] != text_TE.shape[1]:
        raise ValueError(
            f"features must be (images, width) and (texts, width) of one width, got {tuple(image_IE.shape)} "
            f"and {tuple(text_TE.shape)}"
        )
    if text_to_image_T.shape != text_TE.shape[:1] or text_to_image_T.is_floating_point():
        raise ValueError(f"text_to_image must be {len(text_TE)} whole numbers, one for each text")
    if len(image_IE) == 0 or len(text_TE) == 0:
        raise ValueError("retrieval needs at least one image and one text")
    if text_to_image_T.min() < 0 or text_to_image_T.max() >= len(image_IE):
        raise ValueError(f"text_to_image points outside the {len(image_IE)} images")
    counts_I = torch.bincount(text_to_image_T, minlength=len(image_IE))
    if (counts_I == 0).any():
        raise ValueError(f"image {int((counts_I == 0).nonzero()[0])} has no text")
    for name, features in (("image", image_IE), ("text", text_TE)):
        if not features.isfinite().all():
            raise ValueError(f"{name} features hold nan or inf")


# --- encoders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A CLIP of any kind, ready to encode.

    Attributes:
        model: has `encode_image` and `encode_text` with `normalize=True`, in evaluation mode.
        tokenizer: list of strings to ids, (T, context_length).
        preprocess: PIL image to (C, H, W).
        source, format: where it came from and what it was recognised as.
        context_length: tokens it reads.
        resolution: pixels of its images' sides.
        device: where it runs.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    source: str
    format: str
    context_length: int
    resolution: int | tuple[int, int]
    device: torch.device

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "format": self.format,
            "context_length": self.context_length,
            "resolution": self.resolution,
        }


def load_encoder(
    source: str | Path,
    *,
    model_name: str | None = None,
    pretrained: str | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Load a CLIP to evaluate, as it is: nothing is stretched or added.

    Args:
        source: a FixClip folder, anything that `convert.read_clip` knows, or an open_clip model name or
            "hf-hub:" address, which may be downloaded.
        model_name: see `convert.read_clip`.
        pretrained: open_clip's weight tag, for an open_clip model name.
        device: where to run.

    Raises:
        ValueError: nothing of that name, or see `convert.read_clip`.
    """
    import open_clip

    from fixclip_core.model.fixclip import FixClip
    from fixclip_core.weights.read import build_clip, find_fixclip, read_clip

    name, device = str(source), torch.device(device)
    preprocess: dict[str, Any]
    if folder := find_fixclip(source):
        fixclip = FixClip.from_pretrained(folder).to(device).eval()
        tokenizer, transform = fixclip.tokenizer(), fixclip.preprocess(train=False)
        length, preprocess = int(fixclip.config.context_length or 0), fixclip.config.preprocess
        size = preprocess.get("size", fixclip.config.clip["vision_cfg"].get("image_size", 224))
        return _checked(Encoder(fixclip, tokenizer, transform, name, "FixClip", length, size, device))
    if name.startswith("hf-hub:") or (not Path(source).exists() and name in open_clip.list_models()):
        if pretrained is None and not name.startswith("hf-hub:"):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(f"{name} is an open_clip model name: choose its weights with --pretrained ({tags})")
        try:
            clip, transform = open_clip.create_model_from_pretrained(name, pretrained=pretrained)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"open_clip model {name!r}, {pretrained!r}: {error}") from error
        size = open_clip.get_model_preprocess_cfg(clip)["size"]
        tokenizer, length = open_clip.get_tokenizer(name), int(clip.context_length)
        return _checked(Encoder(clip.to(device).eval(), tokenizer, transform, name, "open_clip", length, size, device))
    checkpoint = read_clip(source, model_name)
    preprocess = checkpoint.preprocess
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), is_train=False)
    length = checkpoint.context_length
    tokenizer_name = checkpoint.model_config["text_cfg"].get("hf_tokenizer_name")
    tokenizer = (
        open_clip.tokenizer.HFTokenizer(tokenizer_name, context_length=length)
        if tokenizer_name
        else open_clip.SimpleTokenizer(context_length=length)
    )
    clip = build_clip(checkpoint).to(device)
    return _checked(Encoder(clip, tokenizer, transform, name, checkpoint.format, length, preprocess["size"], device))


def _checked(encoder: Encoder) -> Encoder:
    """Refuse a tokenizer whose ids the model has no embeddings for, instead of an index error later."""
    sizes = [m.num_embeddings for name, m in encoder.model.named_modules() if name.endswith("token_embedding")]
    highest = int(encoder.tokenizer([""]).max())
    if sizes and highest >= sizes[0]:
        raise ValueError(
            f"{encoder.source}: the model has embeddings for {sizes[0]} tokens, but CLIP's tokenizer gives ids up to "
            f"{highest}; put the model's own tokenizer files into its folder"
        )
    return encoder


# --- features --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One sample: its image (None if it could not be used), captions, and what tells its image from others."""

    image: Tensor | None
    captions: list[str]
    identity: str
    skipped: Skipped | None = None


class SourceItems(Dataset[Item]):
    """Samples of a data source; rows with the very same picture count as one image with several captions.

    Args:
        source: the data, see `data.open_source`.
        preprocess: PIL image to (C, H, W).
        caption: which caption to retrieve by.
        start, stop: samples start..stop-1 alone.

    Raises:
        ValueError: the source has fewer samples.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Callable[[Any], Tensor],
        caption: Literal["long", "short"] = "long",
        start: int = 0,
        stop: int | None = None,
    ):
        self.source, self.preprocess, self.caption = source, preprocess, caption
        total = sum(source.sizes)
        self.indices = range(start, total if stop is None else stop)
        if not self.indices or self.indices.stop > total:
            raise ValueError(f"samples {start} to {stop}: the data has {total}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        try:
            sample = self.source.read(self.indices[index])
            long, short = check_captions(sample)
            text = long if self.caption == "long" else short
            if text is None:
                raise BadSampleError("no_short_caption", sample.file, sample.key)
            image = self.preprocess(decode_image(sample))
        except BadSampleError as error:
            return Item(None, [], "", error.skipped)
        content = sample.image.numpy().tobytes() if isinstance(sample.image, Tensor) else sample.image
        return Item(image, [text], hashlib.blake2b(content, digest_size=16).hexdigest())


class BenchmarkItems(Dataset[Item]):
    """The images of a benchmark, each with all of its captions; each file counts as an image of its own."""

    def __init__(self, benchmark: Benchmark, preprocess: Callable[[Any], Tensor]):
        self.benchmark, self.preprocess = benchmark, preprocess

    def __len__(self) -> int:
        return len(self.benchmark.images)

    def __getitem__(self, index: int) -> Item:
        return _read_picture(self.benchmark.images[index], self.benchmark.captions[index], self.preprocess)


def _read_picture(path: Path, captions: list[str], preprocess: Callable[[Any], Tensor]) -> Item:
    try:
        sample = Sample(str(path), path.name, path.read_bytes(), "", None)
        return Item(preprocess(decode_image(sample)), captions, str(path))
    except BadSampleError as error:
        return Item(None, [], str(path), error.skipped)
    except OSError as error:
        return Item(None, [], str(path), Skipped("unreadable", str(path), path.name, str(error.strerror)))


@dataclass
class Features:
    """Encoded images (I, E) and texts (T, E); `cut_texts` counts texts that fill the context, probably cut off."""

    image: Tensor
    text: Tensor
    text_to_image: list[int]
    cut_texts: int
    skipped: list[Skipped] = field(default_factory=list)


@torch.no_grad()
def encode_dataset(
    encoder: Encoder, items: Dataset[Item], *, batch_size: int = 64, workers: int = 0, precision: Precision = "fp32"
) -> Features:
    """Encode every image once and every caption.

    Raises:
        ValueError: no sample could be used.
    """
    index_of: dict[str, int] = {}
    texts: list[str] = []
    text_to_image: list[int] = []
    skipped: list[Skipped] = []
    features: list[Tensor] = []
    loader = DataLoader(items, batch_size, num_workers=workers, collate_fn=list)
    for batch in tqdm(loader, desc="images", unit="batch"):
        fresh = []
        for item in batch:
            if item.skipped is not None:
                skipped.append(item.skipped)
                continue
            if item.identity not in index_of:
                index_of[item.identity] = len(index_of)
                fresh.append(item.image)
            texts += item.captions
            text_to_image += [index_of[item.identity]] * len(item.captions)
        if fresh:
            features.append(encode_images(encoder, torch.stack(fresh), precision))
    if not features:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).items())
        raise ValueError(f"no sample could be used ({reasons or 'there are none'})")
    text_TE, cut_texts = encode_texts(encoder, texts, batch_size, precision)
    return Features(torch.cat(features), text_TE, text_to_image, cut_texts, skipped)


@torch.no_grad()
def encode_images(encoder: Encoder, image_BCHW: Tensor, precision: Precision = "fp32") -> Tensor:
    """Normalised float32 features, (B, E), on the encoder's device."""
    with _autocast(encoder.device, precision):
        return encoder.model.encode_image(image_BCHW.to(encoder.device), normalize=True).float()


@torch.no_grad()
def encode_texts(
    encoder: Encoder, texts: Sequence[str], batch_size: int = 64, precision: Precision = "fp32"
) -> tuple[Tensor, int]:
    """Normalised float32 features, (T, E), and how many texts fill the whole context."""
    features, cut = [], 0
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", unit="batch"):
        ids_BT = encoder.tokenizer(list(texts[start : start + batch_size]))
        # The end token has the highest id; where it is the last one, the text was cut or just fits.
        cut += int((ids_BT.argmax(dim=-1) == ids_BT.shape[1] - 1).sum())
        with _autocast(encoder.device, precision):
            features.append(encoder.model.encode_text(ids_BT.to(encoder.device), normalize=True).float())
    return torch.cat(features), cut


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


# --- reports ---------------------------------------------------------------------------------------------


def retrieval_report(
    encoder: Encoder,
    items: SourceItems | BenchmarkItems,
    name: str,
    protocol: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Encode, rank, and say under which protocol: everything that a figure needs to be compared.

    Raises:
        ValueError: no sample could be used, or an image of a benchmark is damaged.
    """
    features = encode_dataset(encoder, items, batch_size=batch_size, workers=workers, precision=precision)
    if features.skipped and isinstance(items, BenchmarkItems):
        first = features.skipped[0]
        raise ValueError(
            f"{first.file}: {first.reason} {first.detail} ({len(features.skipped)} damaged images in {name}; a "
            "benchmark is evaluated whole or not at all)"
        )
    metrics = retrieval_metrics(features.image, features.text, features.text_to_image, progress=True)
    counts = Counter(Counter(features.text_to_image).values())
    return {
        "model": encoder.describe(),
        "data": {
            "name": name,
            "protocol": protocol,
            "images": len(features.image),
            "texts": len(features.text),
            "captions_per_image": sorted(counts),
            "texts_that_fill_the_context": features.cut_texts,
            "skipped": _skipped_report(features.skipped),
        },
        "precision": precision,
        "tie_rule": TIE_RULE,
        "metrics": metrics,
    }


def classification_report(
    encoder: Encoder,
    folder: str | Path,
    *,
    templates: Literal["openai", "simple"] = "openai",
    classnames: dict[str, str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Zero-shot classification of a folder with one folder of images a class, with open_clip's templates.

    A class is called what its folder is called, "_" read as a blank, unless `classnames` says otherwise; the
    1,000 folders of ImageNet (n01440764, ...) get open_clip's names. A class that scores exactly as the right
    one counts before it.

    Args:
        encoder: the model.
        folder: FOLDER/CLASS/IMAGE.
        templates: "openai" (80 sentences) or "simple" (7).
        classnames: folder name to class name.

    Raises:
        ValueError: no class folders, a class without images, or a class name for a folder that is not there.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES, build_zero_shot_classifier

    paths, labels, folders = _class_folders(Path(folder))
    names = _class_names(folders, classnames)
    sentences = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}[templates]
    with _autocast(encoder.device, precision):
        class_EC = build_zero_shot_classifier(
            encoder.model, encoder.tokenizer, names, sentences, device=encoder.device, use_tqdm=True
        ).float()
    items = _Pictures(paths, encoder.preprocess)
    skipped, ranks, kept_labels = [], [], []
    for start, batch in enumerate(
        tqdm(DataLoader(items, batch_size, num_workers=workers, collate_fn=list), desc="images")
    ):
        good = [index for index, item in enumerate(batch) if item.skipped is None]
        skipped += [item.skipped for item in batch if item.skipped is not None]
        if not good:
            continue
        label_B = torch.tensor([labels[start * batch_size + index] for index in good], device=encoder.device)
        score_BC = encode_images(encoder, torch.stack([batch[index].image for index in good]), precision) @ class_EC
        ranks.append(rank_of_label(score_BC, label_B).cpu())
        kept_labels.append(label_B.cpu())
    if not ranks:
        raise ValueError(f"{folder}: none of the {len(paths)} images can be read")
    rank_I, label_I = torch.cat(ranks), torch.cat(kept_labels)
    first = (rank_I == 1).double()
    per_class = [first[label_I == label].mean() for label in label_I.unique()]
    return {
        "model": encoder.describe(),
        "data": {
            "name": str(folder),
            "protocol": f"zero-shot classification, {len(sentences)} templates of open_clip ({templates})",
            "images": len(rank_I),
            "classes": len(folders),
            "skipped": _skipped_report(skipped),
        },
        "precision": precision,
        "tie_rule": TIE_RULE,
        "metrics": {
            "top_1_accuracy": first.mean().item(),
            "top_5_accuracy": (rank_I <= 5).double().mean().item(),
            "mean_per_class_accuracy": torch.stack(per_class).mean().item(),
        },
    }


def rank_of_label(score_BC: Tensor, label_B: Tensor) -> Tensor:
    """Rank of the right class of each row, (B,): 1 + classes that score at least as high."""
    own_B1 = score_BC.gather(1, label_B[:, None])
    return (score_BC + TIE_TOLERANCE >= own_B1).sum(1)


class _Pictures(Dataset[Item]):
    def __init__(self, paths: list[Path], preprocess: Callable[[Any], Tensor]):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return _read_picture(self.paths[index], [], self.preprocess)


def _class_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        folders, label_of = find_classes(folder)
        pairs = make_dataset(folder, label_of, extensions=IMG_EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: expected one folder of images a class there: {error}") from None
    return [Path(path) for path, _ in pairs], [label for _, label in pairs], folders


def read_classnames(path: Path) -> dict[str, str]:
    """A JSON object of class folder to class name.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable JSON: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path}: expected an object of class folder to class name")
    return names


def _class_names(folders: list[str], classnames: dict[str, str] | None) -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    if classnames is not None:
        unknown = classnames.keys() - set(folders)
        missing = set(folders) - classnames.keys()
        if unknown or missing:
            kind = f"folder {min(missing)!r} has no name" if missing else f"there is no folder {min(unknown)!r}"
            raise ValueError(f"class names: {kind}")
        return [classnames[name] for name in folders]
    if len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return list(IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in folders]


def _skipped_report(skipped: list[Skipped], first: int = 20) -> dict[str, Any]:
    return {
        "count": len(skipped),
        "reasons": dict(Counter(item.reason for item in skipped)),
        "first": [asdict(item) for item in skipped[:first]],
    }


def format_table(report: dict[str, Any]) -> str:
    """The report as a few lines for a terminal."""
    model, data, metrics = report["model"], report["data"], report["metrics"]
    lines = [
        f"model  {model['source']} ({model['format']}, {model['context_length']} tokens, {model['resolution']} px)",
        f"data   {data['name']}: {data['protocol']}",
    ]
    counts = [f"{data[key]} {key}" for key in ("images", "texts", "classes") if key in data]
    if data.get("texts_that_fill_the_context"):
        counts.append(f"{data['texts_that_fill_the_context']} of them fill the context")
    if data["skipped"]["count"]:
        counts.append(f"{data['skipped']['count']} samples skipped")
    lines += [f"       {', '.join(counts)}", ""]
    ks = [key.rsplit("_", 1)[1] for key in metrics if key.startswith("image_to_text_recall_at_")]
    if not ks:
        return "\n".join(lines + [f"{key:<26}{100 * value:7.2f}" for key, value in metrics.items()])
    lines.append(" " * 14 + "".join(f"{'R@' + k:>8}" for k in ks))
    for direction in ("image_to_text", "text_to_image"):
        values = [metrics[f"{direction}_recall_at_{k}"] for k in ks]
        lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{100 * value:8.2f}" for value in values))
    return "\n".join(lines)


def write_json(report: Any, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
