"""Distillation at the server after a rollback: the weights without a client learn from those with it."""

from __future__ import annotations

import copy
import hashlib
import json
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from repforget.edit.train.objectives._math import kl_divergence
from repforget.errors import NumericalError, UsageError
from repforget.federated.clients import changed, own_layout
from repforget.federated.forget import Distil, Distilled, Weights
from repforget.federated.messages import Local
from repforget.federated.sources import Source
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.store import Store, digest, read_json
from repforget.training import Example, Record, batches, collate, encoded, finetune, label_logits, read_records

RATE_TIMES_WIDTH = 0.032  # the learning rate where none is given, times the width of the model
HEAD, TENSORS = "distilled.json", "distilled.safetensors"


@dataclass(frozen=True)
class Distillation:
    """How the server distils; ``lr`` 0 is 0.032 / width, ``texts`` a JSON-lines file, "" the probe's general texts."""

    steps: int = 200
    lr: float = 0.0
    batch_size: int = 32
    temperature: float = 5.0
    seed: int = 0
    texts: str = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or self.seed < 0 or not (0 <= self.lr < 1 and self.temperature > 0):
            raise UsageError(f"Distillation was given {self.steps} steps of {self.batch_size} texts, seed {self.seed}, "
                             f"rate {self.lr} and temperature {self.temperature}: steps and texts are at least 1, no "
                             "seed is negative, the rate is below 1, the temperature above 0.")  # fmt: skip


