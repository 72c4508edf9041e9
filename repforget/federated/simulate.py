"""Clients on one machine: one after the other in this process, or side by side in flwr's simulation on ray."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any, TypeVar

from repforget.errors import MissingExtraError, ResourceError, UsageError
from repforget.federated.clients import Client, Worker, answer
from repforget.federated.faults import Fault, Faulty
from repforget.federated.messages import Introduction, Packed, Reply, Task, pack_task, size, unpack_reply
from repforget.federated.sources import Source
from repforget.models.load import LoadedModel, load

T = TypeVar("T")
START = 600.0  # seconds for all processes to load the model
PAUSE = 0.1  # seconds between two looks for replies
STORE = 200_000_000  # bytes of ray's object store, at least


@dataclass(frozen=True)
class Here:
    """A fleet in this process: the clients work one after the other, each message packed as if it travelled."""

    clients: Mapping[str, Worker]
    timeout: float = 600.0
    wait: float = 0.0  # nobody comes later

    def members(self) -> list[Introduction]:
        return [client.introduce() for client in self.clients.values()]

    def refuse(self, member: Introduction, reason: str) -> None:
        """Nobody is behind it who could be told."""

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        packed = pack_task(task)
        for name in clients:
            started = time.monotonic()
            back = answer(self.clients[name], packed)
            if time.monotonic() - started > self.timeout:
                yield Reply(name, task.round, failed=late(self.timeout), down=size(packed))
            else:
                yield read_reply(name, task.round, back, size(packed))


def here(
    model: LoadedModel, sources: Mapping[str, Source], faults: Sequence[Fault] = (), timeout: float = 600.0
) -> Here:
    """The clients of ``sources`` around one loaded model."""
    made: dict[str, Worker] = {name: Client.of(name, model, source.records()) for name, source in sources.items()}
    if faults:
        made = {name: Faulty(client, tuple(faults), timeout) for name, client in made.items()}
    return Here(made, timeout)


@lru_cache(maxsize=1)
def _model(name: str) -> LoadedModel:
    import torch

    torch.set_num_threads(1)  # one core for each client's process
    return load(name, device="cpu")


@lru_cache(maxsize=64)
def _client(model: str, name: str, source: Source) -> Client:
    return Client.of(name, _model(model), source.records())


def client_app(model: str, sources: Mapping[str, Source], faults: Sequence[Fault], timeout: float) -> Any:
    """The flwr ClientApp of the simulation: partition k is the k-th client, loaded once per process of ray."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app, names = ClientApp(), sorted(sources)

    def train(message: Any, context: Any) -> Any:
        name = names[int(context.node_config["partition-id"])]
        worker = Faulty(_client(model, name, sources[name]), tuple(faults), timeout)
        body = message.content["task"]
        head, tensors = answer(worker, (str(body["head"]), bytes(body["tensors"])))
        return Message(RecordDict({"reply": ConfigRecord({"head": head, "tensors": tensors})}), reply_to=message)

    def query(message: Any, context: Any) -> Any:
        name = names[int(context.node_config["partition-id"])]
        own = vars(_client(model, name, sources[name]).introduce())
        return Message(RecordDict({"member": ConfigRecord({**own})}), reply_to=message)

    app.train()(train)
    app.query()(query)
    return app


