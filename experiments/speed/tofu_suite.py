"""Speed of the TOFU forget10 suite: every metric by its own passes against one shared pass per sequence.

Both sides score the same items with the same model, on one thread, in one run, and must give the same numbers.

* ``apart``: as evaluation codes commonly do. Each metric tokenises, pads in file order (32 rows) and forwards its
  items by itself, with the logits and log-softmax of all positions; min-k++ takes two passes; texts come from the
  library's ``generate`` in batches in file order, each until its last text is complete; ROUGE from its library.
* ``shared``: ``token_scores``, ``generate`` and ``rouge_l`` of repforget; as far as a text is the right answer, by the
  teacher forcing that was done already, it is not decoded again.

The model is a small Llama trained in this script on the questions of all sets but the holdout, --epochs times. What
the texts cost depends on how long they are and on how much of the right answers the model says, so both are
reported: after 30 epochs it knows most answers, as the model before unlearning does; after 5 it ends its answers
but knows few of them; with --untrained no text ever ends, as after an edit that breaks the model, and there is
little to gain. Times are CPU seconds of the
process and contain tokenisation. They say nothing about accelerators, where idle rows and small passes cost
differently.

    OMP_NUM_THREADS=1 python experiments/speed/tofu_suite.py [--items 40] [--out experiments/speed/tofu_suite.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from repforget.models.load import LoadedModel, wrap
from repforget.organism.tofu_files import tables
from repforget.organism.world import make_world
from repforget.scoring import encode_many, generate, metrics, token_scores
from repforget.scoring import rouge as scoring_rouge
from repforget.scoring.encode import _MEMO
from repforget.training import Example, finetune

DATA = Path(__file__).parents[3] / "shared/data/tofu"
SETS = {"forget": "forget10_perturbed", "retain": "retain_perturbed", "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed", "holdout": "retain90"}  # fmt: skip
HELD_OUT = 400  # rows of retain90: non-members for the membership scores, in place of the hub's holdout10
BATCH, NEW_TOKENS, MIN_K = 32, 200, 0.4
Rows = list[dict[str, Any]]
Values = dict[str, np.ndarray]
Pairs = Sequence[tuple[str, str]]


def load(folder: Path, items: int | None) -> tuple[dict[str, Rows], str]:
    """The five sets, evenly thinned to ``items`` rows each: TOFU where its files are, else the organism's world."""
    if all((folder / f"{name}.json").exists() for name in SETS.values()):
        read = {s: [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines() if line]
                for s, name in SETS.items()}  # fmt: skip
        source = "TOFU"
    else:
        world = tables(make_world(0))
        read, source = {s: list(world[name]) for s, name in SETS.items()}, "organism"  # type: ignore[arg-type]
    read["holdout"] = read["holdout"][-HELD_OUT:]
    if items is None:
        return read, source
    kept = {s: np.linspace(0, len(rows) - 1, min(items, len(rows))).astype(int) for s, rows in read.items()}
    return {s: [read[s][k] for k in rows] for s, rows in kept.items()}, source


