"""Taking rows out of a linear head beside training it again without them, in one run.

CPU time of this process, threads set explicitly; every removal is repeated and the median counts, trainings of the
large head run once.  Memory is the peak that an operation allocates beyond the rows, in a run of its own.  ``from
scratch`` starts at zero, ``warm`` after the step with its Hessian ('repforget head remove --retrain' starts at the old
weights), both to the same gradient; scikit-learn stops at its own default tolerance.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python experiments/speed/removal.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TARGET, PENALTY = 50.0, 1e-4


def timed(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Median CPU seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        found = run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), found


def allocated(run: Callable[[], Any]) -> float:
    """Peak in MB of what ``run`` allocates."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def problem(n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows, signs that depend on them, and a number to regress on."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    score = x @ rng.standard_normal(d) * 4
    return x, np.where(rng.random(n) < 1 / (1 + np.exp(-score)), 1.0, -1.0)[:, None], score[:, None]


def logistic(x: np.ndarray, y: np.ndarray, sizes: list[int], repeats: int) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    from repforget.linear import Budget, change_logistic, draw_noise, fit_logistic, refit

    budget = Budget(1.0, 0.1 / len(x), 1.0)
    noise = draw_noise(budget.sigma, (x.shape[1], 1), seed=1)
    fitting, head = timed(lambda: fit_logistic(x, y, PENALTY, noise))
    print(f"logistic: fitted in {fitting:.1f} s", flush=True)
    rows = {}
    for m in sizes:
        step, (new, bounds) = timed(lambda m=m: change_logistic(head, x[:m], y[:m]), repeats)
        scratch, again = timed(lambda m=m: fit_logistic(x[m:], y[m:], PENALTY, noise))
        warm, exact = timed(lambda m=m, new=new: refit(new, x[m:], y[m:]))
        rows[str(m)] = {
            "cpu seconds": {"step": step, "from scratch": scratch, "warm": warm},
            "from scratch / step": scratch / step, "warm / step": warm / step, "from scratch / warm": scratch / warm,
            "distance moved": float(np.linalg.norm(head.weights - again.weights)),
            "distance missed": float(np.linalg.norm(new.weights - again.weights)),
            "warm missed": float(np.linalg.norm(exact.weights - again.weights)),
            "data bound": bounds.data, "worst bound": bounds.worst, "epsilon spent": budget.spent_epsilon(new.residual),
            "MB allocated by the step": allocated(lambda m=m: change_logistic(head, x[:m], y[:m])),
        }  # fmt: skip
        print(m, rows[str(m)], flush=True)
    peer = LogisticRegression(C=1 / (PENALTY * len(x)), fit_intercept=False)
    peers, _ = timed(lambda: peer.fit(x[1:], y[1:, 0]))
    return {"fit": fitting, "removed": rows, "scikit-learn at its default tolerance": peers,
            "epsilon": budget.epsilon, "delta": budget.delta, "noise": budget.sigma,
            "MB allocated by training": allocated(lambda: refit(head, x, y))}  # fmt: skip


def ridge(x: np.ndarray, y: np.ndarray, sizes: list[int], repeats: int) -> dict[str, Any]:
    from repforget.linear import change_ridge, fit_ridge

    fitting, head = timed(lambda: fit_ridge(x, y, 1.0))
    rows = {}
    for m in sizes:
        step, new = timed(lambda m=m: change_ridge(head, x[:m], y[:m]), repeats)
        scratch, again = timed(lambda m=m: fit_ridge(x[m:], y[m:], 1.0))
        rows[str(m)] = {
            "cpu seconds": {"step": step, "from scratch": scratch}, "from scratch / step": scratch / step,
            "largest difference": float(np.abs(new.weights - again.weights).max()),
            "MB allocated by the step": allocated(lambda m=m: change_ridge(head, x[:m], y[:m])),
        }  # fmt: skip
        print(m, rows[str(m)], flush=True)
    return {"fit": fitting, "removed": rows}


def table(body: dict[str, Any]) -> str:
    lines = ["| head | rows out | step, s | from scratch, s | warm, s | from scratch / step |", "|---" * 6 + "|"]
    for name in ("logistic", "ridge"):
        for m, row in body[name]["removed"].items():
            s = row["cpu seconds"]
            warm = f"{s['warm']:.2f}" if "warm" in s else ""
            lines.append(f"| {name} | {m} | {s['step']:.4f} | {s['from scratch']:.2f} | {warm} | "
                         f"{row['from scratch / step']:.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    from threadpoolctl import threadpool_limits

    with threadpool_limits(args.threads):
        x, y, score = problem(args.rows, args.width)
        body = {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": args.threads,
                        "python": platform.python_version(), "numpy": np.__version__},
            "rows": args.rows, "width": args.width, "target": TARGET, "MB of rows": x.nbytes / 1e6,
            "ridge": ridge(x, score, args.sizes, args.repeats), "logistic": logistic(x, y, args.sizes, args.repeats),
        }  # fmt: skip
    print(table(body))
    missed = [f"{name}, {m} rows" for name in ("logistic", "ridge") for m, row in body[name]["removed"].items()
              if row["from scratch / step"] < TARGET]  # fmt: skip
    print(f"every ratio reaches {TARGET:g}" if not missed else f"below {TARGET:g}: {'; '.join(missed)}")
    args.out.write_text(json.dumps(body | {"missed": missed}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
