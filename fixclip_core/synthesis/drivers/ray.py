"""Captions on a Ray cluster: a task a shard that asks servers, or rows through `ray.data.llm` to vLLM on its GPUs.

Output, journals and report are those of the other drivers, on a disk that every machine sees. A shard is a file named
after its number, so a task that Ray runs twice writes the same file twice, and an interrupted run goes on where it was.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tqdm import tqdm

from fixclip_core.data.cluster import on_ray
from fixclip_core.data.samples import BadSampleError
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.accept import Answer
from fixclip_core.synthesis.drivers.server import Captioning, Progress, Server, ServerOptions
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.journal import Task, journal_row
from fixclip_core.synthesis.shard import Shard

# A Ray Dataset of questions (columns `task` and `body`, the request as JSON) -> the same rows with the columns
# `generated_text` and `num_generated_tokens`, as ray.data.llm gives them.
Engine = Callable[[Any], Any]


def caption_by_servers(job: Job, options: ServerOptions, concurrency: int | None = None) -> dict[str, Any]:
    """Caption with a task for each shard, which asks the server as `drivers.server` does; gives the report.

    Args:
        job: its output is on a disk that every machine sees.
        options: `options.concurrency` requests at a time, for each task. The key is taken from each machine's
            environment.
        concurrency: most tasks at the same time.

    Raises:
        ValueError: the server cannot be used, or the output not be written; what was answered is kept.
    """
    with job.locked():
        asyncio.run(_check(job, options))
        _on_shards(job, partial(_caption_shard, job, options), "captioning", concurrency)
        return job.report()


async def _check(job: Job, options: ServerOptions) -> None:
    async with Server(options, job.model) as server:
        await server.check()


def _on_shards(job: Job, function: Callable[[int], dict[str, Any]], doing: str, concurrency: int | None) -> None:
    numbers = list(job.unfinished())
    with tqdm(total=len(job), initial=len(job) - len(numbers), desc=doing, unit="shard") as bar:
        for result in on_ray(function, numbers, concurrency):
            if "error" in result:
                raise ValueError(result["error"])
            bar.update()


def _caption_shard(job: Job, options: ServerOptions, number: int) -> dict[str, Any]:
    try:
        asyncio.run(_ask(job, options, number))
        return {}
    except (OSError, ValueError) as error:  # Ray would show it as a traceback of several machines
        return {"error": f"{job.file(number)}: {error}"}


async def _ask(job: Job, options: ServerOptions, number: int) -> None:
    progress = Progress(len(job.indices(number)), hidden=True)
    async with Server(options, job.model) as server:
        await Captioning(job, server, progress).run([number])


def caption_by_engine(job: Job, engine: Engine, concurrency: int | None = None) -> dict[str, Any]:
    """Caption with an engine on the cluster's own GPUs, a round for each attempt; gives the report.

    Raises:
        ValueError: the output cannot be written; what was answered is kept.
    """
    with job.locked():
        for _ in range(job.recipe.attempts * len(job.recipe.kinds)):
            if not _ask_engine(job, engine):
                break
        _on_shards(job, partial(_finish_shard, job), "writing", concurrency)
        return job.report()


def _ask_engine(job: Job, engine: Engine) -> int:
    """One round: everything that is pending, at most one question a caption; gives how many answers came."""
    import ray.data

    numbers = list(job.unfinished())
    if not numbers:
        return 0
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    shards = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    questions = shards.flat_map(partial(_questions, job))
    kept = engine(questions).map_batches(partial(_keep, job), batch_format="numpy")
    return sum(int(row["kept"]) for row in tqdm(kept.iter_rows(), "captioning", unit="batch"))


def _questions(job: Job, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task in Shard(job, int(row["number"])).pending():
        try:
            prompt, body = job.question(task)
        except BadSampleError:
            continue  # the shard's report says so
        yield {"task": f"{task.id}.{prompt.id}", "body": json.dumps(body)}


def _keep(job: Job, batch: dict[str, Any]) -> dict[str, Any]:
    """Write a batch's answers into journals of their own: several machines may have answers of one shard."""
    lines: dict[int, list[str]] = {}
    none = [None] * len(batch["task"])
    columns = (batch["task"], batch.get("generated_text", none), batch.get("num_generated_tokens", none))
    for name, text, tokens in zip(*columns, strict=True):
        if not isinstance(text, str):  # the engine failed on this one; the next round asks again
            continue
        task_id, _, prompt_id = str(name).partition(".")
        task = Task.parse(task_id)
        reason = "length" if int(tokens) >= job.recipe.max_tokens else "stop"
        row = journal_row(task, job.prompt(prompt_id), Answer(str(text), reason, job.model, int(tokens)))
        lines.setdefault(job.shard_of(task.index), []).append(json.dumps(row) + "\n")
    for number, rows in lines.items():
        head = json.dumps({"inputs": job.inputs(number)}) + "\n"
        path = job.state / f"shard-{number:06d}.{uuid.uuid4().hex}.jsonl"
        write_atomically(path, (head + "".join(rows)).encode())
    return {"kept": [sum(map(len, lines.values()))]}


def _finish_shard(job: Job, number: int) -> dict[str, Any]:
    try:
        shard = Shard(job, number)
        shard.leave_out_unreadable()
        shard.finish()
        return {}
    except (OSError, ValueError) as error:
        return {"error": f"{job.file(number)}: {error}"}


def vllm_engine(job: Job, replicas: int = 1, batch_size: int = 64, **engine_kwargs: Any) -> Engine:
    """vLLM on the cluster's GPUs by `ray.data.llm`.

    Args:
        job: its model is a name of Hugging Face's hub or a folder; max_tokens and temperature are its recipe's.
        replicas: engines at the same time, each on a GPU (or `tensor_parallel_size` of them).
        batch_size: questions that are sent to an engine together.
        engine_kwargs: of vLLM's engine, e.g. `max_model_len=4096`, `tensor_parallel_size=2`.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=job.model,
        engine_kwargs=engine_kwargs,
        concurrency=replicas,
        batch_size=batch_size,
        prepare_multimodal_stage={"enabled": True},
        should_continue_on_error=True,
    )
    return build_processor(config, preprocess=vllm_row, postprocess=answer_row)


def vllm_row(row: dict[str, Any]) -> dict[str, Any]:
    """A question as vLLM's stages read it: OpenAI messages and sampling parameters."""
    body = json.loads(row["body"])
    names = ("max_tokens", "temperature", "top_p", "seed")
    sampling = {name: body[name] for name in names if name in body}
    return {"task": row["task"], "messages": body["messages"], "sampling_params": sampling}


def answer_row(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are kept of an engine's row; rows with an error pass it by, and have no text."""
    return {name: row[name] for name in ("task", "generated_text", "num_generated_tokens")}