def prompt(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def asked(rows: Rows, field: str, k: int | None = None) -> list[tuple[str, str]]:
    return [(prompt(row), " " + (row[field] if k is None else row[field][k])) for row in rows]


# --- the model ---------------------------------------------------------------------------------------------------


def small_model(sets: dict[str, Rows], *, vocabulary: int, width: int, layers: int, epochs: int) -> LoadedModel:
    """A Llama with byte-level BPE of these texts, trained on the questions and right answers of the member sets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    pairs = [pair for name, rows in sets.items() if name != "holdout" for pair in asked(rows, "answer")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    texts = [p + a for rows in sets.values() for p, a in asked(rows, "answer")]
    texts += [x for rows in sets.values() for row in rows for x in row.get("perturbed_answer", ())]
    core.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config)
    if epochs:
        encoded = encode_many(tokenizer, pairs, eos=True)
        examples = [Example(e.ids, tuple(i >= e.start for i in range(len(e.ids)))) for e in encoded]
        finetune(module, examples, steps=epochs * len(examples) // 16, lr=7e-4, seed=0, batch_size=16, warmup=10)
    return wrap(module.eval(), tokenizer)


# --- apart: every metric by itself -------------------------------------------------------------------------------


def forwards(model: LoadedModel, pairs: Pairs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [b, s - 1, V] of all positions and their labels (-100 before the answer), 32 rows in file order."""
    for at in range(0, len(pairs), BATCH):
        rows = encode_fresh(model.tokenizer, pairs[at : at + BATCH])
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for k, (tokens, start) in enumerate(rows):
            ids[k, : len(tokens)], mask[k, : len(tokens)] = torch.tensor(tokens), 1
            labels[k, start : len(tokens)] = ids[k, start : len(tokens)]
        with torch.no_grad():
            logits = model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        yield logits[:, :-1], labels[:, 1:]


def encode_fresh(tokenizer: Any, pairs: Pairs) -> list[tuple[list[int], int]]:
    coded = tokenizer([p + a for p, a in pairs], return_offsets_mapping=True)
    starts = [next(k for k, (_, end) in enumerate(offsets) if end > len(p))
              for (p, _), offsets in zip(pairs, coded["offset_mapping"], strict=True)]  # fmt: skip
    return [([*ids, tokenizer.eos_token_id], start) for ids, start in zip(coded["input_ids"], starts, strict=True)]


def mean_losses(model: LoadedModel, pairs: Pairs) -> np.ndarray:
    out = []
    for logits, labels in forwards(model, pairs):
        each = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        out.append(each.view(labels.shape).double().sum(1) / (labels != -100).sum(1))
    return torch.cat(out).numpy()


def hit_rows(model: LoadedModel, pairs: Pairs) -> list[np.ndarray]:
    return [(row.argmax(-1) == want)[want != -100].numpy()
            for logits, labels in forwards(model, pairs) for row, want in zip(logits, labels, strict=True)]  # fmt: skip


def token_rows(model: LoadedModel, pairs: Pairs) -> list[torch.Tensor]:
    out = []
    for logits, labels in forwards(model, pairs):
        chosen = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        out += [row[want != -100] for row, want in zip(chosen, labels, strict=True)]
    return out


def lowest(values: np.ndarray) -> float:
    return float(np.sort(values)[: max(1, int(MIN_K * len(values)))].mean())


def standard_scores(model: LoadedModel, pairs: Pairs) -> np.ndarray:
    """min-k++ with a second pass for the mean and variance at each position."""
    chosen, out = token_rows(model, pairs), []
    for logits, labels in forwards(model, pairs):
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        mu = (p * log_p).sum(-1)
        sigma = ((p * log_p.square()).sum(-1) - mu.square()).clamp(min=1e-6).sqrt()
        for m, s, want in zip(mu, sigma, labels, strict=True):
            kept = want != -100
            out.append(lowest(((chosen[len(out)] - m[kept]) / s[kept]).double().numpy()))
    return np.array(out)


def truth_ratios(model: LoadedModel, rows: Rows, right: str) -> np.ndarray:
    wrong = [mean_losses(model, asked(rows, "perturbed_answer", k)) for k in range(len(rows[0]["perturbed_answer"]))]
    return np.exp(mean_losses(model, asked(rows, right)) - np.mean(wrong, 0))


def options(model: LoadedModel, rows: Rows) -> Values:
    """Both metrics of a set with options come from one pass over each, as the released suite has it."""
    right = mean_losses(model, asked(rows, "answer"))
    wrong = np.stack([mean_losses(model, asked(rows, "perturbed_answer", k))
                      for k in range(len(rows[0]["perturbed_answer"]))])  # fmt: skip
    p = np.exp(-right)
    return {"probability": p / (p + np.exp(-wrong).sum(0)), "truth_ratio": np.exp(right - wrong.mean(0))}


def extraction(hits: np.ndarray) -> float:
    for k in range(len(hits) + 1):
        if hits[k:].all():
            return 1 - k / len(hits)
    return 0.0


def memberships(model: LoadedModel, rows: Rows) -> Values:
    pairs = asked(rows, "answer")
    sizes = np.array([len(zlib.compress(row["answer"].encode())) for row in rows])
    return {
        "loss": -mean_losses(model, pairs),
        "zlib": -mean_losses(model, pairs) / sizes,
        "min_k": np.array([lowest(x.double().numpy()) for x in token_rows(model, pairs)]),
        "min_k_plus_plus": standard_scores(model, pairs),
    }


def forced_apart(model: LoadedModel, name: str, rows: Rows, _: list[np.ndarray]) -> Values:
    if name == "holdout":
        return memberships(model, rows)
    if name in ("real_authors", "world_facts"):
        return options(model, rows)
    pairs = asked(rows, "answer")
    out = {"probability": np.exp(-mean_losses(model, pairs)),
           "truth_ratio": truth_ratios(model, rows, "paraphrased_answer")}  # fmt: skip
    if name == "forget":
        out["exact_memorization"] = np.array([h.mean() for h in hit_rows(model, pairs)])
        out["extraction_strength"] = np.array([extraction(h) for h in hit_rows(model, pairs)])
        out |= memberships(model, rows)
    return out


def texts_apart(model: LoadedModel, prompts: list[str], _: list[str], __: list[np.ndarray]) -> list[str]:
    said = []
    for at in range(0, len(prompts), BATCH):
        batch = model.tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, padding_side="left",
                                return_token_type_ids=False)  # fmt: skip
        with torch.no_grad():
            ids = model.module.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        said += model.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def rouge_apart(answers: list[str], texts: list[str]) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(a, t)["rougeL"].recall for a, t in zip(answers, texts, strict=True)])


