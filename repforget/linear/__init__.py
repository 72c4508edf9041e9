"""Linear models that forget exactly or within a promise: arrays only, no language model is known here."""

from repforget.linear.budget import Budget, draw_noise
from repforget.linear.claims import guarantee
from repforget.linear.files import load_head, opened, refuse, refuse_target, save_head, write_weights
from repforget.linear.head import Head, fit_head, removals_left, remove
from repforget.linear.logistic import Bounds, Logistic, change_logistic, fit_logistic, refit
from repforget.linear.release import Release, publications_left, publish, spent, utility
from repforget.linear.ridge import Ridge, change_ridge, distance, fit_ridge, refreshed
from repforget.linear.rows import Table, read_table, write_table
from repforget.linear.softmax import Softmax, fit_softmax

__all__ = [
    "Bounds", "Budget", "Head", "Logistic", "Release", "Ridge", "Softmax", "Table", "change_logistic", "change_ridge",
    "distance", "draw_noise", "fit_head", "fit_logistic", "fit_ridge", "fit_softmax", "guarantee", "load_head",
    "opened", "publications_left", "publish", "read_table", "refit", "refreshed", "refuse", "refuse_target",
    "removals_left", "remove", "save_head", "spent", "utility", "write_table", "write_weights",
]  # fmt: skip
