"""Training of the unembedding alone, over frozen features: convex, so that taking records out has one right answer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.artifact import DenseDelta, Edit, Operation, Untie
from repforget.edit.exact._features import answer_rows
from repforget.errors import ArtifactError, SiteError, UsageError
from repforget.guarantee import Guarantee, at_most
from repforget.linear.softmax import Softmax, fit_softmax
from repforget.models.load import LoadedModel
from repforget.models.readout import logit_cap
from repforget.models.weights import find, get_bias, get_weight, is_tied
from repforget.progress import Progress, track
from repforget.store import json_bytes, write_atomic
from repforget.training import Record
from repforget.training.items import checked, digest

JSON, ROWS, FORMAT = "unembedding.json", "rows.npz", 1
ARRAYS = ("x", "tokens", "owner", "change")
FLOAT32 = float(np.finfo(np.float32).eps) / 2


@dataclass(frozen=True)
class Tuned:
    """A training of the unembedding: its records, what the base made of them, and the change [d, V] they led to.

    Row i of ``x`` [n, d] predicts token ``tokens[i]`` and belongs to record ``owner[i]``.
    """

    records: tuple[Record, ...]
    lam: float
    base: str
    fingerprint: str
    x: NDArray[np.float64]
    tokens: NDArray[np.int64]
    owner: NDArray[np.int64]
    change: NDArray[np.float64]


def train(model: LoadedModel, records: Sequence[Record], lam: float, progress: Progress | None = None) -> Tuned:
    """Minimise ``sum -log p(token) + lam/2 |W - W_base|^2`` over the unembedding W, to convergence.

    Cost: one forward pass over the records, then Newton steps on their features in float64.  Raises SiteError for a
    model that caps its logits, which makes the objective another one.
    """
    records = checked(records, "the training")
    parts = [answer_rows(model, [record])  # each by itself: no batch shows
             for record in track(progress, records, "reading features")]  # fmt: skip
    x, tokens = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    owner = np.repeat(np.arange(len(records)), [len(p[1]) for p in parts])
    change = solved(model, x, tokens, lam).change
    return Tuned(records, lam, model.name, model.fingerprint, x, tokens, owner, change)


def solved(
    model: LoadedModel, x: NDArray[Any], tokens: NDArray[Any], lam: float, start: NDArray[Any] | None = None
) -> Softmax:
    """The minimiser over rows ``x`` [n, d] and their tokens [n], as a change [d, V] of the model's unembedding."""
    scale, limit = logit_cap(model.module)
    if limit is not None:
        raise SiteError(f"'{model.name}' caps its logits, so that training its unembedding is not convex: choose a "
                        "model without a soft cap, or shards.")  # fmt: skip
    ref = find(model.module, "unembed")
    weight = get_weight(model.module, ref).double().cpu().numpy()
    bias = get_bias(model.module, ref)
    offset = None if bias is None else scale * bias.double().cpu().numpy()
    return fit_softmax(scale * x, tokens, len(weight), lam, base=weight.T, bias=offset, start=start)


def operations(model: LoadedModel, change: NDArray[Any]) -> list[Operation]:
    """The change as an edit of the model; a tied unembedding gets a weight of its own first."""
    ref = find(model.module, "unembed")
    name = ref.name
    untied: list[Operation] = []
    if is_tied(model.module):
        head = model.module.get_output_embeddings()
        name = next(f"{path}.weight" for path, part in model.module.named_modules() if part is head)
        untied = [Untie()]
    return [*untied, DenseDelta(name, torch.from_numpy(np.ascontiguousarray(change.T)))]


def claim(found: Softmax, gone: int) -> Guarantee:
    """What holds for an unembedding whose training is ``found``, ``gone`` records having been left out."""
    stored = FLOAT32 * float(np.linalg.norm(found.change))
    bound = found.distance + stored
    return Guarantee(
        "exact", f"The unembedding is within {at_most(bound, 2)} (Frobenius norm) of the one that training without the "
        f"{gone} records taken out ends at.", "record", "Strong convexity: |W - W*| <= |gradient at W| / penalty",
        ("The base model was never trained on the records.",
         "Records that only an earlier edit left out are in again.",
         "Penalty and base were chosen without the records, and only the unembedding was trained.",
         "The features of the records that are left are those in the folder; elsewhere they may be rounded otherwise.",
         "Weights are added in float32 and above; a base in 16 bits rounds the sum again."),
        {"distance bound": bound, "gradient norm": found.residual, "penalty": found.lam, "float32 rounding": stored,
         "tokens left": found.n, "records taken out": gone},
    )  # fmt: skip