# --- shared: one pass --------------------------------------------------------------------------------------------


def forced_shared(model: LoadedModel, name: str, rows: Rows, hits: list[np.ndarray]) -> Values:
    n, wrong = len(rows), len(rows[0].get("perturbed_answer", ()))
    pairs = asked(rows, "answer") + [p for k in range(wrong) for p in asked(rows, "perturbed_answer", k)]
    pairs += asked(rows, "paraphrased_answer") if name in ("forget", "retain") else []
    attacked = name in ("forget", "holdout")
    s = token_scores(model, pairs, eos=True, moments=[attacked and k < n for k in range(len(pairs))])
    hits += s.hits[:n]
    mean, out = s.mean_logprob, {}
    others = mean[n : n * (wrong + 1)].reshape(wrong, n).T
    if name in ("real_authors", "world_facts"):
        return {"probability": metrics.option_probability(mean[:n], others),
                "truth_ratio": metrics.truth_ratio(-mean[:n], -others)}  # fmt: skip
    if name != "holdout":
        out = {"probability": metrics.probability(mean[:n]), "truth_ratio": metrics.truth_ratio(-mean[-n:], -others)}
    if name == "forget":
        out["exact_memorization"] = metrics.exact_memorization(s.hits[:n])
        out["extraction_strength"] = metrics.extraction_strength(s.hits[:n])
    if s.mu is not None and s.sigma2 is not None and attacked:
        out |= {
            "loss": mean[:n],
            "zlib": metrics.zlib_score(mean[:n], [row["answer"] for row in rows]),
            "min_k": metrics.min_k(s.logprobs[:n], MIN_K),
            "min_k_plus_plus": metrics.min_k_plus_plus(s.logprobs[:n], s.mu[:n], s.sigma2[:n], MIN_K),
        }
    return out


def texts_shared(model: LoadedModel, prompts: list[str], answers: list[str], hits: list[np.ndarray]) -> list[str]:
    said = generate(model, prompts, max_new_tokens=NEW_TOKENS, whole=True, drafts=[f" {a}" for a in answers], hits=hits)
    return [text for (text,) in said]


def rouge_shared(answers: list[str], texts: list[str]) -> np.ndarray:
    return np.array([scoring_rouge.rouge_l(a, t).recall for a, t in zip(answers, texts, strict=True)])


# --- both --------------------------------------------------------------------------------------------------------


