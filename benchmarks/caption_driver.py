"""How many images a second `fixclip caption --server` sends, against a server that answers at once.

    python benchmarks/caption_driver.py --images 1000 --side 512

The server is a process of its own that reads a request and returns one fixed answer, so what is measured is reading,
checking or reducing images, base64 and JSON, the HTTP client, filters, journals and shards. Stages are also timed
alone. On a busy machine the CPU time counts, not the clock: 200 images/s on two cores are 10 ms of both processes for
an image, of which the driver, whose threads share one interpreter, may take 5.
"""

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image

from fixclip_core.data.config import DataConfig
from fixclip_core.synthesis.accept import Answer, accept
from fixclip_core.synthesis.drivers.server import ServerOptions, caption
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.journal import Task
from fixclip_core.synthesis.prompts import LONG_PROMPTS
from fixclip_core.synthesis.recipe import CaptionRecipe

TEXT = (
    "A brown dog with a red collar runs over wet grass towards a yellow ball. Behind it stands a low stone wall, and "
    "two bare trees rise into a grey sky. The photograph is taken from the height of the dog's eyes. A second, smaller "
    "dog sits to the left of the wall and looks away from the ball, and its fur is white with black spots. Near the "
    "lower edge lies a leather lead beside a pair of boots, out of focus, and the light is soft and even."
)


def serve(port: "multiprocessing.Queue[int]") -> None:
    """Answer every request on a connection with the same completion; no parsing beyond Content-Length."""
    message = {"message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop", "index": 0}
    body = json.dumps({"model": "instant", "choices": [message], "usage": {"completion_tokens": 100}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                request = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            fields = dict(line.lower().split(b": ", 1) for line in request.split(b"\r\n")[1:] if line)
            await reader.readexactly(int(fields.get(b"content-length", 0)))
            writer.write(head + body)
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**20)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs about as large as photographs of that size: noise made smooth; 200 different ones."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number >= 200:
            path.hardlink_to(folder / f"{number % 200:06d}.jpg")
            continue
        coarse = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def cpu_seconds(process: "psutil.Process") -> float:
    times = process.cpu_times()
    return times.user + times.system


def stage_times(job: Job, count: int) -> dict[str, float]:
    """Milliseconds of CPU an image takes in the stages that can be timed alone, in one thread."""
    indices = list(job.samples)[:count]
    times = {}

    def timed(name: str, work: object) -> None:
        begin = time.process_time()
        for index in indices:
            work(index)  # type: ignore[operator]
        times[name] = (time.process_time() - begin) / len(indices) * 1e3

    timed("read", job.read)
    timed("read, decode or check, encode, base64", lambda index: job.question(Task(index, "long", 0)))
    bodies = [job.question(Task(index, "long", 0))[1] for index in indices[:20]]
    timed("JSON of the request", lambda index: json.dumps(bodies[index % len(bodies)]).encode())
    timed("filters", lambda _: accept(Answer(TEXT, "stop", "m", 100), LONG_PROMPTS[0], job.recipe))
    return times


def main(
    images: Annotated[int, typer.Option(min=20, help="Images.")] = 2000,
    side: Annotated[int, typer.Option(min=64, help="Pixels of their sides.")] = 512,
    longest_side: Annotated[int, typer.Option(min=16, help="What is sent; less than --side to reduce them.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
) -> None:
    """Print images/s of the whole driver, and the CPU time of its stages."""
    queue: multiprocessing.Queue[int] = multiprocessing.get_context("spawn").Queue()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(queue,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_images(folder / "images", images, side)
        size = sum(path.stat().st_size for path in (folder / "images").iterdir()) / images / 1e3
        filters = {"max_same": None}
        recipe = CaptionRecipe.model_validate({"longest_side": longest_side, "filters": filters})
        job = Job(DataConfig(source=str(folder / "images")), folder / "out", recipe, "instant")
        stages = stage_times(job, min(images, 200))
        options = ServerOptions(f"http://127.0.0.1:{queue.get(timeout=120)}", concurrency)
        processes = psutil.Process(), psutil.Process(server.pid)
        wall, before = time.monotonic(), [cpu_seconds(process) for process in processes]
        report = caption(job, options)
        wall = time.monotonic() - wall
        cpu, server_cpu = (cpu_seconds(process) - start for process, start in zip(processes, before, strict=True))
    server.terminate()
    assert report["written"] == images, report
    print(
        f"\n{images} images of {side}x{side} ({size:.0f} KB), sent with at most {longest_side}; {os.cpu_count()} cores"
    )
    print(f"{images / wall:.0f} images/s by the clock")
    print(f"{cpu / images * 1e3:.2f} ms of CPU time an image, and {server_cpu / images * 1e3:.2f} ms of the server's")
    for stage, milliseconds in stages.items():
        print(f"  {stage}: {milliseconds:.2f} ms, {milliseconds * images / cpu / 10:.0f} % of the CPU time")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
