"""Does the page lose jobs or mix up results when many visitors come at once?

    python benchmarks/app_soak.py --clients 20 --seconds 120            # serves the default model itself
    python benchmarks/app_soak.py --url http://127.0.0.1:7860/ ...      # or asks a page that runs already

Each client draws one picture after the other, with a prompt and a seed of its own, and checks that the settings,
the caption and the metadata of the PNG that comes back are its own; equal jobs must give equal pixels, whoever
asked. Prints one line of JSON; the exit code is 1 if anything was lost or mixed up.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from gradio_client import Client
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    result = soak(arguments.url or serve(), arguments.clients, arguments.seconds, arguments.steps, arguments.size)
    print(json.dumps(result))
    sys.exit(bool(result["lost"] or result["mixed_up"]))


def serve() -> str:
    sys.path.insert(0, str(Path(__file__).parents[1] / "apps"))
    from fixclip_app.command import load
    from fixclip_app.page import build, launch

    return launch(build(load(None, None)), prevent_thread_lock=True, quiet=True)[1]


def soak(url: str, clients: int, seconds: float, steps: int, size: int) -> dict:
    """Let clients draw for some seconds; a job that was begun in time is waited for."""
    pixels: dict[tuple[str, int], str] = {}
    lock, start_together = threading.Lock(), threading.Barrier(clients)

    def visit(number: int) -> dict:
        done, lost, mixed, waits = 0, [], [], []
        with closing(Client(url, verbose=False)) as client:
            start_together.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                # Seeds repeat among clients, so that the same picture comes from several of them.
                prompt, seed = f"Visitor {number % 5} sees a red kite. " * (1 + number % 5), done % 3
                begun = time.monotonic()
                try:
                    gallery, info, _ = client.predict(
                        prompt=prompt, seed=seed, steps=steps, width=size, height=size, api_name="/generate"
                    )
                except Exception as error:
                    lost.append(f"{type(error).__name__}: {error}"[:200])
                    continue
                waits.append(time.monotonic() - begun)
                done += 1
                problem = wrong(gallery, info, prompt, seed, pixels, lock)
                if problem:
                    mixed.append(problem)
        return {"done": done, "lost": lost, "mixed": mixed, "waits": waits}

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        visits = list(threads.map(visit, range(clients)))
    waits = sorted(wait for visit in visits for wait in visit["waits"])
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - begun, 1),
        "pictures": sum(visit["done"] for visit in visits),
        "fewest_per_client": min(visit["done"] for visit in visits),
        "most_per_client": max(visit["done"] for visit in visits),
        "lost": sum(len(visit["lost"]) for visit in visits),
        "mixed_up": sum(len(visit["mixed"]) for visit in visits),
        "median_wait": round(waits[len(waits) // 2], 2) if waits else None,
        "longest_wait": round(waits[-1], 2) if waits else None,
        "problems": [problem for visit in visits for problem in visit["lost"] + visit["mixed"]][:5],
    }


def wrong(gallery: list, info: dict, prompt: str, seed: int, pixels: dict, lock: threading.Lock) -> str | None:
    """What does not belong to this job, if anything."""
    if len(gallery) != 1 or (info["prompt"], info["seed"]) != (prompt, seed):
        return f"settings of another job: {info}"
    if not gallery[0]["caption"].endswith(f"seed {seed}"):
        return f"caption of another job: {gallery[0]['caption']}"
    with Image.open(gallery[0]["image"]) as image:
        settings = json.loads(image.info["fixclip"])
        digest = hashlib.sha256(image.tobytes()).hexdigest()
    if (settings["prompt"], settings["seed"]) != (prompt, seed):
        return f"picture of another job: {settings}"
    with lock:
        known = pixels.setdefault((prompt, seed), digest)
    return None if known == digest else f"equal jobs gave other pixels: {prompt!r}, {seed}"


if __name__ == "__main__":
    main()
