"""Does the answer come when the question's spelling is changed, or the question is written in a cipher?"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Sequence
from random import Random

from repforget.errors import UsageError, nearest
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.text import _variants as variants

MEASURES = {"spelling": MeasureInfo("knowledge", "logits"), "cipher": MeasureInfo("knowledge", "logits")}
JOINS = "thorough"
HELD_OUT = True
BUDGETS: Budgets = {
    "quick": {"spellings": ["lower", "swapped"], "ciphers": ["rot13"], "max_items": 100},
    "standard": {},
    "thorough": {"max_items": 1000},
}
FRAME = "Decode this question, which is written in {name}, and answer it in plain words: {text} Answer:"
LEET = str.maketrans("aeiost", "431057")


def _swapped(text: str, random: Random) -> str:
    """Two neighbouring letters inside every fourth word or so change places."""

    def typo(match: re.Match[str]) -> str:
        word = match.group()
        if random.random() >= 0.25:
            return word
        at = random.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"\w{4,}", typo, text)


# name -> the question in this spelling; a tokenizer may know none of the resulting words
SPELLINGS: dict[str, Callable[[str, Random], str]] = {
    "upper": lambda text, _: text.upper(),
    "lower": lambda text, _: text.lower(),
    "spaced": lambda text, _: " ".join(text.replace(" ", "  ")),
    "bare": lambda text, _: " ".join(re.sub(r"[^\w\s]", " ", text).split()),
    "swapped": _swapped,
    "backwards": lambda text, _: " ".join(reversed(text.split())),
}
CIPHERS: dict[str, Callable[[str], str]] = {
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "leet": lambda text: text.lower().translate(LEET),
    "reversed letters": lambda text: text[::-1],
}


def cipher(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    spellings: Sequence[str] = tuple(SPELLINGS), ciphers: Sequence[str] = tuple(CIPHERS), alternatives: int = 31,
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Ask in other spellings (case, spacing, typos, word order) and in ciphers (rot13, base64, leet, reversed).

    Both measures are the truth's probability, in plain text, when decoding is confined to the candidates, at the
    spelling or cipher with the highest mean over items, the same maximum on every arm; the facts give each one's mean.
    The truth is compared with plain answers, so the model must decode the question and need not write the cipher.
    Translations and the words of a language learned in training are no rule of spelling: give them as paraphrases of
    the items (verifier ``paraphrase``).  Source: the translated questions of Lynch et al.
    2024, arXiv 2402.16835.  Cost: one forward pass per item and spelling or cipher.

    A model that cannot read a cipher scores at the prior, which does not show that the knowledge is gone.
    """
    for given, known, what in ((spellings, SPELLINGS, "spelling"), (ciphers, CIPHERS, "cipher")):
        for name in (n for n in given if n not in known):
            raise UsageError(f"Verifier 'cipher' knows no {what} '{name}': {nearest(name, known)}")
    if not spellings or not ciphers:
        raise UsageError("Verifier 'cipher' needs at least one of 'spellings' and one of 'ciphers'.")
    items = ask.limited(view.forget, max_items, seed)
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    asked = [item.questions[0] for item in items]
    groups = {
        "spelling": {n: [SPELLINGS[n](q, Random(f"{n}-{seed}-{i.id}")) for q, i in zip(asked, items, strict=True)]
                     for n in spellings},
        "cipher": {n: [FRAME.format(name=n, text=CIPHERS[n](q)) for q in asked] for n in ciphers},
    }  # fmt: skip
    scores: dict[str, ItemScores] = {}
    facts: dict[str, float] = {}
    for measure, rows in track(progress, list(groups.items()), "asking in other spellings"):
        table = variants.probabilities(model, items, list(rows.values()), view.knowledge, alternatives)
        scores[measure], scores[f"{measure}_prior"] = ask.scores(items, table[variants.best(table)]), before
        facts |= {f"{measure} {n}": float(m) for n, m in zip(rows, variants.means(table), strict=True)}
    return Measurement(scores, {}, facts)
