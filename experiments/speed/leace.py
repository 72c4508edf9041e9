"""Speed of the LEACE core beside concept-erasure: update, fit and apply, side by side in one run.

CPU time of this process (robust against other load), threads set explicitly, repeats interleaved, medians.
``fit`` includes everything from gathered statistics to the factors; both use the same rows and labels.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python experiments/speed/leace.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = {"fit": 10.0, "update": 1.25, "apply": 2.0}
BATCH, CLASSES = 1024, 2


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function; one turn of all before the next, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(d: int, n: int, repeats: int) -> dict[str, Any]:
    import torch
    from concept_erasure import LeaceFitter

    from repforget.edit.erase._leace_math import fit_eraser
    from repforget.stats import Statistics

    rng = torch.Generator().manual_seed(d)
    x = torch.randn(n, d, generator=rng) + torch.randn(d, generator=rng)
    z = torch.randint(0, CLASSES, (n,), generator=rng)
    x[:, :8] += 0.5 * z[:, None]
    onehot = torch.nn.functional.one_hot(z, CLASSES).float()
    peer, wide = LeaceFitter(d, CLASSES), LeaceFitter(d, CLASSES, dtype=torch.float64)
    own, double = Statistics.empty(d, CLASSES, precision="single"), Statistics.empty(d, CLASSES)

    def feed(target: Any, labels: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, n, BATCH):
                target.update(x[start : start + BATCH], labels[start : start + BATCH])

        return run

    update = medians({
        "concept_erasure": feed(peer, onehot), "repforget_single": feed(own, z),
        "concept_erasure_float64": feed(wide, onehot), "repforget_double": feed(double, z),
    }, repeats)  # fmt: skip

    del wide, own  # one covariance each: the fits below need the memory

    def refit() -> Any:
        peer.__dict__.pop("_cached_eraser", None)
        return peer.eraser

    fit = medians({"concept_erasure": refit, "repforget": lambda: fit_eraser(double, shrinkage="identity")},
                  max(1, repeats - 1))  # fmt: skip
    theirs, ours = peer.eraser, fit_eraser(double, shrinkage="identity")
    gap = float((theirs(x).double() - ours(x).double()).abs().max())
    apply = medians({"concept_erasure": lambda: theirs(x), "repforget": lambda: ours(x)}, 5 * repeats)
    ratios = {
        "update": update["concept_erasure"] / update["repforget_single"],
        "update_float64": update["concept_erasure_float64"] / update["repforget_double"],
        "fit": fit["concept_erasure"] / fit["repforget"],
        "apply": apply["concept_erasure"] / apply["repforget"],
    }
    return {
        "d": d, "n": n, "cpu_seconds": {"update": update, "fit": fit, "apply": apply}, "ratios": ratios,
        "max_difference_of_erased_rows": gap,
    }  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or folders."""
    import numpy
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": threads, "python": platform.python_version(),
        "torch": str(torch.__version__), "numpy": numpy.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        results = []
        for d in args.widths:
            results.append(measure(d, args.rows, args.repeats))
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in results[-1]["ratios"].items())
            print(f"d={d} n={args.rows}: {ratios}", flush=True)
    missed = [f"{name} at d={r['d']}: {r['ratios'][name]:.2f}x, target {target}x"
              for r in results for name, target in TARGETS.items() if r["ratios"][name] < target]  # fmt: skip
    report = {"machine": machine(args.threads), "targets": TARGETS, "results": results, "missed": missed}
    print("all targets reached" if not missed else "missed: " + "; ".join(missed))
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