def train_into(
    folder: Path, model: LoadedModel, records: Sequence[Record], lam: float, progress: Progress | None = None
) -> Tuned:
    """:func:`train` into a folder; one that holds this very training is read, any other is refused (ArtifactError)."""
    refuse(folder)
    if not (folder / JSON).is_file():
        tuned = train(model, records, lam, progress)
        save(tuned, folder)
        return tuned
    tuned = read(folder)
    if (digest(tuned.records), tuned.lam, tuned.fingerprint) != (digest(records), lam, model.fingerprint):
        raise ArtifactError(f"'{folder}' holds a training of the unembedding with other records, penalty or base: "
                            "choose an empty or new folder.")  # fmt: skip
    return tuned


def refuse(folder: Path) -> None:
    """ArtifactError for a folder that holds anything but a training of an unembedding, finished or cut short."""
    if not folder.exists() or (folder / JSON).is_file():
        return
    if folder.is_file() or not all(p.name.startswith((f".{JSON}", f".{ROWS}")) or _ours(p) for p in folder.iterdir()):
        raise ArtifactError(f"'{folder}' exists and is no training of an unembedding: choose an empty or new folder.")


def _ours(path: Path) -> bool:
    """True for rows that a training wrote which was stopped before its last file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return path.name == ROWS and set(held.files) == set(ARRAYS)
    except Exception:  # no file, none of numpy's, cut short: their errors have no common class
        return False


def save(tuned: Tuned, folder: Path) -> Path:
    """Write the training; ``unembedding.json`` comes last and makes it one.  It holds the records themselves."""
    refuse(folder)
    held = io.BytesIO()
    np.savez(held, **{name: getattr(tuned, name) for name in ARRAYS})
    (folder / JSON).unlink(missing_ok=True)
    write_atomic(folder / ROWS, held.getvalue())
    write_atomic(folder / JSON, json_bytes({
        "format": FORMAT, "lam": tuned.lam, "base": tuned.base, "fingerprint": tuned.fingerprint,
        "records": [asdict(r) for r in tuned.records], "digest": digest(tuned.records),
    }))  # fmt: skip
    return folder


def read(folder: str | Path) -> Tuned:
    """Read a training back; ArtifactError where it is missing or damaged."""
    folder = Path(folder)
    try:
        body = json.loads((folder / JSON).read_text(encoding="utf-8"))
        records = tuple(Record(**r) for r in body["records"])
        with np.load(folder / ROWS, allow_pickle=False) as held:
            parts = {name: held[name] for name in ARRAYS}
        tuned = Tuned(records, float(body["lam"]), body["base"], body["fingerprint"], **parts)
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no training of an unembedding at '{folder}': '{Path(error.filename).name}' is "
                            "missing; make one with 'repforget head train-unembedding'.") from None  # fmt: skip
    except Exception as error:  # zip, JSON and shape errors have no common class
        raise ArtifactError(f"The training at '{folder}' cannot be read ({type(error).__name__}: {error}): make it "
                            "again.") from None  # fmt: skip
    if body["format"] != FORMAT or body["digest"] != digest(records) or len(tuned.owner) != len(tuned.x):
        raise ArtifactError(f"The training at '{folder}' is damaged or of another release: make it again.")
    return tuned


def check_base(tuned: Tuned, model: LoadedModel) -> None:
    if model.fingerprint != tuned.fingerprint:
        raise UsageError(f"'{model.name}' is not the model whose unembedding was trained: give the base, "
                         f"'{tuned.base}', to which the edit is added in place of the training's.")  # fmt: skip


def edit_of(tuned: Tuned, model: LoadedModel) -> Edit:
    """What the training adds to its base, all records included: the edit that ``head_removal`` replaces."""
    return Edit.build("unembedding", {"lam": tuned.lam, "records": len(tuned.records)}, model, digest(tuned.records),
                      operations(model, tuned.change))  # fmt: skip
