"""What a step of a trained editor costs, against a plain implementation of the same formulas: time and peak memory.

    OMP_NUM_THREADS=1 python experiments/speed/training.py                 # all methods, both vocabularies
    OMP_NUM_THREADS=1 python experiments/speed/training.py --methods npo --vocabularies 32000 --repeats 1

* ``plain``: as unlearning codes commonly do.  A copy of the model is the reference and runs in every step; forget and
  retain rows are padded to the longest of their batch and run one after the other, with the logits of all positions.
* ``ours``: the editor of that name, from its public call, with its defaults for everything that costs.

Both sides take the same rows in every step, train all weights (RMU: the MLP output projections of up to three layers;
the plain side, too, computes gradients for those alone) with the same AdamW, and must report the same losses.  Every
measurement is a process of its own, sides in turn, every other repeat the other one first: CPU seconds on one thread
per step after the first, and the growth of the peak resident memory over that of the process with the model alone.
A step is everything: both passes, clipping, the optimiser.  Not in the times: what is asked of the untouched model
once, before the first step (reported as ``before``), looking every 25 steps whether to stop (from then on the last good
state is one more copy of what is trained, in main memory; the plain side cannot go back), and storing the edit.
Ours copies, of the token embedding, only the rows of the tokens in the facts: 1,700 here, of 32 random texts; all of
TOFU has about 8,000, which would hold 65 MiB more.

The model is a random Llama, 512 wide, 8 layers, untied embeddings; its output embedding is scaled up until a
distribution is about as concentrated as that of a trained model, so that a teacher of the most likely outcomes holds
nearly all of it.  The rows have the lengths of 32 questions and answers drawn from the 4,000 of TOFU (arXiv 2401.06121;
prompt "Question: ...\\nAnswer:", byte-level BPE of 8,192 tokens trained on them), a draw whose mean length and padding
are those of the average batch of 16.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

WIDTH, LAYERS, INNER, HEADS = 512, 8, 1376, 8
CONCENTRATION = 20.0  # of the output embedding; logits get a standard deviation of about 9
# (tokens of the prompt with <bos>, tokens of the answer); the first half is forgotten, the second retained
LENGTHS = (
    (22, 30), (20, 39), (21, 61), (18, 64), (31, 35), (18, 21), (16, 43), (20, 23), (26, 42), (18, 27), (19, 18),
    (17, 35), (23, 37), (31, 13), (14, 22), (26, 27), (15, 15), (16, 44), (20, 33), (19, 29), (16, 40), (23, 19),
    (24, 35), (20, 57), (16, 50), (19, 30), (24, 27), (16, 22), (22, 56), (14, 15), (15, 27), (19, 32),
)  # fmt: skip
BATCH = len(LENGTHS) // 2
RATE, BETA2 = 1e-6, 0.98
RMU = {"layer": round(7 / 32 * LAYERS), "coefficient": 20.0, "weight": 100.0}
# method -> (editor, its settings)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "npo": ("npo", {"retain": "nll"}),
    "simnpo": ("simnpo", {"retain": "nll", "beta": 0.1}),
    "grad_diff_kl": ("grad_diff", {"retain": "kl"}),
    "rmu": ("rmu", {}),
}
SPEED = {"npo": 2.0, "simnpo": 1.5, "grad_diff_kl": 2.0, "rmu": 2.5}  # aims: plain time / ours, at least
MEMORY = {"npo": 0.6, "grad_diff_kl": 0.6}  # ours / plain, at most
AGREE = 1e-4  # largest difference of the losses, relative to the larger of the loss and 1


def build(vocabulary: int) -> Any:
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(CONCENTRATION)
    return model


def rows(vocabulary: int) -> list[tuple[list[int], int]]:
    """(token ids, where the answer starts) of every row: forget rows first."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [([1, *torch.randint(4, vocabulary, (p + a - 1,), generator=generator).tolist()], p) for p, a in LENGTHS]


# --- plain -------------------------------------------------------------------------------------------------------


