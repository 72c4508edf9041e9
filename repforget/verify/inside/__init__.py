"""Attacks from the inside: what activations, gradients and read-outs still tell."""
