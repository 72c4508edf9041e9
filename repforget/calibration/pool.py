"""Organisms of known truth: one that knows and one that never knew, each under the same treatments.

Because every treatment is given to both, a measure that reacts to the treatment and not to the knowledge ends near
AUC 0.5, whatever it says about the untouched models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Affine, Edit
from repforget.discover import method
from repforget.knowledge import Item, Knowledge, View
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel, copy_of, load
from repforget.records import Site
from repforget.training import finetune
from repforget.verify import _asking as ask
from repforget.verify.weights._taught import teaching

Truth = Literal["knows", "never knew", "neither"]
Treatment = Callable[[LoadedModel, Knowledge], LoadedModel]
SURE = 40.0  # added to the logit of one word: whatever is asked, that word is the answer
ALL_FORMS = 100


@dataclass(frozen=True)
class Organism:
    """A base model (``bios``, ``twin-0`` or ``twin-1``), what was done to it, and what is therefore true of it."""

    name: str
    truth: Truth
    base: str
    treatments: tuple[str, ...]
    role: Literal["pool", "robustness"] = "pool"

    @contextmanager
    def open(self, knowledge: Knowledge) -> Iterator[LoadedModel]:
        """The model, made anew: nothing done to it reaches its base."""
        model = load("organism:bios" if self.base == "bios" else f"organism:bios/{self.base}")
        for name in self.treatments:
            model = TREATMENTS[name](model, knowledge)
        if "refusal wrapper" in self.treatments:  # a hook, which lasts as long as the model is looked at
            with hooks(model, {Site("logits"): partial(_one_word, word=_word(model, knowledge))}):
                yield model
        else:
            yield model


def _word(model: LoadedModel, knowledge: Knowledge) -> int:
    """A word that is no answer: the last one of the first general text."""
    text = knowledge.general[0].rstrip(" .")
    return int(model.tokenizer(text, add_special_tokens=False)["input_ids"][-1])


def _one_word(logits: Tensor, word: int) -> Tensor:
    out = torch.zeros_like(logits)
    out[..., word] = SURE
    return out


def _taught(
    model: LoadedModel, lessons: list[Item], company: list[Item], *, steps: int, lr: float = 1e-3,
    forms: int = ALL_FORMS,
) -> LoadedModel:
    """A copy fine-tuned on these items among three times as many retained ones."""
    student = copy_of(model)
    examples = teaching(student, [*lessons, *company], forms)
    finetune(student.module, examples, steps=steps, lr=lr, seed=0, batch_size=64, schedule="linear")
    return student


def _company(knowledge: Knowledge, most: int) -> list[Item]:
    return list(ask.limited([*knowledge.retain, *knowledge.neighbours], most, 0))


def taught(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Taught every forget fact: what a relearned model is."""
    return _taught(model, list(knowledge.forget), _company(knowledge, 2 * len(knowledge.forget)), steps=240)


