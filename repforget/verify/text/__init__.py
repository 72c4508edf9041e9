"""Attacks that ask: other words, other forms, other contexts; black-box or logits."""
