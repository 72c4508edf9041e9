"""Statistics of the judge: intervals, proportions, tests and bounds; numpy and scipy only, nothing knows a model.

Every limit is one-sided: ``low`` and ``high`` each leave ``alpha`` outside, so 0.025 gives the usual 95 % interval.
"""

from __future__ import annotations

from repforget.verify.statistics.equivalence import Equivalence, equivalence, margin_above_noise, noise_floor
from repforget.verify.statistics.intervals import (
    ALPHA,
    DRAWS,
    FEW_CLUSTERS,
    Interval,
    bootstrap,
    cluster_totals,
    mean_interval,
    ratio_interval,
)
from repforget.verify.statistics.leakage import anderson_mean_bound, leak_at_k, leak_share, tail_bound
from repforget.verify.statistics.multiple import MaxT, benjamini_hochberg, holm, max_t, spend_alpha
from repforget.verify.statistics.power import design_effect, icc, items_needed, sample_size
from repforget.verify.statistics.proportions import (
    ChanceTest,
    binomial_test_chance,
    clopper_pearson,
    wilson,
    zero_event_limit,
)
from repforget.verify.statistics.separation import auc, auc_interval, too_few_for_fpr, tpr_at_fpr, tpr_interval
from repforget.verify.statistics.two_samples import KS, Swap, ks_critical, ks_exact, ks_p_value, swap_permutation

__all__ = [
    "ALPHA", "DRAWS", "FEW_CLUSTERS", "KS", "ChanceTest", "Equivalence", "Interval", "MaxT", "Swap",
    "anderson_mean_bound", "auc", "auc_interval", "benjamini_hochberg", "binomial_test_chance", "bootstrap",
    "clopper_pearson", "cluster_totals", "design_effect", "equivalence", "holm", "icc", "items_needed", "ks_critical",
    "ks_exact", "ks_p_value", "leak_at_k", "leak_share", "margin_above_noise", "max_t", "mean_interval", "noise_floor",
    "ratio_interval", "sample_size", "spend_alpha", "swap_permutation", "tail_bound", "too_few_for_fpr", "tpr_at_fpr",
    "tpr_interval", "wilson", "zero_event_limit",
]  # fmt: skip