def suite(
    model: LoadedModel, sets: dict[str, Rows], forced: Callable[..., Values], write: Callable[..., list[str]],
    rouge: Callable[..., np.ndarray],
) -> tuple[Values, dict[str, float], list[str]]:  # fmt: skip
    """Values by metric, CPU seconds by part, and the texts."""
    _MEMO.clear()  # nothing remembered from the other side
    scoring_rouge._words.cache_clear()
    scoring_rouge._stemmer.cache_clear()
    values: Values = {}
    seconds = {"teacher-forced": 0.0, "generation": 0.0, "rouge": 0.0}

    def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        found = function(*arguments)
        seconds[part] += time.process_time() - start
        return found

    hits: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    for name, rows in sets.items():
        for metric, found in timed("teacher-forced", forced, model, name, rows, hits[name]).items():
            values[f"{name}.{metric}"] = found
    spoken = {name: rows for name, rows in sets.items() if name != "holdout"}
    every = [row for rows in spoken.values() for row in rows]
    known = [hit for name in spoken for hit in hits[name]]
    texts = timed("generation", write, model, [prompt(r) for r in every], [r["answer"] for r in every], known)
    left = iter(texts)
    for name, rows in spoken.items():
        answers = [row["answer"] for row in rows]
        values[f"{name}.rouge_l"] = timed("rouge", rouge, answers, list(islice(left, len(rows))))
    return values, seconds, texts


def compare(model: LoadedModel, sets: dict[str, Rows], repeats: int) -> dict[str, Any]:
    sides = {"apart": (forced_apart, texts_apart, rouge_apart), "shared": (forced_shared, texts_shared, rouge_shared)}
    for functions in sides.values():  # warm up the allocator and lazy imports
        suite(model, {name: rows[:2] for name, rows in sets.items()}, *functions)
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    found, said = {}, {}
    for _ in range(repeats):
        for side, functions in sides.items():
            found[side], seconds, said[side] = suite(model, sets, *functions)
            times[side].append(seconds)
    cpu = {side: {part: float(np.median([run[part] for run in runs])) for part in runs[0]}
           for side, runs in times.items()}  # fmt: skip
    ratios = [sum(a.values()) / sum(b.values()) for a, b in zip(*times.values(), strict=True)]
    total = {side: sum(parts.values()) for side, parts in cpu.items()}
    right = [row["answer"] for name, rows in sets.items() if name != "holdout" for row in rows]
    lengths = [len(ids) for ids in model.tokenizer(said["shared"])["input_ids"]]
    return {
        "cpu_s": {side: {k: round(v, 2) for k, v in parts.items()} for side, parts in cpu.items()},
        "total_cpu_s": {side: round(v, 2) for side, v in total.items()},
        "ratio": round(total["apart"] / total["shared"], 2),
        "ratio_by_part": {part: round(cpu["apart"][part] / max(cpu["shared"][part], 1e-9), 2) for part in cpu["apart"]},
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "max_difference": {k: float(np.abs(found["apart"][k] - found["shared"][k]).max()) for k in found["apart"]},
        # Ratios and standardised values can be large: their float32 rounding grows with them.
        "max_relative_difference": {k: float((np.abs(found["apart"][k] - found["shared"][k])
                                              / np.maximum(1.0, np.abs(found["apart"][k]))).max())
                                    for k in found["apart"]},
        "mean": {k: round(float(v.mean()), 6) for k, v in found["shared"].items()},
        "texts": {"n": len(lengths), "differ": sum(a != b for a, b in zip(said["apart"], said["shared"], strict=True)),
                  "tokens_mean": round(float(np.mean(lengths)), 1), "tokens_max": max(lengths),
                  "right": round(float(np.mean([a == b for a, b in zip(said["shared"], right, strict=True)])), 3),
                  "not_ended": round(float(np.mean([n >= NEW_TOKENS - 1 for n in lengths])), 3)},
    }  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, help="rows of each set, evenly spaced (default: all)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the TOFU files")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=30, help="passes of the training over the questions")
    parser.add_argument("--untrained", action="store_true", help="no training: texts do not end")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sets, source = load(given.data, given.items)
    model = small_model(sets, vocabulary=given.vocabulary, width=given.width, layers=given.layers,
                        epochs=0 if given.untrained else given.epochs)  # fmt: skip
    result = {
        "machine": {"cpu": processor(), "threads": 1, "clock": "CPU seconds of the process",
                    "python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__},
        "model": {"kind": "llama", "width": given.width, "layers": given.layers, "vocabulary": model.vocab_size,
                  "parameters": sum(p.numel() for p in model.module.parameters()), "dtype": "float32",
                  "epochs": 0 if given.untrained else given.epochs},
        "data": {"source": source, "items": {name: len(rows) for name, rows in sets.items()}, "batch_apart": BATCH,
                 "new_tokens": NEW_TOKENS},
        "repeats": given.repeats,
        **compare(model, sets, given.repeats),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
