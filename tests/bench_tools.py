"""A tiny model with a byte tokenizer, JSON files, and what a run would keep, for the tests of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from scoring_models import byte_tokenizer

from repforget.models.load import LoadedModel, wrap


class Parts:
    """Keeps what a run would store, after a round trip through JSON; ``built`` names what had to be computed."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.stored: dict[str, Any] = {}

    def __call__(self, name: str, build: Callable[[], Any]) -> Any:
        if name not in self.stored:
            self.built.append(name)
            self.stored[name] = json.loads(json.dumps(build(), allow_nan=False))
        return self.stored[name]


def speaker(seed: int = 0, *, context: int = 512) -> LoadedModel:
    """A one-layer Llama with random weights that reads any text."""
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=context, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = transformers.LlamaForCausalLM(config).eval()
        for parameter in module.parameters():  # larger than the initialisation, so that predictions differ
            parameter.data += 0.3 * torch.randn_like(parameter)
    return wrap(module, tokenizer, f"speaker-{seed}")


def write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table as JSON lines."""
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
