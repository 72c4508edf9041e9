"""repforget: find where a language model keeps a piece of knowledge, edit it away, try to prove that wrong."""

from __future__ import annotations

__version__ = "0.1.0"
