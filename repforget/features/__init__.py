"""Sparse autoencoders: read, check, train, and compare what their features do on two sets of texts."""

from __future__ import annotations

from repforget.features.autoencoder import (
    Activation,
    Scaling,
    SparseAutoencoder,
    encoded,
    highest_share,
    share_open,
)

__all__ = ["Activation", "Scaling", "SparseAutoencoder", "encoded", "highest_share", "share_open"]
