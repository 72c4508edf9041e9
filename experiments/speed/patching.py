"""Exact patching of every head and MLP of the organism: begun at the patched block and batched over components, against
one forward per component.

    python experiments/speed/patching.py [--pairs 64] [--repeats 3]

Both sides are repforget's own hooks on one thread and CPU time; ``per component`` runs all pairs at once, but one
component at a time, and ``per component and pair`` is the plain loop.  Attribution patching of the same nodes (eight
midpoint steps, and one gradient) stands beside them with its Pearson correlation.  ``limit`` is what counting blocks
allows against ``per component`` (attention as a third of a block), here and for deeper models of such blocks.  Writes
patching.json here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent


def plain(model: Any, runs: Any, components: Any, size: int) -> np.ndarray:
    """One forward per component on batches of ``size`` pairs, donor activations captured once per batch."""
    from repforget.causal import answer_metric, columns_of, prepare
    from repforget.models.capture import capture, hooks

    located = [columns_of(model, c) for c in components]
    found = np.zeros((len(components), len(runs)))
    for first in range(0, len(runs), size):
        some = runs[first : first + size]
        (item,) = prepare(model, some)
        values = capture(model, sorted({site for site, _ in located}), item.donor, gather="all")
        for k, (site, columns) in enumerate(located):
            def write(x: torch.Tensor, value: Any = values[site], span: Any = columns, at: Any = item.where) -> Any:
                out, part = x.clone(), slice(None) if span is None else slice(span.start, span.stop)
                out[:, :, part] = torch.where(at, value[:, :, part], x[:, :, part])
                return out

            with torch.no_grad(), hooks(model, {site: write}):
                scores = answer_metric(model, item.base, item, "logprob").numpy()
            found[k, [first + row for row in item.rows]] = scores
    return found


def limit(model: Any, components: Any, depth: int) -> float:
    """Blocks of one forward per component and one of the donor, over those of two passes and all begun ones."""
    from repforget.causal import patch_plan
    from repforget.models.resume import start_of
    from repforget.models.sites import site_map

    layers = model.n_layers
    saved = [start_of(site_map(model.module), patch_plan(model, (c,))).blocks - c.site.layer for c in components]
    mean = (depth - 1) / 2 + float(np.mean(saved))  # blocks saved per component
    count = len(components) * depth / layers
    return (count + 1) * depth / (2 * depth + count * (depth - mean))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    from repforget.causal import patch_scores
    from repforget.knowledge_files import load_knowledge
    from repforget.locate._tasks import corrupted_tasks
    from repforget.locate._units import expand_nodes
    from repforget.locate.attribution_patching import node_attributions
    from repforget.models.load import load

    model = load("organism:bios")
    (task,), _ = corrupted_tasks(model, load_knowledge("bios-people"), 0, items=chosen.pairs)
    runs, components = task.forget[: chosen.pairs], expand_nodes(model, ["heads", "mlp_out"])
    patches = [(c,) for c in components]
    base = patch_scores(model, runs, [()])[0]
    work: dict[str, Callable[[], Any]] = {
        "batched": lambda: patch_scores(model, runs, patches),
        "per component": lambda: plain(model, runs, components, len(runs)),
        "per component and pair": lambda: plain(model, runs, components, 1),
        "attribution, 8 steps": lambda: node_attributions(model, runs, components, steps=8),
        "attribution, 1 step": lambda: node_attributions(model, runs, components),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    found: dict[str, Any] = {}
    for _ in range(chosen.repeats):
        for name, run in work.items():  # side by side, in turn
            spent, found[name] = timed(run)
            seconds[name].append(spent)
    exact = found["batched"]
    for name in ("per component", "per component and pair"):
        gap = float(np.abs(found[name] - exact).max())
        if gap > 1e-3:
            raise SystemExit(f"'{name}' differs by {gap:.1e} from the batched scores.")
    moved = (exact - base).mean(axis=1)
    pearson = {n: float(np.corrcoef(found[n].mean(axis=1), moved)[0, 1]) for n in work if n.startswith("attribution")}
    body = {
        "pairs": len(runs), "components": len(components), "seconds": {n: median(s) for n, s in seconds.items()},
        "all seconds": seconds, "pearson with exact": pearson,
        "limit": {f"{depth} layers": limit(model, components, depth) for depth in (4, 12, 32)},
        "batched against": {n: median(seconds[n]) / median(seconds["batched"]) for n in work if n != "batched"},
    }  # fmt: skip
    (HERE / "patching.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
