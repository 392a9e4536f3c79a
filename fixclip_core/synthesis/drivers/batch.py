"""Captions by batch files: OpenAI's batch JSONL, which `vllm run-batch` and hosted services take, often at half price.

    write_batch -> requests.jsonl -> (vllm run-batch, or an upload) -> answers.jsonl -> read_batch

Answers may come in any order, in parts, and twice; what is still missing, or has another prompt left to try, is what
the next `write_batch` writes.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fixclip_core.data.samples import BadSampleError
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.accept import MalformedResponseError, read_answer
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.journal import Task
from fixclip_core.synthesis.shard import Shard

# What OpenAI's batch service takes in one file.
MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000
_OPEN_SHARDS = 8


@dataclass(frozen=True)
class BatchLimits:
    """How much goes into one file; more is written as FILE-001, FILE-002, ..."""

    requests: int = MAX_REQUESTS
    bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.requests < 1 or self.bytes < 1:
            raise ValueError(f"{self}: at least one request and one byte a file")


def write_batch(job: Job, file: Path, limits: BatchLimits | None = None) -> tuple[list[Path], int]:
    """Write a request for everything that the job still lacks, a JSON line each.

    Args:
        job: what to caption.
        file: where to; parts are numbered if there is more than one. Files of the same name are replaced.
        limits: of one file.

    Returns:
        The files, in order, and how many requests are in them. No files, if the job lacks nothing.

    Raises:
        ValueError: they cannot be written.
    """
    with job.locked():
        try:
            lines = _Lookahead(_requests(job), limits or BatchLimits())
            files: list[Path] = []
            while not lines.at_end():
                part = file.with_name(f"{file.stem}-{len(files) + 1:03d}{file.suffix}")
                write_atomically(part, lines.write_part)
                files.append(part)
            if len(files) == 1:
                files = [files[0].replace(file)]
            return files, lines.written
        except OSError as error:
            raise ValueError(f"{file}: cannot be written: {error}") from None


def _requests(job: Job) -> Iterator[bytes]:
    """The lines, read and encoded one at a time. A sample that cannot be read is reported by `read_batch`."""
    with tqdm(total=len(job.samples), desc="writing requests", unit="image") as bar:
        for number in range(len(job)):
            if job.finished(number) is None:
                for task in Shard(job, number).pending():
                    try:
                        prompt, body = job.question(task)
                    except BadSampleError:
                        continue
                    line = {"custom_id": f"{task.id}.{prompt.id}", "method": "POST", "url": "/v1/chat/completions"}
                    yield json.dumps(line | {"body": body}).encode() + b"\n"
            bar.update(len(job.indices(number)))


class _Lookahead:
    """Lines, written a file at a time."""

    def __init__(self, lines: Iterator[bytes], limits: BatchLimits) -> None:
        self._lines, self._limits = lines, limits
        self._next = next(lines, None)
        self.written = 0

    def at_end(self) -> bool:
        return self._next is None

    def write_part(self, path: Path) -> None:
        """As many lines as a file may hold, at least one."""
        requests = size = 0
        with path.open("wb") as file:
            while self._next is not None and (not requests or self._fits(requests, size)):
                file.write(self._next)
                requests, size = requests + 1, size + len(self._next)
                self._next = next(self._lines, None)
        self.written += requests

    def _fits(self, requests: int, size: int) -> bool:
        assert self._next is not None
        return requests < self._limits.requests and size + len(self._next) <= self._limits.bytes


@dataclass(frozen=True)
class BatchReading:
    """What the files brought.

    Attributes:
        answers: how many were new.
        failed: requests without a usable answer, by reason; they are pending again.
        pending: requests that the next `write_batch` writes.
        report: the job's, once nothing is pending.
        skipped: FILE:LINE and what is wrong, of each line that is no batch output of this job.
    """

    answers: int
    failed: dict[str, int]
    pending: int
    report: dict[str, Any] | None
    skipped: tuple[str, ...] = ()


def read_batch(job: Job, files: Sequence[Path]) -> BatchReading:
    """Keep the answers in batch output files, finish what is complete, and count what is still to ask.

    Raises:
        ValueError: a file cannot be read, none of its lines is batch output of this job, or the job's folder cannot be
            written to. What was read before is kept.
    """
    failed: Counter[str] = Counter()
    skipped: list[str] = []
    with job.locked():
        shards = _Shards(job)
        try:
            answers = sum(_read_file(file, shards, failed, skipped) for file in files)
            shards.close()
            pending = sum(_finish(job, number) for number in range(len(job)))
            report = None if pending else job.report()
        except OSError as error:
            raise ValueError(f"{job.out}: cannot be written: {error}; run the same command again") from None
    return BatchReading(answers, dict(failed), pending, report, tuple(skipped))


class _Shards:
    """The shards that answers are for, a few of them in memory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def of(self, task: Task) -> Shard:
        number = self.job.shard_of(task.index)
        if number not in self._open:
            self._open[number] = Shard(self.job, number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].journal.close()
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        for shard in self._open.values():
            shard.journal.close()


def _read_file(file: Path, shards: _Shards, failed: Counter[str], skipped: list[str]) -> int:
    new = usable = 0
    unusable: list[str] = []
    try:
        lines = file.open("rb")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    with lines:
        for number, line in enumerate(tqdm(lines, "reading answers", unit="answer"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                unusable.append(f"{file}:{number} is not JSON, or cut off")
                continue
            try:
                name, _, prompt_id = row["custom_id"].partition(".")
                task = Task.parse(name)
                shard, prompt = shards.of(task), shards.job.prompt(prompt_id)
            except (ValueError, KeyError, TypeError, AttributeError):
                found = row.get("custom_id") if isinstance(row, dict) else None
                unusable.append(f"{file}:{number} has custom_id {found!r}, which this job has not asked")
                continue
            usable += 1
            response = row.get("response") or {}
            try:
                status = response.get("status_code", 200)
                if row.get("error") or status != 200:
                    failed["server_error" if status >= 500 else "refused_request"] += 1
                    continue
                new += shard.add(task, prompt, read_answer(response.get("body"), shards.job.model))
            except (MalformedResponseError, AttributeError, TypeError):
                failed["bad_answer"] += 1
    if unusable and not usable:
        raise ValueError(
            f"{file}: no batch output of this job; {unusable[0]}. Give the same images, recipe and output folder as "
            "for --write-batch"
        )
    skipped += unusable
    return new


def _finish(job: Job, number: int) -> int:
    """Finish a shard if it is complete; gives how many requests it still needs."""
    if job.finished(number) is not None:
        return 0
    shard = Shard(job, number)
    if not shard.answered:
        return len(shard.pending())
    shard.leave_out_unreadable()
    pending = len(shard.pending())
    if not pending:
        shard.finish()
    return pending
