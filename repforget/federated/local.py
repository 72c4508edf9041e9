"""Unlearning at the client that leaves: any editor of weights, on its own records, sent as an update like any other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from repforget import discover
from repforget.artifact import Edit
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit._dispatch import edit
from repforget.errors import UsageError
from repforget.federated.clients import State, changed
from repforget.federated.messages import Local
from repforget.federated.records import Update
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.training.items import Record, digest


def unlearned(
    client: str, model: LoadedModel, local: Local, state: State, forget: Sequence[Record], method: str = "simnpo", *,
    retain: Sequence[Record] = (), general: Sequence[str] = (), seed: int = 0, progress: Progress | None = None,
    **settings: Any,
) -> Update:  # fmt: skip
    """The change of the federation's weights by which ``client`` unlearns ``forget`` from the global ``state``.

    Runs the editor ``method`` on the base plus ``state``, with the client's own records as its forget facts (and those
    it has besides, ``retain`` and ``general`` texts, as what must stay); editors that train are held to the weights of
    ``local``.  The update is dense and has the layout of the state; its weight is the number of records.  The model is
    afterwards what it was, bit for bit.

    Raises UsageError for a record without a prompt, for an editor that leaves hooks behind and for one that changes
    weights that the federation does not train; and what the editor raises.  Cost: the editor's and a copy of the model.
    """
    facts = _facts(forget, client), _facts(retain, client)
    pool = {"": Counter(fact.answer for fact in facts[1])}
    data = EditData(facts[0], facts[1], tuple(general), pool, digest((*forget, *retain)))
    known = discover.method("edit", method).hyperparameters
    if "targets" in known:
        settings = {"targets": [f"^{re.escape(name)}$" for name in local.weights], **settings}
    if not facts[1] and "retain" in known:
        settings = {"retain": "none", **settings}
    with changed(model.module, local, state):
        made = edit(model, data, method, seed=seed, progress=progress, **settings)
        return Update(client, len(forget), _deltas(made, model, local))


def _deltas(made: Edit, model: LoadedModel, local: Local) -> dict[str, np.ndarray]:
    if made.artifact != "weights":
        raise UsageError(f"The editor '{made.manifest.method}' leaves hooks behind, which no update carries: choose "
                         "one that changes weights.")  # fmt: skip
    new = made.applied_to(model).module
    found = {name: np.zeros(_layout(model, name, local).shape, np.float32) for name in local.weights}
    for name, parameter in new.named_parameters():
        before = model.module.get_parameter(name) if name in made.manifest.weights or name in found else None
        if before is None or bool((parameter == before).all()):
            continue
        if name not in found:
            raise UsageError(f"The editor '{made.manifest.method}' changed '{name}', which the federation does not "
                             "train: hold it to the weights that it does (targets).")  # fmt: skip
        found[name] = _layout(model, name, local, (parameter.double() - before.double()).float())
    return found


def _layout(model: LoadedModel, name: str, local: Local, delta: Any = None) -> np.ndarray:
    """A tensor in the layout of the state: Linear orientation under adapters, else that of the parameter."""
    value = (model.module.get_parameter(name) if delta is None else delta).detach()
    turned = local.rank and is_conv1d(owner_of(model.module, name)[0])
    array: np.ndarray = (value.mT if turned else value).cpu().numpy()
    return array.copy()


def _facts(records: Sequence[Record], client: str) -> tuple[Fact, ...]:
    texts = [record.id for record in records if not record.prompt]
    if texts:
        raise UsageError(f"Record '{texts[0]}' of client '{client}' is a text without a prompt, and editors forget "
                         "answers to prompts: split it into prompt and answer.")  # fmt: skip
    return tuple(Fact(r.id, r.cluster, r.cluster, "", r.prompt, r.answer) for r in records)
