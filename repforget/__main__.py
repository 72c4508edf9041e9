"""``python -m repforget`` is ``repforget``."""

from __future__ import annotations

from repforget.cli import main

if __name__ == "__main__":
    main()