def general_texts(
    sources: Mapping[str, Source], client: str, path: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """The texts to distil on, and a note where the records of ``client`` could not be looked for in them.

    From the JSON lines at ``path``; without it, the general texts that an editor may see of the probes that clients
    hold clusters of.  UsageError where there are none, and for a text that holds a record of the client (whatever the
    case, the white space and the Unicode form): texts that speak of it in other words are not found.
    """
    if path:
        texts = tuple(record.prompt + record.answer for record in read_records(path))
    else:
        probes = sorted({source.knowledge for source in sources.values() if source.knowledge})
        texts = tuple(text for name in probes for text in load_knowledge(name).for_editor().general)
    if not texts:
        raise UsageError("Rollback distils on general texts that no client owns, and this training names no probe that "
                         "has any: give --texts FILE, or --no-distil.")  # fmt: skip
    try:
        records = sources[client].records() if client in sources else ()
    except UsageError:  # they went, or changed: rollback needs none
        records = ()
    body = "\n".join(map(_plain, texts))
    if held := next((r for r in records if _plain(r.prompt + r.answer) in body), None):
        raise UsageError(f"The texts to distil on hold the record '{held.id}' of client '{client}', which would teach "
                         "it again: give --texts FILE without it.")  # fmt: skip
    note = "the texts to distil on were not searched for records of the client, which are not here"
    return texts, () if records else (note,)


def distilled(
    model: LoadedModel, local: Local, student: Weights, teacher: Weights, texts: Sequence[str], how: Distillation,
    progress: Progress | None = None,
) -> Distilled:  # fmt: skip
    """Train the base plus ``student`` to say on ``texts`` what the base plus ``teacher`` says.

    ``temperature² KL(teacher || student)`` of the next-token distributions over the whole vocabulary, both softened by
    the temperature, in the mean over tokens, by AdamW with a cosine.  The weights of ``local`` move themselves, also
    where the clients trained adapters, so that the change is of full rank; all others stay.  Source: Hinton et al.
    2015, arXiv 1503.02531; after a rollback: Wu, Zhu and Mitra 2022, arXiv 2201.09441.  ``model`` is afterwards what
    it was.

    Raises UsageError for a text that is too long or has one token, NumericalError where loss or weights are not finite.
    Cost: two forwards and a backward per step, four forwards over the texts, a copy of the model, and the
    optimiser's.  What no text shows stays as damaged as it was, and what the texts show of the client is taught again.
    """
    started = time.process_time()
    if all(np.array_equal(value, teacher[name]) for name, value in student.items()):
        return Distilled(student, 0, 0.0, ("nothing was rolled back, so that there was nothing to distil",))
    examples = encoded(model, [Record(f"text {i}", "", "", text) for i, text in enumerate(texts, 1)])
    with changed(model.module, local, teacher):
        source = copy.deepcopy(model.module)

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return how.temperature**2 * _divergence(module, source, batch, how.temperature).mean()

    drawn = islice(batches(examples, how.batch_size, how.seed), how.steps)
    stream = track(progress, drawn, "distilling", how.steps)
    with changed(model.module, local, student):
        start = {name: model.module.get_parameter(name).detach().clone() for name in local.weights}
        before = _mean(model.module, source, examples, how.batch_size)
        finetune(model.module, stream, steps=how.steps, lr=how.lr or RATE_TIMES_WIDTH / model.width, seed=how.seed,
                 trainable=frozenset(local.weights).__contains__, loss=loss)  # fmt: skip
        after = _mean(model.module, source, examples, how.batch_size)
        moved = {name: (model.module.get_parameter(name).detach().double() - value.double()).cpu().numpy()
                 for name, value in start.items()}  # fmt: skip
    # own_layout is its own inverse: it turns what is stored the other way round
    turned = {name: delta.numpy() for name, delta in own_layout(model.module, local, moved).items()}
    weights = {name: (value.astype(np.float64) + turned[name]).astype(value.dtype) for name, value in student.items()}
    if not np.isfinite(after) or not all(np.isfinite(value).all() for value in weights.values()):
        raise NumericalError(f"Distillation ended at {after} nats per token: lower its learning rate.")
    note = (f"distilled for {how.steps} steps on {len(texts)} general texts: per token of them {before:.3g} nats from "
            f"the model with the client before and {after:.3g} after; that model still knows the client, so that what "
            "the texts tell of it comes back")  # fmt: skip
    return Distilled(weights, how.steps, time.process_time() - started, (note,))


def staged(
    model: LoadedModel, local: Local, texts: Sequence[str], notes: Sequence[str], how: Distillation, kept: Store,
    progress: Progress | None = None,
) -> Distil:  # fmt: skip
    """:func:`distilled` whose result lies in ``kept``: the same question is answered from there, with ``notes``."""

    def distil(student: Weights, teacher: Weights) -> Distilled:
        from safetensors.numpy import load_file, save_file

        def build(folder: Path) -> None:
            made = distilled(model, local, student, teacher, texts, how, progress)
            save_file({name: np.ascontiguousarray(value) for name, value in made.weights.items()}, folder / TENSORS)
            head = {"steps": made.steps, "seconds": made.seconds, "notes": made.notes}
            (folder / HEAD).write_text(json.dumps(head), encoding="utf-8")

        key = {"base": model.fingerprint, "how": asdict(how), "texts": digest(texts),
               "student": _sha(student), "teacher": _sha(teacher)}  # fmt: skip
        place = kept.stage("distilled", key, build)
        head = read_json(place / HEAD)
        return Distilled(load_file(place / TENSORS), head["steps"], head["seconds"], (*head["notes"], *notes))

    return distil


def _divergence(module: nn.Module, source: nn.Module, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """``KL(source || module)`` per token [m], float64."""
    with torch.no_grad():
        told = (label_logits(source, batch)[0] / temperature).log_softmax(-1)
    own = (label_logits(module, batch)[0] / temperature).log_softmax(-1)
    return kl_divergence(told, own).double()


@torch.no_grad()
def _mean(module: nn.Module, source: nn.Module, examples: Sequence[Example], size: int) -> float:
    """The mean over all tokens of the examples at temperature 1, in nats."""
    device = next(module.parameters()).device
    parts = [_divergence(module, source, collate(examples[at : at + size], device), 1.0)
             for at in range(0, len(examples), size)]  # fmt: skip
    return float(torch.cat(parts).mean())


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold()


def _sha(weights: Weights) -> str:
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()
