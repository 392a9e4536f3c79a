"""Data sets that Hugging Face's `datasets` has saved to disk: one folder of a split, read with pyarrow."""

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import BadSampleError, Sample
from fixclip_core.data.sources.manifest import find_columns, import_pyarrow, is_plain
from fixclip_core.data.sources.rows import read_file, stamp
from fixclip_core.files import parse_json


def is_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made the folder."""
    is_split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_split or (folder / "dataset_dict.json").is_file()


class ArrowSource:
    """Rows of the .arrow files of a saved split, mapped into memory and never loaded as a whole.

    The image column holds encoded pictures (the feature `Image`) or paths relative to `image_root` or the folder.
    """

    remote = False

    def __init__(self, folder: Path, config: DataConfig, captioned: bool = True) -> None:
        """Raises ValueError: it holds several splits, cannot be read, or lacks the columns."""
        self.folder = folder
        self.root = Path(config.image_root).expanduser() if config.image_root else folder
        self.files = _data_files(folder)
        self._tables: dict[int, Any] = {}
        self.sizes: Sequence[int] = [self._table(number).num_rows for number in range(len(self.files))]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        found = list(self._table(0).column_names) if self.files else []
        self.columns = find_columns(str(folder), found, config, captioned, hugging_face=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _table(self, number: int) -> Any:
        if number not in self._tables:
            pyarrow = import_pyarrow(self.folder)
            try:
                mapped = pyarrow.memory_map(str(self.files[number]))
                self._tables[number] = pyarrow.ipc.open_stream(mapped).read_all()
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"{self.files[number]}: cannot be read: {error}") from None
        return self._tables[number]

    def read(self, index: int) -> Sample:
        number = bisect.bisect_right(self.starts, index) - 1
        row = self._table(number).slice(index - self.starts[number], 1).to_pylist()[0]
        file, image = f"{self.files[number]}:{index - self.starts[number]}", row.get(self.columns.image)
        path = image.get("path") if isinstance(image, dict) else image
        key = path if isinstance(path, str) and path else str(index)
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            data = self._picture(path, file, key)
        extra = {name: value for name, value in row.items() if name not in self.columns.known and is_plain(value)}
        return Sample(file, key, data, row.get(self.columns.long), row.get(self.columns.short), extra)

    def _picture(self, path: Any, file: str, key: str) -> bytes:
        if not isinstance(path, str) or not path:
            raise BadSampleError("wrong_type", file, key, f"{self.columns.image} holds neither a picture nor a path")
        return read_file(self.root / path, file, key)

    def fingerprint(self, index: int) -> str:
        number = bisect.bisect_right(self.starts, index) - 1
        return json.dumps([str(self.files[number]), index - self.starts[number], stamp(self.files[number])])


def _data_files(folder: Path) -> list[Path]:
    """The .arrow files of a saved split, in the order of its rows."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = parse_json((folder / "dataset_dict.json").read_bytes())["splits"]
            raise ValueError(f"{folder}: it holds the splits {', '.join(splits)}: give the folder of one of them")
        state = parse_json((folder / "state.json").read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a data set that `datasets` has saved: {error!r}") from None
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder}: its rows are chosen by an index: save `dataset.flatten_indices()` instead")
    return [folder / name for name in names]
