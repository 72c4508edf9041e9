"""Open requests answered: through the loop, or by taking records out of a sharded training; all of it written down.

The model in force for a request is the ledger's model with the edits that earlier requests left in force.  Edits pile
up (``sequential``: each is made on the model that the ones before left, ``Edit.then(stacked=True)``) or are made again
for all of them at once (``union``: one edit of the ledger's model for everything asked so far).  An edit is in force
unless its verdict is "fail".
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from repforget.discover import method
from repforget.errors import KnowledgeError, RepforgetError, UsageError, nearest
from repforget.knowledge import MIN_CLUSTERS
from repforget.knowledge_files import load_knowledge
from repforget.progress import Progress
from repforget.recipe import Recipe, load_recipe
from repforget.records import Claim, Verdict
from repforget.requests import matching
from repforget.requests.ledger import Ledger
from repforget.requests.stack import Placed, composed, in_force, opened, piled_up, sequence, workplace
from repforget.requests.states import WAITING, Request, requests
from repforget.store import Store, checksum

if TYPE_CHECKING:
    from repforget._session import Echo
    from repforget.artifact import Edit

__all__ = ["Answer", "Order", "answer", "composed", "in_force", "order_of", "sequence", "workplace"]
Mode = Literal["sequential", "union"]
NOT_IN_FORCE = ("fail",)
HOOKED_FAMILIES = ("erase", "steer")  # their edits mostly need hooks, on which no later edit can be piled up


@dataclass(frozen=True)
class Order:
    """How requests are to be answered; without a recipe the standard ladder, the probe's twins where it has some.

    ``training`` is the folder of a sharded training ('repforget train-shards') of the model.
    """

    recipe: Recipe | None = None
    mode: Mode = "sequential"
    training: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What became of one request: pass, fail, inconclusive, exact, refused or failed, in a sentence; where it lies."""

    request: int
    outcome: str
    sentence: str
    folder: str = ""


@dataclass(frozen=True)
class Made:
    """One attempt that came to an end: what the ledger is to hold of it."""

    outcome: str
    sentence: str
    folder: str
    covers: tuple[int, ...]
    events: tuple[tuple[str, Mapping[str, Any]], ...]


def order_of(recipe: Path | None, mode: str, training: Path | None) -> Order:
    """An order from options; UsageError where they do not go together."""
    if mode not in get_args(Mode):
        raise UsageError(f"There is no mode '{mode}': {nearest(mode, get_args(Mode))}")
    if recipe is not None and training is not None:
        raise UsageError("A recipe and a sharded training were given: a training needs no recipe, leave one out.")
    chosen = None if recipe is None else load_recipe(recipe)
    return Order(chosen, "union" if mode == "union" else "sequential", training)


def answer(
    ledger: Ledger, numbers: Sequence[int], order: Order, *, progress: Progress | None = None,
    echo: Echo = lambda line: None,
) -> list[Answer]:  # fmt: skip
    """Answer requests in the order of ``numbers`` and record what was done, shown and refused.

    Killed at any moment, the same call goes on where it was: runs keep their finished stages, and a verdict is in the
    ledger with its edit or not at all.  An error is recorded and does not keep later requests from their answers.
    Cost: one run of the loop per request ("union": one for all of them).  UsageError for a number that is not waiting.
    """
    from repforget.requests import sharded

    _waiting(ledger, numbers)
    store = opened(ledger, echo)
    answers: list[Answer] = []
    with store.locked(f"The folder '{store.root}' of the ledger '{ledger.path}'", ""):
        _without_texts(store)
        ledger.refuse_broken()
        found = _waiting(ledger, numbers)  # another process may have answered them before it freed the lock
        sharded.tidy(ledger, store)
        together = [r for r in found if order.mode == "union" and sharded.known(r, order.training) is None]
        for batch in (*([request] for request in found if request not in together), *([together] if together else ())):
            try:
                answers += _batch(ledger, batch, order, store, progress, echo)
            finally:
                _without_texts(store)
    return answers


