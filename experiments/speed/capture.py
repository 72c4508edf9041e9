"""What reading activations costs: process CPU time on one thread, all rows interleaved in one run.

    python experiments/speed/capture.py             # measure, print, write capture.json
    python experiments/speed/capture.py --repeats 5

Each row is timed in every repeat, one after another, so that a busy machine hits all rows alike; the table
gives medians and the ratio to the bare forward pass. Peak memory is measured in child processes, one per size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = {  # name -> (width, layers, heads, vocabulary, rows, length)
    "llama 12 x 256, 8 x 64 tokens": (256, 12, 8, 8192, 8, 64),
    "llama 12 x 64, 1 x 16 tokens": (64, 12, 4, 1024, 1, 16),
}
AIMED = "llama 12 x 256, 8 x 64 tokens"  # the smaller model shows the fixed cost per call, without a target
TARGETS = {"capture, all resid_post, last token": 1.05, "capture, early exit at a quarter": 0.30}


def build(width: int, layers: int, heads: int, vocabulary: int, rows: int, length: int) -> tuple[Any, Any]:
    """A random Llama and a right-padded batch for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from repforget.models.capture import Batch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, intermediate_size=3 * width, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    lengths = [length - 3 * (row % 4) for row in range(rows)]
    return model, Batch.pad([torch.randint(3, vocabulary, (n,)).tolist() for n in lengths])


def calls(model: Any, batch: Any) -> dict[str, Callable[[], Any]]:
    """Every way of running the model that the table compares."""
    import torch

    from repforget.models.bridge import lens_source
    from repforget.models.capture import capture
    from repforget.records import Site

    layers = model.config.num_hidden_layers
    posts = [Site("resid_post", layer) for layer in range(layers)]
    bridge = lens_source(model).bridge
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    arguments = {"attention_mask": batch.mask, "position_ids": batch.position_ids, "use_cache": False}

    def lens(stop: int | None) -> Any:
        return bridge.run_with_cache(
            batch.ids, attention_mask=batch.mask, names_filter=names[:stop], stop_at_layer=stop,
            return_cache_object=False,
        )  # fmt: skip

    rows: dict[str, Callable[[], Any]] = {
        "forward, with logits": lambda: model(batch.ids, **arguments),
        "forward, without the vocabulary": lambda: model.model(batch.ids, **arguments),
        "forward, again": lambda: model(batch.ids, **arguments),
        "capture, all resid_post, last token": lambda: capture(model, posts, batch),
        "capture, all resid_post, mean": lambda: capture(model, posts, batch, "mean"),
        "capture, all resid_post and logits, last token": lambda: capture(model, [*posts, Site("logits")], batch),
        "capture, early exit at a quarter": lambda: capture(model, posts[: layers // 4], batch),
        "TransformerLens run_with_cache, all resid_post": lambda: lens(None),
        "TransformerLens, stop at a quarter": lambda: lens(layers // 4),
    }

    def without_gradient(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call()

        return run

    return {name: without_gradient(call) for name, call in rows.items()}


def agreement(model: Any, batch: Any) -> float:
    """Largest difference between what capture and TransformerLens read, so that equal things are timed."""
    import torch

    from repforget.models.bridge import lens_source
    from repforget.models.capture import capture
    from repforget.records import Site

    layers = model.config.num_hidden_layers
    posts = [Site("resid_post", layer) for layer in range(layers)]
    ours = capture(model, posts, batch)
    with torch.no_grad():
        theirs = lens_source(model).bridge.run_with_cache(
            batch.ids, attention_mask=batch.mask, names_filter=[f"blocks.{i}.hook_resid_post" for i in range(layers)],
            return_cache_object=False,
        )[1]  # fmt: skip
    rows = torch.arange(len(batch))
    gaps = [(ours[s] - theirs[f"blocks.{s.layer}.hook_resid_post"][rows, batch.last]).abs().max() for s in posts]
    return float(torch.stack(gaps).max())


def measure(rows: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Interleaved process CPU times in seconds; one warm-up of every row first."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name, call in rows.items():
            start = time.process_time()
            call()
            if repeat:
                times[name].append(time.process_time() - start)
    return times


def child(how: str, batches: int) -> None:
    """Stream ``batches`` batches and print the growth of the peak resident memory in MiB."""
    import torch

    from repforget.models.capture import Batch, capture, stream
    from repforget.records import Site
    from repforget.stats import Statistics

    torch.set_num_threads(1)
    model, batch = build(256, 4, 8, 1024, 8, 64)
    posts = [Site("resid_post", layer) for layer in range(4)]
    collected = {site: Statistics.empty(256) for site in posts}
    kept: list[Any] = []

    def consume(values: dict[Site, Any], _index: int) -> None:
        for site, value in values.items():
            collected[site].update(value)

    def batches_of(n: int) -> Any:
        return (Batch(batch.ids.roll(k, 0), batch.mask.roll(k, 0)) for k in range(n))

    stream(model, posts, batches_of(2), "tokens", consume)  # warm up before the baseline
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if how == "stream":
        stream(model, posts, batches_of(batches), "tokens", consume)
    else:
        kept.extend(capture(model, posts, each, "all") for each in batches_of(batches))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Peak memory growth of streamed statistics and of keeping everything, for several numbers of batches."""
    found = []
    for size in sizes:
        row: dict[str, float] = {"batches": size, "tokens": size * 8 * 64}
        for how in ("stream", "keep"):
            command = [sys.executable, __file__, "--child", how, "--batches", str(size)]
            row[f"{how}_mib"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found.append(row)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names the computer."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    lines = []
    for name, entry in report["models"].items():
        lines += [f"\n{name} (largest difference to TransformerLens {entry['agreement']:.1e})",
                  f"  {'':52s}{'ms CPU':>10s}{'ratio':>8s}{'target':>8s}"]  # fmt: skip
        for row, cell in entry["rows"].items():
            target = f"{cell['target']:.2f}" if cell["target"] else ""
            lines.append(f"  {row:52s}{cell['milliseconds']:10.2f}{cell['ratio']:8.2f}{target:>8s}")
    lines.append("\npeak memory growth, MiB (4 layers x 256 wide)")
    lines += [f"  {row['batches']:5.0f} batches, {row['tokens']:7.0f} tokens: streamed {row['stream_mib']:7.1f}, "
              f"kept {row['keep_mib']:7.1f}" for row in report["memory"]]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--child", choices=("stream", "keep"), help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.batches)
        return
    import torch

    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "repeats": chosen.repeats, "models": {}}
    for name, sizes in MODELS.items():
        model, batch = build(*sizes)
        times = measure(calls(model, batch), chosen.repeats)
        base = statistics.median(times["forward, with logits"])
        rows = {row: {"milliseconds": 1000 * statistics.median(t), "ratio": statistics.median(t) / base,
                      "target": TARGETS.get(row) if name == AIMED else None} for row, t in times.items()}  # fmt: skip
        report["models"][name] = {"agreement": agreement(model, batch), "rows": rows}
    report["memory"] = memory((16, 64, 128))
    print(table(report))
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