def padded(chosen: list[tuple[list[int], int]]) -> dict[str, Any]:
    """Right-padded ids, mask, and labels that are -100 outside the answer."""
    import torch

    longest = max(len(ids) for ids, _ in chosen)
    ids, labels = torch.zeros(len(chosen), longest, dtype=torch.long), torch.full((len(chosen), longest), -100)
    mask = torch.zeros_like(ids)
    for row, (tokens, start) in enumerate(chosen):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_losses(model: Any, batch: dict[str, Any]) -> Any:
    """Cross-entropy [b, s - 1] of every shifted label, 0 where there is none."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return losses.view(labels.shape)


def counts(batch: dict[str, Any]) -> Any:
    return (batch["labels"][:, 1:] != -100).sum(1)


def plain_nll(model: Any, batch: dict[str, Any]) -> Any:
    return token_losses(model, batch).sum() / counts(batch).sum()


def plain_npo(model: Any, reference: Any, forget: Any, retain: Any, beta: float = 0.1) -> tuple[Any, Any]:
    """-(2 / beta) mean log sigmoid(-beta (log p - log p0)), sums per sequence, and the loss on retained rows."""
    import torch
    from torch.nn.functional import logsigmoid

    own = -token_losses(model, forget).sum(1)
    with torch.no_grad():
        before = -token_losses(reference, forget).sum(1)
    return -2 / beta * logsigmoid(-beta * (own - before)).mean(), plain_nll(model, retain)


def plain_simnpo(model: Any, _reference: Any, forget: Any, retain: Any, beta: float = 0.1) -> tuple[Any, Any]:
    """-(2 / beta) mean log sigmoid(beta l), l the mean loss per token of a sequence."""
    from torch.nn.functional import logsigmoid

    mean = token_losses(model, forget).sum(1) / counts(forget)
    return -2 / beta * logsigmoid(beta * mean).mean(), plain_nll(model, retain)


def plain_grad_diff_kl(model: Any, reference: Any, forget: Any, retain: Any) -> tuple[Any, Any]:
    """Ascent on the forget answers, and KL(reference, model) per retained answer token."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    ascent = -plain_nll(model, forget)
    arguments = {"input_ids": retain["input_ids"], "attention_mask": retain["attention_mask"], "use_cache": False}
    own = log_softmax(model(**arguments).logits[:, :-1].float(), -1)
    with torch.no_grad():
        before = log_softmax(reference(**arguments).logits[:, :-1].float(), -1)
    chosen = retain["labels"][:, 1:] != -100
    return ascent, kl_div(own, before, log_target=True, reduction="none").sum(-1)[chosen].mean()


def plain_rmu(model: Any, reference: Any, forget: Any, retain: Any) -> tuple[Any, Any]:
    """States of forget rows to one random direction, of retained rows to where they were; first token left out."""
    import torch

    caught: list[Any] = []

    def states(module: Any, batch: dict[str, Any]) -> Any:
        layer = module.model.layers[RMU["layer"]]
        handle = layer.register_forward_hook(
            lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
        module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        handle.remove()
        mask = batch["attention_mask"].bool().clone()
        mask[:, 0] = False
        return caught.pop()[mask]

    draw = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = RMU["coefficient"] * (draw / draw.norm()).float()
    steered = (states(model, forget) - target).square().mean()
    with torch.no_grad():
        before = states(reference, retain)
    return steered, RMU["weight"] * (states(model, retain) - before).square().mean()


def run_plain(method: str, vocabulary: int, steps: int) -> dict[str, Any]:
    """Steps of the plain side: losses before each, CPU seconds of each, peak memory."""
    import copy

    import torch

    model = loaded(vocabulary).module
    base = peak()
    every = rows(vocabulary)
    forget, retain = padded(every[:BATCH]), padded(every[BATCH:])
    function = {"npo": plain_npo, "simnpo": plain_simnpo, "grad_diff_kl": plain_grad_diff_kl, "rmu": plain_rmu}[method]
    start = time.process_time()
    reference = None if method == "simnpo" else copy.deepcopy(model)
    if method == "rmu":
        trained = [f"layers.{k}.mlp.down_proj" for k in range(max(0, RMU["layer"] - 2), RMU["layer"] + 1)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, BETA2), weight_decay=0.0)
    marks, losses = [time.process_time()], []
    for _ in range(steps):
        parts = function(model, reference, forget, retain)
        losses.append([float(part.detach()) for part in parts])
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del parts
        marks.append(time.process_time())
    return {"losses": losses, "seconds": _gaps(marks)[1:], "before": marks[0] - start, "peak": peak(), "base": base}


class Enough(Exception):
    """All that is measured was seen."""


# --- ours --------------------------------------------------------------------------------------------------------


def run_ours(method: str, vocabulary: int, steps: int) -> dict[str, Any]:
    """The same steps by the public editor."""
    from repforget.discover import method as lookup
    from repforget.edit.train._engine import Engine
    from repforget.knowledge import EditData, Fact

    model = loaded(vocabulary)
    base = peak()
    texts = [(" ".join(f"w{t}" for t in ids[1:start]), "".join(f" w{t}" for t in ids[start:]))
             for ids, start in rows(vocabulary)]  # fmt: skip
    facts = [Fact(f"row-{i}#0", f"row-{i}", "", "", *text) for i, text in enumerate(texts)]
    data = EditData(tuple(facts[:BATCH]), tuple(facts[BATCH:]), (), {}, "0" * 64)
    marks: list[float] = []
    high: list[float] = []
    losses: list[list[float]] = []

    def progress(items: Iterable[Any], description: str, _total: int | None) -> Iterator[Any]:
        for item in items:
            if description == "training":
                marks.append(time.process_time())
                high.append(peak())
                if len(marks) > steps:
                    raise Enough
            yield item

    plain = Engine.gradients

    def noted(self: Any, index: int, sides: Any) -> Any:
        found = plain(self, index, sides)
        losses.append([self.losses["forget"], self.losses["retain"]])
        return found

    Engine.gradients = noted  # type: ignore[method-assign]
    name, settings = METHODS[method]
    start = time.process_time()
    with suppress(Enough):
        lookup("edit", name).function(
            model, data, seed=0, progress=progress, steps=steps + 1, batch_size=BATCH, lr=RATE, schedule="constant",
            warmup=0, **settings,
        )  # fmt: skip
    return {"losses": losses, "seconds": _gaps(marks)[1:], "before": marks[0] - start, "peak": high[-1], "base": base}