def _without_texts(store: Store) -> None:
    """Clear away what holds texts: the probe of a run, and what an error of the program itself left."""
    shutil.rmtree(store.root / "probe", ignore_errors=True)
    (store.root / "error.txt").unlink(missing_ok=True)


def _waiting(ledger: Ledger, numbers: Sequence[int]) -> list[Request]:
    """The requests of these numbers; UsageError for one that needs no answer."""
    found = [requests(ledger, number)[0] for number in dict.fromkeys(numbers)]
    for request in found:
        if request.state not in WAITING:
            raise UsageError(f"Request {request.id} needs no answer (it is '{request.state}'): 'repforget request "
                             "list' shows those that do.")  # fmt: skip
    return found


def _failed(ledger: Ledger, failed: Sequence[Request], error: RepforgetError) -> list[Answer]:
    """Record an error, without names; whoever runs it is told all of it."""
    below = {number for placed in in_force(ledger) for number in placed.covers}
    sentence = str(error)
    for source in {r.source for r in (*failed, *(requests(ledger, number)[0] for number in below))}:
        try:
            sentence = matching.hidden(sentence, matching.named(source))
        except RepforgetError as unread:
            sentence = (f"The source '{Path(source).name}' cannot be read ({type(unread).__name__}), so that names "
                        f"cannot be left out of what was said of the {type(error).__name__}.")  # fmt: skip
            break
    numbers = [request.id for request in failed]
    ledger.record_all([("failed", {"reason": sentence, "error": type(error).__name__})], numbers)
    return [Answer(number, "failed", str(error)) for number in numbers]


def _batch(
    ledger: Ledger, batch: Sequence[Request], order: Order, store: Store, progress: Progress | None, echo: Echo
) -> list[Answer]:
    """Refuse what means nothing, answer the rest with one edit, and record it."""
    from repforget.requests import sharded

    answers: list[Answer] = []
    left: list[Request] = []
    index = cache(lambda source: matching.index(matching.named(source), ledger.pseudonym))
    for request in batch:
        try:
            reason = _refusal(ledger, request, order, index)
        except RepforgetError as error:
            answers += _failed(ledger, [request], error)
            continue
        if reason is None:
            left.append(request)
            continue
        ledger.record("refused", request.id, {"reason": reason})
        answers.append(Answer(request.id, "refused", reason))
    if not left:
        return answers
    numbers = [request.id for request in left]
    ledger.record_all([("started", {"mode": order.mode, "with": numbers})], numbers)
    for request in left:
        echo(f"request {request.id}: {'continued' if request.attempts else 'started'}")
    known = sharded.known(left[0], order.training)
    try:
        if known is None:
            made = _through_the_loop(ledger, left, order, store, progress, echo)
        else:
            made = sharded.take_out(ledger, left[0], known, store, progress)
    except RepforgetError as error:
        return answers + _failed(ledger, left, error)
    ledger.record_all(made.events, numbers)
    sharded.tidy(ledger, store)
    if made.outcome not in NOT_IN_FORCE:  # else earlier requests keep the edit that they have
        again = {"outcome": made.outcome, "after": numbers[-1], "together": True}
        ledger.record_all([("reverified", again)], [number for number in made.covers if number not in numbers])
    return answers + [Answer(number, made.outcome, made.sentence, made.folder) for number in numbers]


def _refusal(
    ledger: Ledger, request: Request, order: Order, index: Callable[[str], matching.Index]
) -> str | None:
    """Why there is nothing to answer, or None."""
    from repforget.requests import sharded

    known = sharded.known(request, order.training)
    if known is not None:
        return sharded.refusal(ledger, request, known)
    ids, unknown = matching.matched(request.names, index(request.source))
    if unknown:
        return matching.meaningless(unknown, len(request.names), request.source)
    earlier = [requests(ledger, number)[0] for placed in in_force(ledger) for number in placed.covers]
    answered = [other for other in earlier if other.state == "done" and other.id != request.id]
    if ids and order.mode == "sequential" and not set(ids) - _covered(ledger, answered):
        numbers = ", ".join(str(other.id) for other in answered)
        return f"All of it is covered by request {numbers}, whose edit is in force."
    return None


