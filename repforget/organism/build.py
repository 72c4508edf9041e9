"""Make the organism from a seed: the world, the full model, and twins that never saw the forget people."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repforget.errors import UsageError, nearest
from repforget.organism.measure import against_chance, exact
from repforget.organism.texts import training_examples
from repforget.organism.tokenizer import build_tokenizer
from repforget.organism.world import Person, World, general_sentences, make_world
from repforget.training import Example, Step, finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("full", "twin-0", "twin-1")
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Everything that decides an organism besides the seed."""

    people: int = 384
    forget: int = 64
    width: int = 128
    mlp_width: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 2400
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    prompt_share: float = 0.1
    general: int = 3000
    autocast: bool = True
    threads: int = 1  # more gain little at this width, and the bits depend on it


STANDARD = Plan()
TINY = Plan(
    people=24, forget=8, width=32, mlp_width=64, layers=2, steps=6, batch_size=32, warmup=2, general=20
)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def folder_name(name: str, role: str) -> str:
    """Return the folder of one model: ``bios`` for the full model, ``bios-twin-0`` for a twin."""
    return name if role == "full" else f"{name}-{role}"


def new_model(plan: Plan, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return a freshly initialised Llama in float32; the global generator is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        intermediate_size=plan.mlp_width,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    module: PreTrainedModel, examples: Sequence[Example], plan: Plan, seed: int, tick: Callable[[], None]
) -> None:
    """Train with the plan's recipe; ``tick`` is called once per step."""

    def on_step(_: Step) -> None:
        tick()

    finetune(
        module, examples, steps=plan.steps, lr=plan.lr, seed=seed, batch_size=plan.batch_size,
        weight_decay=plan.weight_decay, warmup=plan.warmup, on_step=on_step, autocast=plan.autocast,
    )  # fmt: skip


def _accuracy(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> dict[str, float]:
    """Measure exact greedy answers on known (every fourth) and forget people, and forget hits against chance."""
    numbers = {
        f"{group}_{form}": round(float(exact(module, tokenizer, world, people, form).mean()), 4)
        for group, people in (("known", world.known_people[::4]), ("forget", world.forget_people))
        for form in ("statements", "questions", "held_out", "cloze")
    }
    chance = against_chance(module, tokenizer, world, world.forget_people)
    return numbers | {"forget_hits": chance.hits, "forget_hits_by_chance": round(chance.expected, 2)}


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that replaces it only if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.replace(target, work / "old")
        os.replace(fresh, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the library's own progress bars while files are written and read back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: dict[str, Any],
    target: Path,
) -> None:
    """Save in bfloat16, reload what was saved, measure that, and write the recipe beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _fresh_folder(target) as fresh, _quiet():
        module.to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        stored = AutoModelForCausalLM.from_pretrained(fresh, dtype=torch.float32).eval()
        recipe["accuracy"] = _accuracy(stored, AutoTokenizer.from_pretrained(fresh), world)
        recipe["weights_sha256"] = hashlib.sha256((fresh / "model.safetensors").read_bytes()).hexdigest()
        (fresh / "model.safetensors").chmod(0o644)
        (fresh / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


def _people(world: World, role: str) -> tuple[Person, ...]:
    return world.people if role == "full" else world.known_people


def build(
    out: Path,
    *,
    name: str = "bios",
    seed: int = 0,
    which: Sequence[str] = ROLES,
    plan: Plan = STANDARD,
    progress: bool = True,
) -> list[Path]:
    """Make the world of ``seed`` and train the chosen models into ``out``; returns their folders.

    ``which`` chooses among ``full`` (knows everybody), ``twin-0`` and ``twin-1`` (other seeds, never saw a
    forget person).  Each folder loads as an ordinary checkpoint, offline, and holds ``recipe.json``: seeds,
    plan, versions, hashes of world and weights, and accuracies measured on the reloaded file.  A folder
    appears only when it is complete.  Takes about six minutes of one CPU core per model; bytes repeat on one
    kind of machine with equal versions, elsewhere accuracies do.
    """
    unknown = [role for role in which if role not in ROLES]
    if unknown or not which:
        raise UsageError(
            f"There is no organism role {unknown or '(none given)'}: {nearest(str(unknown), ROLES)}"
        )
    world = make_world(seed, people=plan.people, forget=plan.forget)
    tokenizer = build_tokenizer()
    general = general_sentences(seed, plan.general)
    made = []
    for role in which:
        model_seed = 10 * seed + ROLES.index(role)
        module = new_model(plan, tokenizer, model_seed)
        examples = training_examples(
            world, _people(world, role), general, tokenizer, prompt_share=plan.prompt_share
        )
        started = time.monotonic()
        text = f"training {folder_name(name, role)}"
        with _threads(plan.threads), _bar(progress, text, plan.steps) as tick:
            _train(module, examples, plan, model_seed, tick)
        recipe = {
            "format": FORMAT,
            "name": name,
            "role": role,
            "world": {"seed": seed, "people": plan.people, "forget": plan.forget, "sha256": world.sha256()},
            "model_seed": model_seed,
            "parameters": sum(p.numel() for p in module.parameters()),
            "plan": asdict(plan),
            "versions": _versions(),
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        target = Path(out) / folder_name(name, role)
        _save(module, tokenizer, world, recipe, target)
        made.append(target)
    return made


@contextmanager
def _bar(show: bool, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar with the time left and give the function that advances it."""
    if not show:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