@dataclass
class Ray:
    """The fleet behind a flwr grid: messages to the virtual nodes of a simulation, with an end to every wait."""

    grid: Any
    timeout: float
    stop: threading.Event
    nodes: dict[str, int]
    known: list[Introduction]
    wait: float = 0.0

    @classmethod
    def join(cls, grid: Any, timeout: float, stop: threading.Event, count: int) -> Ray:
        """Wait until all ``count`` nodes have introduced themselves; ResourceError where they do not in time."""
        fleet = cls(grid, timeout, stop, {}, [])
        end = time.monotonic() + START
        while len(nodes := list(grid.get_node_ids())) < count:
            fleet.look()
            if time.monotonic() > end:
                raise ResourceError(f"Only {len(nodes)} of {count} clients were started in {START:.0f} s: give fewer, "
                                    "or more memory.")  # fmt: skip
            time.sleep(PAUSE)
        from flwr.app import RecordDict

        for node, reply in fleet.exchange({node: RecordDict() for node in nodes}, "query", 0, START):
            if reply is None or reply.has_error():
                why = "did not answer" if reply is None else _reason(reply)
                raise ResourceError(f"A client could not be started: it {why}; the same command tries again.")
            member = Introduction(**dict(reply.content["member"]))
            fleet.nodes[member.client] = node
            fleet.known.append(member)
        return fleet

    def members(self) -> list[Introduction]:
        return self.known

    def refuse(self, member: Introduction, reason: str) -> None:
        """A node of a simulation shares the server's model and cannot be refused for another."""

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        from flwr.app import ConfigRecord, RecordDict

        packed, names = pack_task(task), {self.nodes[name]: name for name in clients}
        contents = {node: RecordDict({"task": ConfigRecord({"head": packed[0], "tensors": packed[1]})})
                    for node in names}  # fmt: skip
        for node, message in self.exchange(contents, "train", task.round, self.timeout):
            name = names[node]
            if message is None:
                yield Reply(name, task.round, failed=late(self.timeout), down=size(packed))
            elif message.has_error():
                yield Reply(name, task.round, failed=_reason(message), down=size(packed))
            else:
                body = message.content["reply"]
                yield read_reply(name, task.round, (str(body["head"]), bytes(body["tensors"])), size(packed))

    def exchange(self, contents: Mapping[int, Any], kind: str, round: int, seconds: float) -> Iterator[tuple[int, Any]]:
        """Send each node its content; (node, message) as they come back, None for those that do not in time."""
        from flwr.app import Message

        end = time.monotonic() + seconds
        sent = [Message(content, node, kind, group_id=str(round)) for node, content in contents.items()]
        waiting = dict(zip(self.grid.push_messages(sent), contents, strict=True))
        while waiting and time.monotonic() < end:
            self.look()
            for message in self.grid.pull_messages(list(waiting)):
                yield waiting.pop(message.metadata.reply_to_message_id), message
            time.sleep(PAUSE)
        yield from ((node, None) for node in waiting.values())

    def look(self) -> None:
        """Leave where the user has asked to."""
        if self.stop.is_set():
            raise InterruptedError


DIED = "died before it answered"


def _reason(message: Any) -> str:
    """The sentence of a flwr error; one that tells of a lost process is told as such."""
    text = " ".join(str(message.error.reason).split())
    lost = any(name in text for name in ("ActorDied", "ActorUnavailable", "RayActorError", "WorkerCrashed"))
    return DIED if lost else f"failed: {text[-300:]}"


def late(seconds: float) -> str:
    return f"did not answer within {seconds:g} s"


def read_reply(name: str, round: int, packed: Packed, down: int) -> Reply:
    """The reply of ``name``; one that cannot be read, or bears another's name, is a failure of ``name``."""
    try:
        reply = unpack_reply(packed, down)
        failed = None if reply.client == name else f"answered as '{reply.client}'"
    except UsageError as error:
        failed = str(error)
    return Reply(name, round, failed=failed, down=down, up=size(packed)) if failed else reply


def on_ray(
    model: str, sources: Mapping[str, Source], act: Callable[[Ray], T], *, workers: int = 2, timeout: float = 600.0,
    faults: Sequence[Fault] = (),
) -> T:  # fmt: skip
    """Run ``act`` with a fleet of ``sources`` in flwr's simulation, ``workers`` processes of one core each.

    Nothing leaves the machine: telemetry of flwr and ray is off, ray's dashboard too.  MissingExtraError without flwr;
    KeyboardInterrupt after Ctrl-C, once the clients have stopped.  Cost: a start of some seconds, and the model once
    per process.
    """
    quiet()
    try:
        import ray  # noqa: F401
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation
    except ImportError:
        raise MissingExtraError("The simulation of clients needs flwr with ray, which are not installed: pip install "
                                "'repforget[federated]'.") from None  # fmt: skip
    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # importing flwr sets it
    server, stop = ServerApp(), threading.Event()
    kept: list[T] = []

    def main(grid: Any, context: Any) -> None:
        kept.append(act(Ray.join(grid, timeout, stop, len(sources))))

    server.main()(main)

    # A process that a client has killed is started again, and what it was doing is tried once more: without that the
    # next clients to be given to it would fail too.
    resources = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1, "max_task_retries": 1}
    started = {"num_cpus": workers, "num_gpus": 0, "object_store_memory": STORE, "include_dashboard": False,
               "log_to_driver": False, "logging_level": logging.CRITICAL}  # fmt: skip
    with _interruptible(stop), _no_printing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run_simulation(server, client_app(model, sources, faults, timeout), len(sources),
                           backend_config={"client_resources": resources, "init_args": started})  # fmt: skip
        except InterruptedError:
            raise KeyboardInterrupt from None
    return kept[0]


def quiet() -> None:
    """No telemetry of flwr and ray; to be called before they are imported."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def _no_printing() -> Iterator[None]:
    """Keep ray from printing on stdout that a process died: the report says whose it was."""
    from ray._private import worker

    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *data, **more: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets ``stop`` instead of tearing a thread pool apart, a second one does not wait for the clients at work;
    outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
