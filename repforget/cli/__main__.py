"""``python -m repforget.cli`` is ``repforget``."""

from __future__ import annotations

from repforget.cli import main

main()
