"""Commands in processes of their own that share one import: forked from a process that has loaded a model before.

``run(model, [[command, ...], ...])`` starts the commands of a batch side by side, and the next batch when all
of them have ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from warm import Warm

Batches = Sequence[Sequence[Sequence[str]]]


def run(model: str, batches: Batches, timeout: float = 400.0) -> list[list[tuple[int, str]]]:
    """Exit code and output (stdout, then stderr) of every command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        server = Warm(Path(__file__).read_text(), [json.dumps([folder, model, batches])], environment)
        try:
            said = server.communicate(timeout)
        finally:
            server.kill()
        assert server.returncode == 0, said
        return [[_ended(Path(folder) / f"{i}-{k}") for k in range(len(batch))] for i, batch in enumerate(batches)]


def _ended(path: Path) -> tuple[int, str]:
    return int(path.with_suffix(".code").read_text()), path.with_suffix(".out").read_text()


def _child(path: Path, arguments: Sequence[str]) -> None:
    from repforget.cli import main

    with open(path.with_suffix(".out"), "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 70
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    path.with_suffix(".code").write_text(str(code))
    os._exit(code)


def _serve() -> None:
    folder, model, batches = json.loads(sys.argv[1])
    from repforget.cli import federated  # noqa: F401
    from repforget.federated import dealt, leave  # noqa: F401
    from repforget.federated.serve import grpc_parts
    from repforget.models.load import load

    grpc_parts()
    load(model, device="cpu")
    for i, batch in enumerate(batches):
        children = []
        for k, arguments in enumerate(batch):
            path = Path(folder) / f"{i}-{k}"
            path.with_suffix(".code").write_text("-9")  # of one that ends without a word
            child = os.fork()
            if child == 0:
                _child(path, arguments)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    _serve()
