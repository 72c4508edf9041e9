"""Speed of the all-layer probing sweep against a loop of scikit-learn fits that fills the same table.

Both sides report, per layer: accuracy under grouped cross-validation with the penalty chosen by inner grouped
validation, the shuffled-label floor, and the control task with its reference.  Both use one thread, the same folds,
labels and penalties, and run in turn; times are CPU seconds, medians over the repeats.

    OMP_NUM_THREADS=1 python experiments/speed/probing.py
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression

from repforget.probing import fit_sweep
from repforget.probing.fitting import GRID
from repforget.probing.folds import control_labels, grouped_folds, row_folds, shuffled_labels
from repforget.probing.inputs import standardise

FOLDS, SEED, ROWS, PER_PERSON = 5, 0, 2000, 5
#        name, layers, width, classes, penalties, repeats
CASES = [
    ("binary", 24, 512, 2, GRID, 3),
    ("binary, wide", 6, 1024, 2, GRID, 3),
    ("32 classes", 2, 512, 32, GRID, 3),
    ("binary, one penalty", 24, 512, 2, (1e-2,), 3),
    ("32 classes, one penalty", 2, 512, 32, (1e-2,), 3),
]


def activations(layers: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotated power-law noise, one vector per person, and class means whose strength grows with the layer."""
    rng = np.random.default_rng(SEED)
    groups = np.repeat(np.arange(ROWS // PER_PERSON), PER_PERSON)
    labels = rng.integers(0, classes, ROWS // PER_PERSON)[groups]
    spectrum = np.arange(1, width + 1) ** -0.5
    out = np.empty((layers, ROWS, width), dtype=np.float32)
    for layer in range(layers):
        turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
        means = rng.standard_normal((classes, width)) * (0.3 if classes > 2 else 0.1) * (layer + 0.5) / layers
        person = 0.3 * rng.standard_normal((ROWS // PER_PERSON, width))
        noise = rng.standard_normal((ROWS, width))
        out[layer] = ((noise + person[groups] + means[labels]) * spectrum) @ turn
    return out, labels, groups


def loop(x: np.ndarray, labels: np.ndarray, groups: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """The same table [4, layers] (property, shuffled, seen, control) by one scikit-learn fit at a time."""
    fold = grouped_folds(labels, groups, FOLDS, np.random.default_rng([SEED, 0]))
    shuffled = shuffled_labels(labels, groups, np.random.default_rng([SEED, 1]))
    within = row_folds(groups, FOLDS, np.random.default_rng([SEED, 2]))
    drawn = control_labels(labels, groups, np.random.default_rng([SEED, 3]))
    tasks = [(labels, fold), (shuffled, fold), (labels, within), (drawn, within)]
    table = np.zeros((len(tasks), len(x)))
    for layer in range(len(x)):
        features = standardise(torch.from_numpy(x[layer : layer + 1]))[0].numpy()

        def right(train: np.ndarray, test: np.ndarray, y: np.ndarray, penalty: float, features: Any = features) -> int:
            model = LogisticRegression(C=1 / (penalty * train.sum()), max_iter=1000)
            return int((model.fit(features[train], y[train]).predict(features[test]) == y[test]).sum())

        for outer in range(FOLDS):
            inner = [f for f in range(FOLDS) if f != outer]
            best = max(
                sorted(grid, reverse=True),
                key=lambda p: sum(right((fold != outer) & (fold != f), fold == f, labels, p) for f in inner)
                if len(grid) > 1 else 0,
            )  # fmt: skip
            for k, (y, split) in enumerate(tasks):
                table[k, layer] += right(split != outer, split == outer, y, best) / len(labels)
    return table


def sweep(x: np.ndarray, labels: np.ndarray, groups: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    found = fit_sweep(x, labels, groups, folds=FOLDS, seed=SEED, l2=grid)
    return np.stack([found.accuracy, found.shuffled, found.seen, found.control])


def timed(function: Callable[..., np.ndarray], *arguments: Any) -> tuple[float, np.ndarray]:
    start = time.process_time()
    table = function(*arguments)
    return time.process_time() - start, table


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(name: str, layers: int, width: int, classes: int, grid: tuple[float, ...], repeats: int) -> dict[str, Any]:
    data = activations(layers, width, classes)
    grid = tuple(p * 2 / classes for p in grid)
    sweep(data[0][:1], *data[1:], grid)  # warm up the thread pool and the allocator
    mine, theirs = [], []
    for _ in range(repeats):
        ours, fast = timed(sweep, *data, grid)
        base, slow = timed(loop, *data, grid)
        mine.append(ours)
        theirs.append(base)
    gap = 100 * (fast - slow)
    return {
        "case": name, "layers": layers, "rows": ROWS, "width": width, "classes": classes, "folds": FOLDS,
        "penalties": list(grid), "repeats": repeats, "repforget_cpu_s": round(float(np.median(mine)), 3),
        "loop_cpu_s": round(float(np.median(theirs)), 3),
        "ratio": round(float(np.median(theirs) / np.median(mine)), 2),
        "ratio_range": [round(float(min(np.divide(theirs, mine))), 2), round(float(max(np.divide(theirs, mine))), 2)],
        "accuracy_repforget": round(float(fast[0].mean()), 4), "accuracy_loop": round(float(slow[0].mean()), 4),
        "gap_points_by_task": [round(float(g), 2) for g in gap.mean(1)],
        "largest_layer_gap_points": round(float(np.abs(gap[0]).max()), 2),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    results = []
    for case in CASES:
        if wanted and case[0] not in wanted:
            continue
        results.append(compare(*case))
        row = results[-1]
        print(f"{row['case']:>24}: {row['ratio']:5.1f}x ({row['loop_cpu_s']:.1f} s -> {row['repforget_cpu_s']:.1f} s), "
              f"accuracy {row['accuracy_loop']:.3f} -> {row['accuracy_repforget']:.3f}", flush=True)  # fmt: skip
    machine = {
        "cpu": cpu(), "cores": os.cpu_count(), "threads": 1, "clock": "CPU seconds of the process",
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }  # fmt: skip
    if not wanted:
        path = Path(__file__).with_suffix(".json")
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
