"""Processes that start with everything imported: forked, as often as asked, from one that imported it once.

Importing torch and transformers costs four seconds of a core, more than most of these processes then do. A fork of a
process without threads is a process like any other: with its own environment, killed by its own signals.  All of one
server have one hash seed, so that two of them must not be what shows that the order of a set changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

IMPORTED = ["accelerate", "edit_models", "repforget.cli", "repforget.edit._dispatch", "repforget.loop",
            "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]  # fmt: skip
GRPC = ["repforget.cli.federated", "repforget.federated.dealt", "repforget.federated.leave", "flwr.client",
        "flwr.server.superlink.fleet.grpc_bidi.grpc_server"]  # fmt: skip
COMMAND = "import sys; from repforget.cli import main; main(sys.argv[1:])"
Batches = Sequence[Sequence[Sequence[str]]]


@cache
def _server(number: int, *more: str) -> forkserver.ForkServer:
    """One of several, each an interpreter of its own."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*IMPORTED, *more])
    return server


def _become(code: str, arguments: Sequence[str], env: Mapping[str, str], out: str, err: str) -> None:
    """In the new process: what ``python -c code arguments`` would do."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["-c", *arguments]
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    exec(compile(code, "<warm>", "exec"), {"__name__": "__main__"})


class Warm:
    """One such process, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(
        self, code: str, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None, server: int = 0,
        more: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._folder = Path(tempfile.mkdtemp())
        self._out, self._err = self._folder / "out", self._folder / "err"
        for path in (self._out, self._err):
            path.touch()
        given = (code, tuple(arguments), dict(os.environ if env is None else env), str(self._out), str(self._err))
        self._process = multiprocessing.get_context("forkserver").Process(target=_become, args=given)
        with mock.patch.object(forkserver, "connect_to_new_process", _server(server, *more).connect_to_new_process):
            self._process.start()
        self.stdout = self._out.open()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said that was not read yet, and its errors; TimeoutError where it does not end."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise TimeoutError(f"The process still runs after {timeout} s.")
        said = self.stdout.read(), self._err.read_text()
        self.stdout.close()
        shutil.rmtree(self._folder)
        return said


def commands(batches: Batches, timeout: float = 400.0) -> list[list[tuple[int | None, str, str]]]:
    """Exit code, output and errors of the repforget commands of each batch, side by side, batch after batch."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0"}
    found = []
    for batch in batches:
        with mock.patch.dict(os.environ, env):  # for the server, where this is the first that it is asked for
            running = [Warm(COMMAND, arguments, env, more=GRPC) for arguments in batch]
        said = [each.communicate(timeout) for each in running]
        found.append([(each.returncode, *texts) for each, texts in zip(running, said, strict=True)])
    return found
