"""What the noise of subsampled steps is worth in privacy, by the accountants of opacus, and for units together."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

from repforget.errors import MissingExtraError, UsageError

Accountant = Literal["rdp", "prv"]
ACCOUNTANTS: tuple[str, ...] = get_args(Accountant)
Run = tuple[float, float, int]  # noise multiplier, sampling rate, steps
SPENT_BY = {
    "rdp": "Mironov, Talwar and Zhang 2019, arXiv 1908.10530",
    "prv": "Gopi, Lee and Wutschitz 2021, arXiv 2106.02848",
}
LARGEST = 200.0  # an epsilon beyond which nothing is said and the search for the noise is not tried


def _opacus() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside its own imports
            import opacus.accountants
            import opacus.accountants.utils
    except ModuleNotFoundError as error:
        raise MissingExtraError("Private training needs the library opacus, which is not installed: run "
                                '`pip install "repforget[dp]"`.') from error  # fmt: skip
    return opacus


def accountant_of(kind: str, history: Sequence[Sequence[Any]] = ()) -> Any:
    """An accountant of opacus with ``history`` already spent.

    Raises UsageError for any but "rdp" and "prv": "gdp" is an approximation that can understate epsilon.
    """
    if kind not in ACCOUNTANTS:
        why = " (gdp is a limit theorem that can understate epsilon)" if kind == "gdp" else ""
        raise UsageError(f"The accountant '{kind}' is not used{why}: choose rdp or prv.")
    made = _opacus().accountants.create_accountant(mechanism=kind)
    made.history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in history]
    return made


def spent(accountant: Any, delta: float) -> float:
    """Epsilon at ``delta`` of what ``accountant`` has counted, an upper bound; 0 where that is nothing."""
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on the range of orders: the bound holds at any
        return max(0.0, float(accountant.get_epsilon(delta=delta)))


@cache
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int, kind: str) -> float:
    """Standard deviation of the noise, in units of the clipping norm, that ``steps`` steps need for the budget.

    ``rate`` is the chance of a unit to be in a step.  Cost: up to some ten evaluations of the accountant, seconds for
    "prv".  Raises UsageError for a budget that no noise keeps or that says nothing.
    """
    accountant_of(kind)
    if not 0.0 < epsilon <= LARGEST:
        raise UsageError(f"Epsilon {epsilon:g} is no budget: give one above 0 and at most {LARGEST:g}, usually below "
                         "10.")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            noise = float(_opacus().accountants.utils.get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=kind,
                epsilon_tolerance=min(0.01, epsilon / 20),
            ))  # fmt: skip
            if not spent(accountant_of(kind, [(noise, rate, steps)]), delta) <= epsilon:
                raise ValueError("the accountant gives no number")
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"No noise keeps epsilon {epsilon:g} at delta {delta:g} over {steps} steps ({error}): "
                             "allow more, or take fewer steps.") from None  # fmt: skip
    return noise


def group(epsilon: float, delta: float, k: int) -> tuple[float, float]:
    """(epsilon, delta) for ``k`` units together: ``k epsilon`` and ``k exp((k - 1) epsilon) delta``, 1 at most.

    Source: Dwork and Roth 2014 (group privacy of approximate differential privacy).  A delta of 1 says nothing.
    """
    exponent = math.log(k) + (k - 1) * epsilon + math.log(delta)
    if k == 1 or exponent >= 0:
        return k * epsilon, min(1.0, delta) if k == 1 else 1.0
    return k * epsilon, math.exp(exponent)


def reach(epsilon: float, delta: float) -> int:
    """The largest number of units about which :func:`group` still says something (delta below 1)."""
    k = 1
    while group(epsilon, delta, 2 * k)[1] < 1.0:
        k *= 2
    return k + bisect_left(range(k + 1, 2 * k + 1), True, key=lambda n: group(epsilon, delta, n)[1] >= 1.0)
