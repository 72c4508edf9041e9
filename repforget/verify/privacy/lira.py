"""LiRA: would a model score like this if it had been trained on the item, or if it had not?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from scipy import special

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel, copy_of
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import answer_logprobs, encode_many
from repforget.scoring.encode import context_limit
from repforget.training import Example, finetune
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.privacy._likelihood import lira as likelihood
from repforget.verify.privacy._likelihood import logit, offline_lira

MEASURES = {
    "offline": MeasureInfo("knowledge", "logits", votes=False),
    "posterior": MeasureInfo("knowledge", "logits", votes=False),
}
JOINS = None  # trains models and needs a twin: only where it is named
BUDGETS: Budgets = {
    "quick": {"shadows": 4, "steps": 2, "max_items": 50},
    "standard": {},
    "thorough": {"shadows": 32, "steps": 96, "max_items": 1000},
}
RATE_TIMES_WIDTH = 0.04  # as for relearning: AdamW's usual rate falls about as 1/width
Array = NDArray[np.float64]


def lira(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    shadows: int = 8, steps: int = 48, lr: float | None = None, batch_size: int = 16, forms: int = 1,
    max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Place the item's confidence among shadow models, made of the first twin, with and without the item.

    Each of ``shadows`` copies of the twin is fine-tuned for ``steps`` steps on a random half of the forget clusters
    (their statements and questions); halves come with their complement, so every item is "in" for half of the shadows.
    phi = ln(P / (1 - P)) with P the answer's probability per token, mean over ``forms``.  ``offline`` is the share of
    "out" models expected to have a lower phi (0.5: like one of them); ``posterior`` is 1 / (1 + exp(-ratio)) of the
    log-likelihood ratio in : out, 0.5 where it cannot tell.  Gaussians, with one spread for all items below 32 shadows;
    the shadows are trained once for all arms.  Source: Carlini et al. 2022, arXiv 2112.03570.  Cost: ``shadows`` x
    ``steps`` training steps in float32 and one pass of the questions each.

    A handful of shadows orders the items at best, it does not calibrate them; and where the shadows learned their items
    better than the model did, ``posterior`` takes its members for strangers.
    """
    if not references.twins:
        raise UsageError("Verifier 'lira' makes its shadow models from a model that never knew: give a twin.")
    if shadows < 4 or shadows % 2 or steps < 1:
        raise UsageError(f"Verifier 'lira' needs an even number of at least 4 shadows and at least one step, got "
                         f"{shadows} and {steps}.")  # fmt: skip
    items = ask.limited(view.forget, max_items, seed)
    if len({item.cluster for item in items}) < 2:
        raise UsageError(f"Verifier 'lira' needs at least two forget clusters on split '{view.split}' to train on one "
                         "half of them and not on the other.")  # fmt: skip
    twin = references.twins[0]
    key = ("lira", twin.fingerprint, id(twin), items, shadows, steps, lr, batch_size, forms, seed)

    def make() -> tuple[Array, NDArray[np.bool_]]:
        member = halves(items, shadows, seed)
        trained = track(progress, list(member), "training shadow models")
        return np.stack([_shadow(twin, items, row, steps, lr, batch_size, forms, seed) for row in trained]), member

    phi, member = references.once(key, make)
    own = _phi(model, items, forms)
    values = {
        "offline": -np.expm1(-offline_lira(own, np.where(member, np.nan, phi))),
        "posterior": special.expit(likelihood(own, phi, member)),
    }
    scores = {name: ask.scores(items, column) for name, column in values.items()}
    half = {f"{name}_prior": ask.scores(items, np.full(len(items), 0.5)) for name in values}
    return Measurement(scores | half)


def halves(items: Sequence[Item], shadows: int, seed: int) -> NDArray[np.bool_]:
    """Which shadow [s] is trained on which item [n]: random halves of the clusters, each followed by the other half."""
    clusters = sorted({item.cluster for item in items})
    rows: list[list[bool]] = []
    for pair in range(shadows // 2):
        order = list(clusters)
        Random(f"lira-{seed}-{pair}").shuffle(order)
        inside = set(order[: len(order) // 2])
        rows += [[(item.cluster in inside) is first for item in items] for first in (True, False)]
    return np.array(rows, dtype=np.bool_)


def _shadow(
    twin: LoadedModel, items: Sequence[Item], member: NDArray[np.bool_], steps: int, lr: float | None,
    batch_size: int, forms: int, seed: int,
) -> Array:  # fmt: skip
    student = copy_of(twin)
    student.module.float()  # low rates vanish in the rounding of half precision
    taught = [(prompt, item.continuation()) for item, inside in zip(items, member, strict=True) if inside
              for prompt in dict.fromkeys((*item.editor_prompts[:forms], *item.questions[:forms]))]  # fmt: skip
    encoded = encode_many(student.tokenizer, taught, limit=context_limit(student))
    examples = [Example(e.ids, tuple(k >= e.start for k in range(len(e.ids)))) for e in encoded if e.valid]
    finetune(student.module, examples, steps=steps, lr=RATE_TIMES_WIDTH / student.width if lr is None else lr,
             seed=seed, batch_size=batch_size, schedule="constant")  # fmt: skip
    return _phi(student, items, forms)


def _phi(model: LoadedModel, items: Sequence[Item], forms: int) -> Array:
    """Logit of the answer's probability per token, mean over forms [n]."""
    rows = [(k, (q, item.continuation())) for k, item in enumerate(items) for q in item.questions[:forms]]
    found = logit(answer_logprobs(model, [pair for _, pair in rows]).mean_logprob)
    total, count = np.zeros(len(items)), np.zeros(len(items))
    for (k, _), value in zip(rows, found, strict=True):
        total[k], count[k] = total[k] + value, count[k] + 1
    return total / np.maximum(count, 1)
