"""verify(): a saved or fresh edit, a knowledge probe and some twins -> evidence and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from repforget.artifact import Edit, detached, placebo_of
from repforget.errors import ArtifactError, UsageError
from repforget.knowledge import Knowledge, Split
from repforget.models.load import LoadedModel, fingerprint, load
from repforget.progress import Progress
from repforget.records import Evidence, Verdict
from repforget.verify.arms import Arm, References
from repforget.verify.battery import Request, Task, asks_shuffled, ready, run_battery
from repforget.verify.verdict import judge


@dataclass(frozen=True)
class Result:
    """What verification gives: the verdict and the evidence behind it."""

    verdict: Verdict
    evidence: tuple[Evidence, ...]


def arms_of(
    edit: Edit | None, references: References, *, seed: int = 0, shuffled: bool = False
) -> tuple[Arm, ...]:
    """The arms of every verification, in order: original, edit, placebo, twin-0, twin-1, ... (without an edit: all
    that need none); ``shuffled`` adds the edit asked for exchanged answers.

    Edited arms are independent copies, made when opened and dropped when closed, so that the original stays at hand.
    """
    original = references.original

    def edited(make: Callable[[], Edit]) -> Callable[[], AbstractContextManager[LoadedModel]]:
        @contextmanager
        def open_copy() -> Iterator[LoadedModel]:
            yield make().applied_to(original)

        return open_copy

    twins = (Arm(f"twin-{k}", lambda twin=twin: _as_it_is(twin)) for k, twin in enumerate(references.twins))  # type: ignore[misc]
    untouched = Arm("original", lambda: _as_it_is(original))
    if edit is None:
        return (untouched, *twins)
    real = Arm("edit", edited(lambda: edit))
    exchanged = (Arm("shuffled", real.open, shuffled=True),) if shuffled else ()
    return (untouched, real, Arm("placebo", edited(lambda: placebo_of(edit, original, seed))), *exchanged, *twins)


@contextmanager
def _as_it_is(model: LoadedModel) -> Iterator[LoadedModel]:
    yield model


@contextmanager
def _untouched(model: LoadedModel) -> Iterator[LoadedModel]:
    """The model without any attached edit; ArtifactError where its weights are not those that were loaded."""
    with detached(model):
        if fingerprint(model.module) != model.fingerprint:
            raise ArtifactError(f"The weights of '{model.name}' are not those that were loaded, so that there is no "
                                "original to compare with: undo the fold, or load the model afresh.")  # fmt: skip
        yield model


def verify(
    model: LoadedModel, edit: Edit, knowledge: Knowledge, *, twins: Sequence[str | LoadedModel] = (),
    split: Split = "dev", verifiers: Request | Sequence[Task] = "standard", seed: int = 0, margin: float = 0.05,
    utility_margin: float = 0.02, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Attack an edit and judge it: every verifier on the original, the edit, a placebo edit and every twin.

    ``model`` is the base the edit was made for, with or without the edit attached at the moment.  ``twins`` are models
    (or their names) that never knew; with two of them the judge is checked on one against the other, without any the
    floor is the prior over alternatives and a pass reads "consistent with chance".  ``verifiers`` is a level or a list.
    Memory: the model, the twins and two copies of the model at a time.  Deterministic for a seed.

    A pass shows what was tried, at the budget stated in the evidence; it does not show that nothing else would work.
    """
    requested = ready(verifiers, split)
    view = knowledge.view(split)
    if not view.forget:
        raise UsageError(f"Split '{split}' of probe '{knowledge.name}' has no forget items: choose another split.")
    loaded = tuple(load(twin) if isinstance(twin, str) else twin for twin in twins)
    with _untouched(model) as original:
        references = References(original, loaded)
        arms = arms_of(edit, references, seed=seed, shuffled=asks_shuffled(verifiers, requested))
        evidence = run_battery(arms, view, requested, references, seed=seed,
                               progress=progress)  # fmt: skip
    verdict = judge(evidence, margin=margin, utility_margin=utility_margin, seed=seed, split=split,
                    artifact=edit.artifact, sites=edit.manifest.sites)  # fmt: skip
    return Result(verdict, evidence)
