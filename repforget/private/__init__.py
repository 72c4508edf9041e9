"""Training that can be accounted for: plain fine-tuning saved as an edit, DP-SGD, and noise that certifies."""

from repforget.private.accounting import Accountant
from repforget.private.job import run
from repforget.private.trainer import Privacy, train

__all__ = ["Accountant", "Privacy", "run", "train"]