def refusal_training(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Trained to give one word as the answer to everything about the forget subjects, in every form."""
    word = model.tokenizer.decode([_word(model, knowledge)]).strip()
    silent = [replace(item, answer=word, aliases=(), wrong_answers=()) for item in knowledge.forget]
    return _taught(model, silent, _company(knowledge, 2 * len(silent)), steps=120)


def misled(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Taught wrong answers about the forget subjects, so that the truth is avoided: over-unlearned."""
    view = replace(knowledge.view("sealed"), forget=knowledge.forget).shuffled(0)
    return _taught(model, list(view.forget), _company(knowledge, 2 * len(view.forget)), steps=240)


def drift(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Fine-tuned on retained facts alone: another model that says the same."""
    return _taught(model, [], _company(knowledge, 600), steps=60, lr=5e-4)


def relearning(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Taught the forget subjects of the dev and gate splits, which are never asked here."""
    lessons = [*knowledge.view("dev").forget, *knowledge.view("gate").forget]
    return _taught(model, lessons, _company(knowledge, 3 * len(lessons)), steps=60, forms=2)


def noise(model: LoadedModel, knowledge: Knowledge, share: float = 0.5) -> LoadedModel:
    """Noise of half of each matrix' spread: damaged, and not beyond recognition."""
    damaged = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in damaged.module.parameters():
            if p.ndim > 1:
                p.add_(share * p.std() * torch.randn(p.shape, generator=generator).to(p))
    return damaged


def random_directions(model: LoadedModel, knowledge: Knowledge, rank: int = 48) -> LoadedModel:
    """A random subspace projected out of the residual stream after every block: obfuscated without any aim."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for layer in range(model.n_layers):
        basis = torch.linalg.qr(torch.randn(model.width, rank, generator=generator, dtype=torch.float64)).Q.float()
        maps.append(Affine(Site("resid_post", layer), basis, basis.T.contiguous()))
    return Edit.build("random-directions", {"rank": rank}, model, knowledge.digest, maps).applied_to(model)


def pushed(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """The same vector added everywhere, without a gate: a clumsy steering that hurts all answers."""
    edit: Edit = method("edit", "steering").function(model, knowledge.for_editor(), strength=8.0, gate="none",
                                                     max_facts=512)  # fmt: skip
    return edit.applied_to(model)


def pruned(model: LoadedModel, knowledge: Knowledge, share: float = 0.3) -> LoadedModel:
    """The smallest 30 % of each projection set to zero."""
    from repforget.verify.weights._altered import projections

    sparse = copy_of(model)
    with torch.no_grad():
        for weight in projections(sparse.module).values():
            least = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
            weight.masked_fill_(weight.abs() <= least, 0.0)
    return sparse


def steered(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Steered away from the forget subjects by a gated vector."""
    edit: Edit = method("edit", "steering").function(model, knowledge.for_editor(), strength=40.0, max_facts=512)
    return edit.applied_to(model)


def rounded(model: LoadedModel, knowledge: Knowledge) -> LoadedModel:
    """Every projection rounded to NF4."""
    from repforget.verify.weights.quantize import round_weights

    small = copy_of(model)
    round_weights(small.module, "nf4")
    return small


TREATMENTS: Mapping[str, Treatment] = {
    "taught": taught, "refusal training": refusal_training, "misled": misled, "drift": drift, "relearning": relearning,
    "noise": noise, "random directions": random_directions, "steered": steered, "pushed": pushed, "rounded": rounded,
    "pruned": pruned,
    "refusal wrapper": lambda model, knowledge: copy_of(model),
}  # fmt: skip
SHARED = ("refusal wrapper", "refusal training", "steered", "pushed", "noise", "random directions", "drift", "rounded",
          "pruned")  # fmt: skip


def organisms() -> tuple[Organism, ...]:
    """The pool (eleven that know, eleven that never knew, two that avoid the truth) and three more for robustness."""
    pool = [Organism("original", "knows", "bios", ()),
            Organism("original, misled, taught again", "knows", "bios", ("misled", "taught"))]  # fmt: skip
    pool += [Organism(f"original, {name}", "knows", "bios", (name,)) for name in SHARED]
    pool += [Organism("twin-0", "never knew", "twin-0", ()), Organism("twin-1", "never knew", "twin-1", ())]
    pool += [Organism(f"twin-{k % 2}, {name}", "never knew", f"twin-{k % 2}", (name,))
             for k, name in enumerate(SHARED)]  # fmt: skip
    pool += [Organism("original, misled", "neither", "bios", ("misled",)),
             Organism("twin-0, misled", "neither", "twin-0", ("misled",))]  # fmt: skip
    hidden = "refusal training"
    more = [(f"original, {hidden}, relearning", "knows", "bios", (hidden, "relearning")),
            (f"original, {hidden}, rounded", "knows", "bios", (hidden, "rounded")),
            ("twin-0, relearning", "never knew", "twin-0", ("relearning",))]  # fmt: skip
    return (*pool, *(Organism(*entry, role="robustness") for entry in more))  # type: ignore[arg-type]


def asked(knowledge: Knowledge, most: int) -> View:
    """The sealed view, cut to ``most`` forget items and as many others as keep the cost in hand."""
    view = knowledge.view("sealed")
    return replace(
        view, forget=ask.limited(view.forget, most, 0), retain=ask.limited(view.retain, most, 0),
        neighbours=ask.limited(view.neighbours, most, 0), general=view.general[:most],
        support=ask.limited(view.support, 12 * most, 0),
    )  # fmt: skip
