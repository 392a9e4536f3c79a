"""A captioning job on disk: what is to be asked, what was answered, and the shards or manifest made of it.

    OUT/shard-000000.tar ...       samples with captions (or OUT is one .jsonl manifest)
    OUT/index.json, report.json    as `fixclip data pack` writes them
    OUT/.caption/options.json      what the answers depend on
    OUT/.caption/shard-000000.jsonl   a journal: every answer, a line each, written the moment it came
    OUT/.caption/shard-000000.json    the record of a finished shard

Shard i is made of samples i*shard_size .. (i+1)*shard_size - 1 and depends on no other. Its content follows from the
answers in its journal, in whatever order they came and whichever driver asked for them, so an interrupted job goes on
where it was, and a changed filter needs no new answers.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import sample_range
from fixclip_core.data.samples import Sample
from fixclip_core.data.sources import open_source
from fixclip_core.data.sources.rows import RowSource
from fixclip_core.data.sources.shards import write_index
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.journal import Task
from fixclip_core.synthesis.prompts import Prompt, choose_prompt
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.synthesis.request import request

# Why a sample got no answer: nothing that the sample can help, so the next run asks again.
FAILURES = frozenset(
    ["no_connection", "timeout", "rate_limited", "server_error", "refused_request", "bad_answer", "no_answer"]
)
_LOCK_SECONDS = 5


class RequestFailedError(Exception):
    """One request got no usable answer, after all retries; `.reason` is one of `FAILURES`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Job:
    """What to caption, and the folder that keeps what came of it.

    Args:
        config: source, image_root, start and stop; captions that are there are not read.
        out: a folder for shards, or a .jsonl file for a manifest; new, or of the same job.
        recipe: what is asked and which answers are kept.
        model: the multimodal model, as its server calls it.

    Raises:
        ValueError: the source is malformed, `out` holds something else or other answers, or cannot be written.
    """

    def __init__(self, config: DataConfig, out: Path, recipe: CaptionRecipe, model: str) -> None:
        self.config, self.out, self.recipe, self.model = config, out, recipe, model
        self.as_manifest = out.suffix == ".jsonl"
        self.state = out.with_name(f".{out.name}.caption") if self.as_manifest else out / ".caption"
        self.source = open_source(config, captioned=False)
        self.samples = sample_range(self.source.sizes, config)
        self._reading = threading.Lock()
        self._prompts = {prompt.id: prompt for kind in ("long", "short") for prompt in recipe.prompts_of(kind)}
        if self.as_manifest and not isinstance(self.source, RowSource):
            raise ValueError(f"{out}: the images of {config.source!r} are no files of their own; give a folder instead")
        if not self.state.exists() and out.exists() and (self.as_manifest or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not from a captioning job; choose another name")
        self._create()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reading"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reading = threading.Lock()

    def __len__(self) -> int:
        """Shards."""
        return -(-len(self.samples) // self.recipe.shard_size)

    def _create(self) -> None:
        """Make the folder and record what answers depend on, or refuse to mix them with others."""
        asked = self.recipe.model_dump(mode="json", exclude={"filters", "attempts", "short"})
        chosen = {"model": self.model, "start": self.samples.start, "stop": self.samples.stop, **asked}
        path = self.state / "options.json"
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if not any(self.state.glob("shard-*")):  # nothing was answered yet
                write_atomically(path, json.dumps(chosen, indent=1).encode())
            recorded = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.out}: cannot be used: {error}") from None
        for name, value in chosen.items():
            if recorded.get(name) != value and name == "stop" and self.config.stop is None:
                raise ValueError(
                    f"{self.config.source} had {recorded.get(name):,} images when {self.out} was begun, and has "
                    f"{value:,} now; take away what was added, or choose another output"
                )
            if recorded.get(name) != value:
                raise ValueError(
                    f"{self.out}: captioned with {name}={recorded.get(name)!r}, not {value!r}; "
                    "give that, or choose another output"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while this one asks.

        Raises:
            ValueError: one is at work, or the disk cannot be written to.
        """
        try:
            with FileLock(self.state / "lock", timeout=_LOCK_SECONDS):
                for leftover in [*self.state.glob("*.tmp"), *self.state.glob(".*.tmp")]:
                    leftover.unlink(missing_ok=True)
                yield
        except Timeout:
            raise ValueError(f"{self.out}: another process is captioning into it") from None

    def indices(self, number: int) -> range:
        """The samples of a shard."""
        size = self.recipe.shard_size
        return self.samples[number * size : (number + 1) * size]

    def shard_of(self, index: int) -> int:
        """The shard of a sample; raises ValueError for one that the job does not have."""
        return self.samples.index(index) // self.recipe.shard_size

    def read(self, index: int) -> Sample:
        """A sample, one thread at a time; raises BadSampleError."""
        with self._reading:
            return self.source.read(index)

    def question(self, task: Task) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of a task and the body of its request; raises BadSampleError."""
        sample = self.read(task.index)
        prompt = choose_prompt(self.recipe.prompts_of(task.kind), sample.key, self.recipe.seed, task.attempt)
        return prompt, request(sample, prompt, self.recipe, self.model, task.attempt)

    def prompt(self, name: str) -> Prompt:
        """The prompt of this id; raises KeyError."""
        return self._prompts[name]

    def inputs(self, number: int) -> str:
        """A hash that changes when the images of a shard do."""
        stamps = map(self.source.fingerprint, self.indices(number))
        return hashlib.sha256("\n".join(stamps).encode()).hexdigest()

    def judged_by(self) -> str:
        """A hash of what a shard's content depends on besides its answers."""
        chosen = self.recipe.model_dump(mode="json", include={"filters", "attempts", "short"})
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def file(self, number: int) -> Path:
        """The shard, or its part of the manifest."""
        return self.state / f"shard-{number:06d}.rows" if self.as_manifest else self.out / f"shard-{number:06d}.tar"

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that is written: whole, of these images, judged by this recipe.

        Raises:
            ValueError: its images have changed since.
        """
        path = self.state / f"shard-{number:06d}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_bytes())
        if record["inputs"] != self.inputs(number):
            raise ValueError(changed(self.out, path))
        whole = self.file(number).exists() and self.file(number).stat().st_size == record["bytes"]
        return record if whole and record["judged_by"] == self.judged_by() else None

    def finished(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that needs nothing more: it is written, and no request is to be made again.

        Raises:
            ValueError: its images have changed since.
        """
        record = self.record(number)
        if record is None or record.get("failed"):  # a short caption's too; older records have no such number
            return None
        return None if any(skipped["reason"] in FAILURES for skipped in record["skipped"]) else record

    def unfinished(self) -> Iterator[int]:
        """Numbers of the shards that need something; see `finished`."""
        return (number for number in range(len(self)) if self.finished(number) is None)

    def report(self) -> dict[str, Any]:
        """Write index.json or the manifest, and report.json; gives the report without its list of samples.

        Samples are listed shard by shard, so memory does not grow with their number.
        """
        records = [self.state / f"shard-{number:06d}.json" for number in range(len(self))]
        counts: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        summary: dict[str, Any] = {"samples": len(self.samples), "written": 0, "tokens": 0, "model": self.model}
        failed = 0
        sizes: dict[str, int] = {}
        short_from_long = 0
        for number, path in enumerate(records):
            if not path.exists():
                counts["no_answer"] += len(self.indices(number))
                continue
            record = json.loads(path.read_bytes())
            counts.update(skipped["reason"] for skipped in record["skipped"])
            answers.update(record["answers"])
            summary["written"] += record["written"]
            summary["tokens"] += record["tokens"]
            short_from_long += record.get("short_from_long", 0)
            failed += record.get("failed", 0)
            sizes[self.file(number).name] = record["written"]
        summary |= {"counts": dict(counts.most_common()), "answers": dict(answers.most_common()), "failed": failed}
        if self.recipe.short == "ask":
            summary["short_from_long"] = short_from_long
        if self.as_manifest:
            write_atomically(self.out, self._write_manifest)
        else:
            write_index(self.out, sizes)
        report = self.out.with_suffix(".report.json") if self.as_manifest else self.out / "report.json"
        write_atomically(report, lambda path: _write_report(path, summary, records))
        return summary | {"report": str(report)}

    def _write_manifest(self, path: Path) -> None:
        with path.open("wb") as file:
            for number in range(len(self)):
                if self.file(number).exists():
                    file.write(self.file(number).read_bytes())


def _write_report(path: Path, summary: Mapping[str, Any], records: list[Path]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(summary, indent=1)[:-2] + ',\n "skipped": [')
        separator = "\n  "
        for record in records:
            for skipped in json.loads(record.read_bytes())["skipped"] if record.exists() else []:
                file.write(separator + json.dumps(skipped))
                separator = ",\n  "
        file.write("]\n}\n")


def changed(out: Path, path: Path) -> str:
    """The error about images that are no longer those that were asked about."""
    return (
        f"{out}: images changed since they were asked about; choose another output, or delete {path} and the shard's "
        "other files beside it to caption these images anew"
    )
