"""Memory while an edit is folded into a checkpoint on disk, beside its largest file.

    python experiments/speed/fold.py [--gigabytes 2] [--shard 500] [--folder FOLDER]

Generates a Llama checkpoint of random weights in bfloat16, makes an edit of rank 8 on every MLP output, folds it in a
process of its own and samples that process's memory: ``anonymous`` is what it allocates, ``resident`` also counts pages
of the files it reads, which the system takes back when others need them.  Writes fold.json here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, INNER, VOCABULARY = 2048, 8192, 32000


def generate(folder: Path, gigabytes: float, shard: int) -> None:
    """A checkpoint of about ``gigabytes`` in files of at most ``shard`` MB, and an edit for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    per_layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / per_layer))
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
                         num_attention_heads=16, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).to(torch.bfloat16)
    module.save_pretrained(folder / "base", max_shard_size=f"{shard}MB")
    from repforget.artifact import Edit
    from repforget.artifact.operations import LowRankDelta
    from repforget.models.load import wrap

    names = [f"model.layers.{k}.mlp.down_proj.weight" for k in range(layers)]
    operations = [LowRankDelta(n, 0.01 * torch.randn(WIDTH, 8), torch.randn(8, INNER)) for n in names]
    Edit.build("random", {}, wrap(module, None, "generated"), "none", operations).save(folder / "edit")


def fold(folder: Path) -> None:
    """Fold, sampling this process's memory; prints what it took above what was in use before."""
    import torch

    torch.set_num_threads(1)
    from repforget.artifact import load_edit
    from repforget.artifact.shards import Checkpoint, fold_checkpoint

    Checkpoint(folder / "base")  # imports and caches belong to no fold
    edit = load_edit(folder / "edit")
    peak, start, done = {"VmRSS": 0, "RssAnon": 0}, read(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            now = read()
            peak.update({key: max(value, now[key]) for key, value in peak.items()})
            time.sleep(0.002)

    watcher = threading.Thread(target=sample)
    watcher.start()
    began = time.process_time()
    found = fold_checkpoint(edit, folder / "base", folder / "folded")
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    print(json.dumps({"anonymous": (peak["RssAnon"] - start["RssAnon"]) * 1024,
                      "resident": (peak["VmRSS"] - start["VmRSS"]) * 1024, "cpu seconds": seconds,
                      "weights": len(found.touched)}))  # fmt: skip


def read() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard", type=int, default=500, help="MB per file")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--step", choices=["generate", "fold"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step == "generate":
        generate(chosen.folder, chosen.gigabytes, chosen.shard)
        return
    if chosen.step == "fold":
        fold(chosen.folder)
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        given = ["--gigabytes", str(chosen.gigabytes), "--shard", str(chosen.shard), "--folder", name]
        found = ""
        for step in ("generate", "fold"):
            command = [sys.executable, __file__, *given, "--step", step]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sizes = [p.stat().st_size for p in (Path(name) / "base").glob("*.safetensors")]
        same = {p.name: p.stat().st_size for p in (Path(name) / "folded").glob("*.safetensors")}
    body = {**json.loads(found.splitlines()[-1]), "checkpoint": sum(sizes), "largest file": max(sizes),
            "files": len(sizes)}  # fmt: skip
    if sum(same.values()) != sum(sizes):
        raise SystemExit("The folded checkpoint has another size than the base.")
    for key in ("anonymous", "resident"):
        body[f"{key} / largest file"] = round(body[key] / body["largest file"], 3)
    (HERE / "fold.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
