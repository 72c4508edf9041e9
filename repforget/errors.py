"""The refusals: each one sentence that says what, where, what was expected and what to do next.

Every error a user can cause derives from :class:`RepforgetError`, so the command line prints its sentence
instead of a traceback. The class says whose move is next; ``exit_code`` is what a script sees.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RepforgetError(Exception):
    """Base of all refusals; the message is one sentence for a person."""

    exit_code = 1


class UsageError(RepforgetError):
    """The request itself is wrong (unknown name, malformed file, contradictory options)."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or probe file does not validate; lists every fault with its line."""


class KnowledgeError(UsageError):
    """A knowledge probe is empty, overlapping, duplicated or cannot be split."""


class UnknownNameError(UsageError):
    """A method, site, probe or arm that does not exist; names the nearest valid ones."""


class SiteError(UsageError):
    """A site that this architecture does not have, or a model that is only partly covered."""


class ModelLoadError(UsageError):
    """A model folder or id that cannot be loaded safely."""


class ArtifactError(UsageError):
    """An edit file that is corrupted, truncated, of another format, or made for another model."""


class LedgerError(UsageError):
    """A ledger of requests that is damaged, foreign, of a newer format, or was written to by another hand."""


class MissingExtraError(UsageError):
    """A feature whose optional dependency is not installed; names the install command."""


class NoEffectError(RepforgetError):
    """An edit that changes nothing although it was asked to change something."""


class NumericalError(RepforgetError):
    """NaN or infinite activations, a solve that is not finite, a divergence."""


class ResourceError(RepforgetError):
    """Not enough memory, disk or permission to do what was asked."""


class ControlError(RepforgetError):
    """A control came out wrong, so that no verdict may be given."""


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """Return ``"did you mean 'a' or 'b'?"`` for the closest valid names, or the list of them all."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "choose one of: " + ", ".join(names) if names else "none is available"
