"""Numbered pieces of work on a Ray cluster, or on this machine's cores where Ray was not told of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def on_ray(
    function: Callable[[int], dict[str, Any]], numbers: Sequence[int], concurrency: int | None = None
) -> Iterator[dict[str, Any]]:
    """`function(number)` for each number as a Ray task; results as they come, in any order.

    Ray runs a task again when its machine is lost, so the function must make the same of a number each time: writing
    a file named after the number, whole or not at all, does.

    Args:
        function: it and what it refers to are sent to each machine once.
        numbers: what to call it with.
        concurrency: most tasks at the same time; None for as many as the cluster has cores.
    """
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    call = ray.remote(_call).options(scheduling_strategy="SPREAD")
    shared = ray.put(function)
    under_way: list[Any] = []
    most = concurrency or max(1, int(ray.cluster_resources().get("CPU", 1)))
    for number in numbers:
        if len(under_way) >= most:
            done, under_way = ray.wait(under_way)
            yield from ray.get(done)
        under_way.append(call.remote(shared, number))
    while under_way:
        done, under_way = ray.wait(under_way)
        yield from ray.get(done)


def _call(function: Callable[[int], dict[str, Any]], number: int) -> dict[str, Any]:
    return function(number)
