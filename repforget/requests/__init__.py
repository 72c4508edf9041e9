"""Deletion requests: their ledger, their answers, and whether earlier answers last."""
