"""Time and memory of `retrieval_metrics`, whose blocks keep 100,000 x 100,000 scores out of memory.

python benchmarks/retrieval.py --rows 100000 --width 512
"""

import argparse
import resource
import time

import torch

from fixclip_core.evaluation.retrieval import retrieval_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="images, and as many texts")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    image_IE = torch.randn(args.rows, args.width, generator=generator)
    text_IE = image_IE + 3 * torch.randn(args.rows, args.width, generator=generator)
    before = peak_mib()
    start = time.perf_counter()
    metrics = retrieval_metrics(
        image_IE.to(args.device), text_IE.to(args.device), torch.arange(args.rows), progress=True
    )
    seconds = time.perf_counter() - start
    dense = args.rows**2 * 4 / 2**20
    print(f"{args.rows:,} x {args.rows:,}, width {args.width}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{seconds:.1f} s; memory on top of the features {peak_mib() - before:,.0f} MiB (dense scores: {dense:,.0f})")
    print({name: round(value, 4) for name, value in metrics.items()})


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
