"""Deletion requests: their ledger, their answers, and whether earlier answers last."""

from repforget.requests.ledger import Event, Ledger
from repforget.requests.states import Request, requests

__all__ = ["Event", "Ledger", "Request", "requests"]
