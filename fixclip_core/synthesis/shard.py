"""The answers of one shard's samples, and the tar (or the rows of a manifest) that follows from them."""

import json
import os
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from fixclip_core.data.captions import ShortCaptions, caption_pair
from fixclip_core.data.pack import PackOptions, write_shard
from fixclip_core.data.samples import BadSampleError, Sample, Skipped
from fixclip_core.data.sources.rows import RowSource
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.accept import Answer, Verdict, accept
from fixclip_core.synthesis.job import FAILURES, Job, changed
from fixclip_core.synthesis.journal import Journal, Task, journal_row
from fixclip_core.synthesis.prompts import Prompt, stable_hash
from fixclip_core.synthesis.recipe import Kind

FROM_LONG = "first_sentence"  # stands where a short caption's prompt does, if no answer was one


class Shard:
    """The answers of one shard's samples, and what follows from them.

    Attributes:
        left_out: samples that could not be read, or whose request failed, in this run: (reason, detail).
    """

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number, self.indices = job, number, job.indices(number)
        self.inputs = job.inputs(number)
        self.journal = Journal(job.state / f"shard-{number:06d}.jsonl")
        self.left_out: dict[int, tuple[str, str]] = {}
        self._answers: dict[Task, tuple[str, Answer]] = {}
        self._verdicts: dict[Task, Verdict] = {}
        self._same: Counter[str] = Counter()
        for path in sorted(job.state.glob(f"shard-{number:06d}*.jsonl")):
            self._load(path)

    def _load(self, path: Path) -> None:
        for line, row in Journal(path).read():
            if row.get("inputs", self.inputs) != self.inputs:
                raise ValueError(changed(self.job.out, path))
            if "task" not in row:
                continue
            try:
                task, prompt, answer = Task.parse(row["task"]), self.job.prompt(row["prompt"]), Answer(**row["answer"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{line}: no answer of this job ({error!r}); delete this line") from None
            self._add(task, prompt, answer)

    def _add(self, task: Task, prompt: Prompt, answer: Answer) -> None:
        if task in self._answers or task.index not in self.indices:
            return
        self._answers[task] = prompt.id, answer
        verdict = accept(answer, prompt, self.job.recipe, task.kind)
        self._verdicts[task] = verdict
        if verdict.caption is not None and task.kind == "long":
            self._same[verdict.caption] += 1

    def begin(self) -> None:
        """Record which images are asked about, before any answer is there: answers may come after they changed.

        Raises:
            OSError: as `add`.
        """
        self.journal.begin(self.inputs)
        self.journal.close()

    @property
    def answered(self) -> int:
        """How many answers there are."""
        return len(self._answers)

    def add(self, task: Task, prompt: Prompt, answer: Answer) -> bool:
        """Keep an answer; it is on the disk when this returns. False if the task has one already.

        Raises:
            OSError: the disk is full, or its like; what was kept before is untouched.
        """
        if task in self._answers:
            return False
        self.journal.begin(self.inputs)
        self.journal.append(journal_row(task, prompt, answer))
        self._add(task, prompt, answer)
        return True

    def leave_out(self, index: int, reason: str, detail: str) -> None:
        """Ask no more for a sample in this run."""
        self.left_out[index] = reason, detail

    def verdict(self, task: Task) -> Verdict | None:
        """What became of a task; None if it has no answer. A caption that too many images share is none."""
        verdict = self._verdicts.get(task)
        most = self.job.recipe.filters.max_same
        if verdict is None or verdict.caption is None or task.kind == "short" or most is None:
            return verdict
        return verdict if self._same[verdict.caption] <= most else Verdict(None, "same_caption", verdict.caption[:200])

    def _tasks(self, index: int, kind: Kind) -> list[Task]:
        return [Task(index, kind, attempt) for attempt in range(self.job.recipe.attempts)]

    def accepted(self, index: int, kind: Kind) -> Task | None:
        """The first attempt whose answer is a caption."""
        for task in self._tasks(index, kind):
            verdict = self.verdict(task)
            if verdict is not None and verdict.caption is not None:
                return task
        return None

    def leave_out_unreadable(self) -> None:
        """Leave out the samples that something is pending for and whose images cannot be used."""
        for task in self.pending():
            try:
                self.job.question(task)
            except BadSampleError as error:
                self.leave_out(task.index, error.skipped.reason, error.skipped.detail)

    def next_task(self, index: int, kind: Kind) -> Task | None:
        """The attempt to make next; None if there is a caption, or no attempt is left.

        A sample without a long caption is worth no short one, so it is asked for after that.
        """
        if index in self.left_out or self.accepted(index, kind) is not None:
            return None
        if kind == "short" and self.accepted(index, "long") is None:
            return None
        return next((task for task in self._tasks(index, kind) if task not in self._answers), None)

    def pending(self) -> list[Task]:
        """What to ask next, at most one question for each caption. Ask, `add`, and look again until it is empty."""
        found = (self.next_task(index, kind) for index in self.indices for kind in self.job.recipe.kinds)
        return [task for task in found if task is not None]

    def settled(self, index: int) -> bool:
        """Whether nothing more is asked for a sample (but another's equal caption may still spoil its own)."""
        return all(self.next_task(index, kind) is None for kind in self.job.recipe.kinds)

    # -- what becomes of the answers

    def read(self, index: int) -> Sample:
        """The sample with its captions, as a source gives it to `pack`; raises BadSampleError if it has none."""
        sample = self.job.read(index)
        task = self.accepted(index, "long")
        if task is None:
            reason, detail = self.left_out.get(index) or self._rejection(index)
            raise BadSampleError(reason, sample.file, sample.key, detail)
        prompt, answer = self._answers[task]
        long = self._verdicts[task].caption
        assert long is not None
        origin = {"model": answer.model, "prompt": prompt, "finish_reason": answer.finish_reason}
        short, short_origin = self._short(sample, index, long)
        return replace(sample, long=long, short=short, extra={**sample.extra, **origin, **short_origin})

    def _short(self, sample: Sample, index: int, long: str) -> tuple[str | None, dict[str, str]]:
        """The short caption, and where it came from if it was asked for.

        Where no answer was one, it is the long caption's first sentence: a training that takes short captions from
        the data would lose the sample.
        """
        source = self.job.recipe.short
        if source in ("none", "keep"):
            return (sample.short if source == "keep" else None), {}
        task = self.accepted(index, "short") if source == "ask" else None
        if task is None:
            policy: Any = FROM_LONG if source == "ask" else source
            rng = random.Random(stable_hash("short", self.job.recipe.seed, sample.key))
            short = caption_pair(long, None, ShortCaptions(policy), rng)[1]
            return short, ({"short_prompt": FROM_LONG} if source == "ask" else {})
        prompt, answer = self._answers[task]
        return self._verdicts[task].caption, {"short_prompt": prompt, "short_finish_reason": answer.finish_reason}

    def _rejection(self, index: int) -> tuple[str, str]:
        """The last attempt's reason, and what each attempt said."""
        verdicts = [self.verdict(task) for task in self._tasks(index, "long")]
        given = [verdict for verdict in verdicts if verdict is not None and verdict.reason]
        if not given:
            return "no_answer", "it was not asked for yet"
        return str(given[-1].reason), "; ".join(f"{verdict.reason}: {verdict.detail}" for verdict in given)

    def finish(self) -> dict[str, Any]:
        """Write the shard, or its part of the manifest, and its record; the bytes follow from the answers alone.

        Raises:
            OSError: it cannot be written; the answers are kept.
        """
        self.journal.close()
        file = self.job.file(self.number)
        if self.job.as_manifest:
            written, skipped = self._write_rows(file)
        else:
            # An image with a caption was decoded before it was asked about, and `inputs` says that it is the same.
            options = PackOptions(decoded_before=True)
            written, skipped = write_shard(self.read, self.indices, file, options, self.job.state)
        verdicts = [self.verdict(task) for task in self._answers]
        ask = self.job.recipe.short == "ask"
        with_long = [index for index in self.indices if self.accepted(index, "long") is not None]
        record = {
            "shard": self.number,
            "samples": len(self.indices),
            "written": written,
            "short_from_long": sum(ask and self.accepted(index, "short") is None for index in with_long),
            "skipped": [asdict(sample) for sample in skipped],
            "failed": sum(reason in FAILURES for reason, _ in self.left_out.values()),
            "answers": dict(Counter(verdict.reason or "accepted" for verdict in verdicts if verdict is not None)),
            "tokens": sum(answer.tokens for _, answer in self._answers.values()),
            "bytes": file.stat().st_size,
            "inputs": self.inputs,
            "judged_by": self.job.judged_by(),
        }
        write_atomically(self.job.state / f"shard-{self.number:06d}.json", json.dumps(record).encode())
        return record

    def _write_rows(self, file: Path) -> tuple[int, list[Skipped]]:
        rows, skipped = [], []
        for index in self.indices:
            try:
                rows.append(self._row(self.read(index)))
            except BadSampleError as error:
                skipped.append(replace(error.skipped, index=index))
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return len(rows), skipped

    def _row(self, sample: Sample) -> dict[str, Any]:
        source = cast(RowSource, self.job.source)
        image = os.path.relpath(source.root / sample.key, self.job.out.parent)
        row = {"image": image, "long": sample.long} | ({"short": sample.short} if sample.short else {})
        return row | {name: value for name, value in sample.extra.items() if name not in ("image", "long", "short")}