def _covered(ledger: Ledger, answered: Iterable[Request]) -> set[str]:
    """Ids of the items that requests are about."""
    return {item.id for other in answered
            for item in matching.items_of(ledger, other, load_knowledge(other.source))}  # fmt: skip


def _through_the_loop(
    ledger: Ledger, batch: Sequence[Request], order: Order, store: Store, progress: Progress | None, echo: Echo
) -> Made:
    from repforget import loop, report

    sources = {request.source for request in batch}
    if len(sources) > 1:
        raise UsageError(f"Requests {', '.join(str(r.id) for r in batch)} are about {len(sources)} different probes: "
                         "answer them with --mode sequential.")  # fmt: skip
    below = in_force(ledger)
    if any(placed.sharded for placed in below):
        raise UsageError("The model in force is a sharded training: answer with --training, so that records taken out "
                         "stay out.")  # fmt: skip
    recipe = _recipe(ledger, order, batch[0].source)
    knowledge = load_knowledge(batch[0].source, seed=recipe.seed)
    wanted = {i.id: i for request in batch for i in matching.items_of(ledger, request, knowledge)}
    covered = _covered(ledger, [requests(ledger, number)[0] for placed in below for number in placed.covers])
    covers = [request.id for request in batch]
    if order.mode == "union":
        wanted |= {i.id: i for i in matching.everything(knowledge) if i.id in covered}
        covers = sorted({*covers, *(n for placed in below for n in placed.covers)})
        below = ()
    clusters = len({item.cluster for item in wanted.values()})
    if clusters < MIN_CLUSTERS:
        raise KnowledgeError(f"The request names {clusters} clusters and a verdict needs {MIN_CLUSTERS}: answer it "
                             "together with others (--mode union), or take it out of a sharded training "
                             "(--training).")  # fmt: skip
    carved = matching.carved(knowledge, list(wanted.values()), covered)
    probe = matching.write_probe(matching.unnamed(carved, ledger.pseudonym), store.root / "probe")
    strangers = {item.id for item in knowledge.forget}  # whom the twins never knew; they know everybody else
    twins = recipe.twins if set(wanted) <= strangers else ()
    recipe = recipe.changed(model=_model_in_force(ledger, below, store, recipe), knowledge=str(probe), twins=twins)
    folder = store.root / f"run-{batch[-1].id}-{recipe.digest[:8]}"
    result = loop.run(recipe, folder, progress=progress, echo=echo)
    rung = max(result.rungs, key=lambda each: each.merit)
    return _made(report.load(result.folder), rung.folder, result.folder, store.root, below, covers, order.mode)


def _recipe(ledger: Ledger, order: Order, source: str) -> Recipe:
    """The recipe of the order, or the standard one; for edits that pile up, without editors whose edits are hooks."""
    model = str(ledger.facts["model"])
    if order.recipe is not None:
        if order.recipe.model != model:
            raise UsageError(f"The recipe is for '{order.recipe.model}' and the ledger for '{model}': give a recipe "
                             "for this model, or another --ledger.")  # fmt: skip
        return order.recipe
    recipe = Recipe.default(model, source)
    if order.mode == "union":
        return recipe
    kept = [choice for choice in recipe.ladder if method("edit", choice.name).family not in HOOKED_FAMILIES]
    return recipe.changed(ladder=kept)


