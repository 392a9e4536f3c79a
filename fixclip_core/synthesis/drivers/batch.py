"""Captions by batch files: OpenAI's batch JSONL, which `vllm run-batch` and hosted services take, often at half price.

    write_batch -> requests.jsonl -> (vllm run-batch, or an upload) -> answers.jsonl -> read_batch

Answers may come in any order, in parts, and twice; what is still missing, or has another prompt left to try, is what
the next `write_batch` writes.
"""

import itertools
import json
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fixclip_core.data.samples import BadSampleError
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.accept import Answer, MalformedResponseError, read_answer
from fixclip_core.synthesis.job import Job, RequestFailedError
from fixclip_core.synthesis.journal import Task
from fixclip_core.synthesis.prompts import Prompt
from fixclip_core.synthesis.shard import Shard

# What OpenAI's batch service takes in one file.
MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000
NAMED = 3  # failed requests that a reading names


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
                shard = Shard(job, number)
                tasks = shard.pending()
                if tasks:
                    shard.begin()
                for task in tasks:
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
        failures: FILE:LINE, the image and what the service said, of a few of these.
        pending: requests that the next `write_batch` writes.
        again: how many of these ask once more, with the next prompt, by why the answer before was rejected.
        report: the job's, once every shard is written; an image whose request failed is left out of its shard until
            another batch has an answer.
        skipped: FILE:LINE and what is wrong, of each line that is no batch output of this job.
    """

    answers: int
    failed: dict[str, int]
    pending: int
    again: dict[str, int]
    report: dict[str, Any] | None
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def read_batch(job: Job, files: Sequence[Path]) -> BatchReading:
    """Keep the answers in batch output files, write the shards that they complete, and count what is still to ask.

    Answers may come in any order: a first pass notes where those of each shard lie, so that one shard at a time is in
    memory.

    Raises:
        ValueError: a file cannot be read, or none of its lines is batch output of this job; then nothing is kept yet.
            Or images changed since they were asked about, or the job's folder cannot be written to; then what was read
            before is kept.
    """
    reading = _Reading(job)
    for file in files:
        reading.find_lines(file)
    with job.locked():
        try:
            pending = sum(map(reading.read_shard, range(len(job))))
            written = all(job.record(number) is not None for number in range(len(job)))
            report = job.report() if written else None
        except OSError as error:
            raise ValueError(f"{job.out}: cannot be written: {error}; run the same command again") from None
    return BatchReading(
        answers=reading.answers,
        failed=dict(reading.failed),
        failures=tuple(reading.failures),
        pending=pending,
        again=dict(reading.again),
        report=report,
        skipped=tuple(reading.skipped),
    )


class _Reading:
    """Batch output files, read shard by shard."""

    def __init__(self, job: Job) -> None:
        self.job, self.answers = job, 0
        self.failed: Counter[str] = Counter()
        self.again: Counter[str] = Counter()
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self._lines: dict[int, list[tuple[Path, int, int]]] = {}  # of each shard: file, number, first byte

    def find_lines(self, file: Path) -> None:
        """Note which shard each line is for; raises ValueError for a file that is no batch output of this job."""
        found, unusable = 0, []
        try:
            lines = file.open("rb")
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        start = end = 0
        with lines:
            for number, line in enumerate(tqdm(lines, f"reading {file.name}", unit="answer"), 1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    unusable.append(f"{file}:{number} is not JSON, or cut off")
                    continue
                try:
                    shard = self.job.shard_of(self._asked(row)[0].index)
                except (ValueError, KeyError, TypeError, AttributeError):
                    name = row.get("custom_id") if isinstance(row, dict) else None
                    unusable.append(f"{file}:{number} has custom_id {name!r}, which this job has not asked")
                    continue
                found += 1
                self._lines.setdefault(shard, []).append((file, number, start))
        if unusable and not found:
            raise ValueError(
                f"{file}: no batch output of this job; {unusable[0]}. Give the same images, recipe and output folder "
                "as for --write-batch"
            )
        self.skipped += unusable

    def _asked(self, row: Any) -> tuple[Task, Prompt]:
        """What a line answers; raises KeyError, TypeError, ValueError or AttributeError if it names nothing asked."""
        name, _, prompt = row["custom_id"].partition(".")
        return Task.parse(name), self.job.prompt(prompt)

    def read_shard(self, number: int) -> int:
        """Keep a shard's answers, write it once nothing but failed requests is pending; gives how many are to ask."""
        lines = self._lines.get(number, [])
        if not lines and self.job.finished(number) is not None:
            return 0
        shard = Shard(self.job, number)
        refused: dict[Task, tuple[RequestFailedError, str]] = {}
        for place, row in _rows(lines):
            task, prompt = self._asked(row)
            try:
                self.answers += shard.add(task, prompt, _answer(row, self.job.model))
            except RequestFailedError as error:
                refused[task] = error, place
        shard.journal.close()
        if not shard.answered and not refused:
            return len(shard.pending())
        shard.leave_out_unreadable()
        pending = shard.pending()
        for task in pending:
            rejected = shard.verdict(replace(task, attempt=task.attempt - 1))
            if rejected is not None:
                self.again[str(rejected.reason)] += 1
            if task in refused:  # and not answered by another line
                failure, place = refused[task]
                self.failed[failure.reason] += 1
                if len(self.failures) < NAMED:
                    self.failures.append(f"{place} ({self._name(task)}): {failure.detail}")
                shard.leave_out(task.index, failure.reason, failure.detail)
        if not shard.pending() and self.job.finished(number) is None:
            shard.finish()
        return len(pending)

    def _name(self, task: Task) -> str:
        try:
            return self.job.read(task.index).key
        except BadSampleError as error:
            return error.skipped.key


def _rows(lines: list[tuple[Path, int, int]]) -> Iterator[tuple[str, Any]]:
    """FILE:LINE and what stands there."""
    for path, places in itertools.groupby(lines, key=operator.itemgetter(0)):
        with path.open("rb") as file:
            for _, number, start in places:
                file.seek(start)
                yield f"{path}:{number}", json.loads(file.readline())


def _answer(row: dict[str, Any], model: str) -> Answer:
    """The answer in a line; raises RequestFailedError."""
    response, error = row.get("response") or {}, row.get("error")
    try:
        status = response.get("status_code")
        if error or status not in (None, 200):
            said = json.dumps(error or response.get("body"))[:200]
            reason = "server_error" if isinstance(status, int) and status >= 500 else "refused_request"
            raise RequestFailedError(reason, said if status is None else f"{status}: {said}")
        return read_answer(response.get("body"), model)
    except (MalformedResponseError, AttributeError, TypeError) as error:
        raise RequestFailedError("bad_answer", str(error)) from None
