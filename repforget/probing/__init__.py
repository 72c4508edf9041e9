"""Probing classifiers: arrays in, evidence out; no model, no hook and no edit is known here."""

from repforget.probing.intervals import cluster_interval
from repforget.probing.prequential import Codes, code_lengths
from repforget.probing.sweep import SweepResult, fit_sweep
from repforget.probing.transfer import TransferResult, fit_transfer

__all__ = ["Codes", "SweepResult", "TransferResult", "cluster_interval", "code_lengths", "fit_sweep", "fit_transfer"]
