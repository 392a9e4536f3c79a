"""Zero-shot classification of a folder with one folder of images a class.

Shape letters: B batch, C classes, I images, E embedding width.
"""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fixclip_core.data.images import is_picture, is_system_file
from fixclip_core.evaluation.encoders import Encoder, Precision, autocast, encode_images
from fixclip_core.evaluation.items import PictureFiles
from fixclip_core.evaluation.report import skipped_report
from fixclip_core.evaluation.retrieval import TIE_RULE, TIE_TOLERANCE
from fixclip_core.files import parse_json


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
    with autocast(encoder.device, precision):
        class_EC = build_zero_shot_classifier(
            encoder.model, encoder.tokenizer, names, sentences, device=encoder.device, use_tqdm=True
        ).float()
    items = PictureFiles(paths, [[]] * len(paths), encoder.preprocess)
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
            "skipped": skipped_report(skipped),
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


def _class_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    from torchvision.datasets.folder import find_classes, make_dataset

    try:
        folders = [name for name in find_classes(folder)[0] if not is_system_file(name)]
        label_of = {name: label for label, name in enumerate(folders)}
        pairs = make_dataset(folder, label_of, is_valid_file=lambda path: is_picture(Path(path).name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: expected one folder of images a class there: {error}") from None
    return [Path(path) for path, _ in pairs], [label for _, label in pairs], folders


def read_classnames(path: Path) -> dict[str, str]:
    """A JSON object of class folder to class name.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        names = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