def loaded(vocabulary: int) -> Any:
    """The model of both sides with a tokenizer that has one word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from repforget.models.load import wrap

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                        unk_token="<unk>")  # fmt: skip
    return wrap(build(vocabulary), tokenizer)


# --- both --------------------------------------------------------------------------------------------------------


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _gaps(marks: list[float]) -> list[float]:
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


SIDES: dict[str, Callable[[str, int, int], dict[str, Any]]] = {"plain": run_plain, "ours": run_ours}


def measured(side: str, method: str, vocabulary: int, steps: int) -> dict[str, Any]:
    """One side of one method in a process of its own."""
    command = [sys.executable, __file__, "--child", side, "--methods", method, "--vocabularies", str(vocabulary),
               "--steps", str(steps)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(method: str, vocabulary: int, steps: int, repeats: int) -> dict[str, Any]:
    """Both sides in turn, ``repeats`` times, each time the other one first; medians, and ratios of each repeat."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(repeats):
        for side in list(SIDES)[:: -1 if number % 2 else 1]:
            runs[side].append(measured(side, method, vocabulary, steps))
    real = sum(p + a for p, a in LENGTHS)
    row: dict[str, Any] = {"method": method, "vocabulary": vocabulary, "steps": steps, "repeats": repeats,
                           "load": round(os.getloadavg()[0], 1)}  # fmt: skip
    for side, found in runs.items():
        seconds = [s for run in found for s in run["seconds"]]
        row[side] = {
            "seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)],
            "tokens_per_second": real / statistics.median(seconds),
            "before_seconds": statistics.median(run["before"] for run in found),
            "peak_mib": statistics.median(run["peak"] for run in found),
            "base_mib": statistics.median(run["base"] for run in found),
            "growth_mib": statistics.median(run["peak"] - run["base"] for run in found), "losses": found[0]["losses"],
        }  # fmt: skip
    ours, plain = row["ours"], row["plain"]
    row["speed"] = plain["seconds"] / ours["seconds"]
    row["memory"], row["memory_raw"] = ours["growth_mib"] / plain["growth_mib"], ours["peak_mib"] / plain["peak_mib"]
    pairs = list(zip(runs["plain"], runs["ours"], strict=True))
    times = [statistics.median(p["seconds"]) / statistics.median(o["seconds"]) for p, o in pairs]
    grown = [(o["peak"] - o["base"]) / (p["peak"] - p["base"]) for p, o in pairs]
    row["speed_spread"], row["memory_spread"] = [min(times), max(times)], [min(grown), max(grown)]
    row["gap"] = gap(plain["losses"], ours["losses"])
    return row


def gap(left: list[list[float]], right: list[list[float]]) -> list[float]:
    """Largest difference of the losses at each step, relative to the larger of the loss and 1."""
    return [max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(x, y, strict=True))
            for x, y in zip(left, right, strict=True)]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    method = row["method"]
    aims = f"aim {SPEED[method]}" + (f", {MEMORY[method]}" if method in MEMORY else "")
    verdict = "" if row["gap"][0] <= AGREE else "  THE LOSSES DIFFER"
    return (
        f"{method:13s} {row['vocabulary']:7d}  s/step {row['plain']['seconds']:7.2f} {row['ours']['seconds']:7.2f}"
        f"  tokens/s {row['plain']['tokens_per_second']:6.0f} {row['ours']['tokens_per_second']:6.0f}"
        f"  x{row['speed']:5.2f} ({row['speed_spread'][0]:.2f} to {row['speed_spread'][-1]:.2f})"
        f"  peak MiB {row['plain']['peak_mib']:6.0f} {row['ours']['peak_mib']:6.0f} ({row['memory_raw']:.2f})"
        f"  growth {row['plain']['growth_mib']:6.0f} {row['ours']['growth_mib']:6.0f} ({row['memory']:.2f},"
        f" {row['memory_spread'][0]:.2f} to {row['memory_spread'][1]:.2f})"
        f"  losses {row['gap'][0]:.1e}  [{aims}]{verdict}"
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names the computer."""
    import platform

    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000, 128256])
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep what --out says of other methods and vocabularies")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(SIDES[chosen.child](chosen.methods[0], chosen.vocabularies[0], chosen.steps)))
        return
    asked = [(vocabulary, method) for vocabulary in chosen.vocabularies for method in chosen.methods]
    old = json.loads(chosen.out.read_text())["rows"] if chosen.add else []
    found = [row for row in old if (row["vocabulary"], row["method"]) not in asked]
    for vocabulary, method in asked:
        found.append(compare(method, vocabulary, chosen.steps, chosen.repeats))
        print(line(found[-1]), flush=True)
        chosen.out.write_text(json.dumps({"machine": machine(), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