def _model_in_force(ledger: Ledger, below: Sequence[Placed], store: Store, recipe: Recipe) -> str:
    """A name under which the model with the edits ``below`` loads: a checkpoint in the workplace, made once."""
    if not below:
        return recipe.model
    hooked = next((placed for placed in below if placed.hooked), None)
    if hooked is not None:
        raise UsageError(f"The edit in force of request {hooked.covers[-1]} needs hooks, so that no later edit can be "
                         "made on top of its weights: answer with --mode union, or with a ladder of editors that "
                         "change weights.")  # fmt: skip

    def build(folder: Path) -> None:
        from repforget.models.load import load

        base = load(recipe.model, device=recipe.device, dtype=recipe.dtype)
        piled_up(below).export_checkpoint(base, folder / "checkpoint")

    key = {"model": recipe.model, "dtype": recipe.dtype, "edits": [placed.digest for placed in below]}
    made = store.stage("model", key, build)
    for old in store.root.glob("model-*"):
        if old != made:
            shutil.rmtree(old)
    return str(made / "checkpoint")


def _made(
    data: Any, edit: Path, folder: Path, root: Path, below: Sequence[Placed], covers: list[int], mode: Mode
) -> Made:
    """What the ledger holds of a finished run (its report's data); paths are relative to the workplace."""
    from repforget.artifact import load_edit
    from repforget.report import RESULT_FILE

    verdict: Verdict = data.verdict
    saved = load_edit(edit)
    place = folder.relative_to(root).as_posix()
    return Made(verdict.outcome, verdict.sentence, place, tuple(covers), (
        ("edit", edit_facts(saved, edit, root, below, covers, mode)),
        ("shown", {"claims": [_shown(claim) for claim in verdict.claims], "controls": verdict.controls}),
        ("environment", {**data.environment, "git": git_commit()}),
        ("verdict", {"outcome": verdict.outcome, "sentence": verdict.sentence, "worst": verdict.worst,
                     "controls_ok": verdict.controls_ok, "artifact": verdict.artifact, "split": verdict.split,
                     "result": checksum(folder / RESULT_FILE), "folder": place,
                     "in_force": verdict.outcome not in NOT_IN_FORCE}),
    ))  # fmt: skip


def edit_facts(
    edit: Edit, folder: Path, root: Path, below: Sequence[Placed], covers: Sequence[int], mode: str
) -> dict[str, Any]:
    """What the ledger holds of an edit; ``below`` are the edits that it was made on."""
    held = edit.manifest.guarantee
    return {"method": edit.manifest.method, "digest": edit.digest, "path": folder.relative_to(root).as_posix(),
            "artifact": edit.artifact, "base_fingerprint": edit.manifest.base_fingerprint, "mode": mode,
            "under": [placed.seq for placed in below], "covers": list(covers), "touched": len(edit.touched),
            "guarantee": None if held is None else asdict(held)}  # fmt: skip


def _shown(claim: Claim) -> dict[str, Any]:
    levels = claim.levels
    return {"name": claim.name, "kind": claim.kind, "status": claim.status, "margin": claim.margin, "rho": claim.rho,
            "rho_low": claim.rho_low, "rho_high": claim.rho_high, "original": levels.get("original"),
            "floor": levels.get("floor", levels.get("prior")), "placebo": levels.get("placebo"),
            "edit": levels.get("edit"), "items": claim.n_items, "clusters": claim.n_clusters}  # fmt: skip


def environment(fingerprint: str) -> dict[str, Any]:
    """Versions, the fingerprint of the base and the commit of the code, where no run of the loop says them."""
    from repforget._session import versions

    return {"versions": versions(), "python": platform.python_version(), "model_fingerprint": fingerprint,
            "git": git_commit()}  # fmt: skip


def git_commit() -> str:
    """Commit of this code, with "+changes" where it was changed since; "none" where it is no part of a repository."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            said = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "errors.py") else None
    return "none" if commit is None else commit + ("+changes" if git("status", "--porcelain", "--", ".") else "")
