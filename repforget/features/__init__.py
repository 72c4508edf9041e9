"""Sparse autoencoders: read, check, train, and compare what their features do on two sets of texts."""

from __future__ import annotations

from repforget.features.activity import (
    Activity,
    feature_values,
    frequency_difference,
    importance_ratio,
    measure,
    rare_elsewhere,
    told,
)
from repforget.features.autoencoder import (
    Activation,
    Scaling,
    SparseAutoencoder,
    encoded,
    highest_share,
    share_open,
)
from repforget.features.files import read, save
from repforget.features.fit import check_site, neighbours, unexplained
from repforget.features.source import TRAIN, Source, obtain
from repforget.features.train import Trained, train_features

__all__ = [
    "TRAIN", "Activation", "Activity", "Scaling", "Source", "SparseAutoencoder", "Trained", "check_site", "encoded",
    "feature_values", "frequency_difference", "highest_share", "importance_ratio", "measure", "neighbours", "obtain",
    "rare_elsewhere", "read", "save", "share_open", "told", "train_features", "unexplained",
]  # fmt: skip
