"""The command line: ``repforget run|plan|locate|edit|verify|report|methods|organism``.

Exit codes: 0 pass, 10 fail, 11 inconclusive, 1 runtime error, 2 usage error, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit; a person's mistake ends in one sentence, never in a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from repforget.cli._guard import guarded

    sys.exit(guarded(sys.argv[1:] if arguments is None else arguments))
