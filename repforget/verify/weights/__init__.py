"""Attacks on the weights: relearning, rounding, pruning, merging, noise."""
