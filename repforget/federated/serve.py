"""Server and clients as processes of their own, over flwr's bidirectional gRPC: the clients keep models and records.

flwr 1.41 moved SuperLink and SuperNode to HTTP and starts a process per message there; its gRPC service keeps one
stream per client, so that a client loads its model once.  Both ends must be of one release.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repforget.artifact import Edit
from repforget.errors import MissingExtraError, ResourceError, UsageError
from repforget.federated.clients import Worker, answer
from repforget.federated.door import PAUSE
from repforget.federated.messages import (
    FAILED,
    UNREADABLE,
    Introduction,
    Packed,
    Reply,
    Task,
    named,
    pack_task,
    shown,
    size,
)
from repforget.federated.run import Setup, finish, ready
from repforget.federated.server import Plan, federate
from repforget.federated.simulate import late, quiet, read_reply
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.store import Store

REFUSED, OVER = "refused", "over"  # what a server says before it hangs up
STOPPED = "has stopped before it was done"
GREETING = 20.0  # seconds for a client to introduce itself, after which it is refused


@dataclass(frozen=True)
class Certificates:
    """PEM files of TLS: the authority's certificate, and at a server its own certificate and key."""

    authority: Path
    certificate: Path | None = None
    key: Path | None = None

    def read(self) -> tuple[bytes, ...]:
        """Their bytes; UsageError for one that cannot be read."""
        found = []
        for path in (self.authority, self.certificate, self.key):
            if path is None:
                continue
            try:
                found.append(path.read_bytes())
            except OSError as error:
                raise UsageError(f"The certificate '{path}' cannot be read ({error.strerror}): give a PEM "
                                 "file.") from None  # fmt: skip
        return tuple(found)


def checked_address(address: str, certificates: Certificates | None) -> str:
    """``address`` as HOST:PORT; UsageError without a port, and for any but this machine without certificates."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"'{address}' is not HOST:PORT, for example 127.0.0.1:8080.")
    try:
        near = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        near = host == "localhost"
    if certificates is None and not near:
        raise UsageError(f"Without certificates everything that goes to '{host}' can be read on the way: give "
                         "--authority (at a server also --certificate and --key), or use 127.0.0.1.")  # fmt: skip
    return address


def _free(address: str) -> None:
    """ResourceError for a port in use: gRPC would share it, and clients would reach one server or the other."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
            found.bind(where)
    except OSError as error:
        raise ResourceError(f"No server can listen at '{address}' ({error.strerror}): end what uses the port, or give "
                            "another address of this machine.") from None  # fmt: skip


def grpc_parts() -> Any:
    """The modules of flwr that are used here; MissingExtraError where they are not installed or have moved."""
    quiet()
    try:
        from types import SimpleNamespace

        from flwr.client import Client, start_client
        from flwr.compat.common import typing as messages
        from flwr.server.client_manager import SimpleClientManager
        from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed
        from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server
        from grpc import RpcError
    except ImportError as error:
        raise MissingExtraError(f"Serving clients needs flwr 1.41 with its gRPC service ({error}): pip install "
                                "'repforget[federated]'.") from None  # fmt: skip
    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # importing flwr sets it
    return SimpleNamespace(RpcError=RpcError, Client=Client, start_client=start_client, messages=messages,
                           Manager=SimpleClientManager, Closed=GrpcBridgeClosed, start=start_grpc_server)  # fmt: skip


@dataclass
class Remote:
    """The fleet behind a gRPC server: whoever is connected and has introduced itself."""

    flwr: Any
    manager: Any
    timeout: float  # seconds for an answer
    wait: float
    note: Callable[[str], None]
    known: dict[str, tuple[Introduction, Any]] = field(default_factory=dict)  # by the id of the connection

    def members(self) -> list[Introduction]:
        self._greet()
        return [member for member, _ in self.known.values()]

    def _greet(self) -> None:
        here = dict(self.manager.all())
        self.known = {cid: pair for cid, pair in self.known.items() if cid in here}
        new = {cid: proxy for cid, proxy in here.items() if cid not in self.known}
        if not new:
            return
        with ThreadPoolExecutor(len(new)) as pool:  # one that is silent keeps no other waiting
            told = list(pool.map(self._introduced, new.values()))
        for (cid, proxy), member in zip(new.items(), told, strict=True):
            if member is None:
                self.note("refused: a client that did not introduce itself as those of this release do")
                self._hang_up(proxy, REFUSED, "did not introduce itself as clients of the server's release do")
            elif any(member.client == other.client for other, _ in self.known.values()):
                self.note(f"refused: a second client '{shown(member.client)}'")
                self._hang_up(proxy, REFUSED, "bears the name of a client that is already here")
            else:
                self.known[cid] = (member, proxy)

    def _introduced(self, proxy: Any) -> Introduction | None:
        try:
            told = proxy.get_properties(self.flwr.messages.GetPropertiesIns({}), GREETING, None)
            return Introduction(**json.loads(str(told.properties["member"])))
        except (self.flwr.Closed, *UNREADABLE):
            return None

    def refuse(self, member: Introduction, reason: str) -> None:
        for cid, (known, proxy) in list(self.known.items()):
            if known is member:
                del self.known[cid]
                self._hang_up(proxy, REFUSED, reason)

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        packed = pack_task(task)
        proxies = {member.client: proxy for member, proxy in self.known.values() if member.client in clients}
        with ThreadPoolExecutor(max(1, len(proxies))) as pool:
            waiting = [pool.submit(self._fit, name, proxy, task.round, packed) for name, proxy in proxies.items()]
            for future in as_completed(waiting):
                yield future.result()

    def _fit(self, name: str, proxy: Any, round: int, packed: Packed) -> Reply:
        messages, started, timeout = self.flwr.messages, time.monotonic(), self.timeout
        asked = messages.FitIns(messages.Parameters([packed[1]], "safetensors"), {"head": packed[0]})
        try:
            back = proxy.fit(asked, timeout, round)
        except self.flwr.Closed:
            self.manager.unregister(proxy)
            gone = "died before it answered" if time.monotonic() - started < timeout else late(timeout)
            return Reply(name, round, failed=gone, down=size(packed))
        except UNREADABLE:
            return Reply(name, round, failed="sent a message that cannot be read", down=size(packed))
        tensors = b"".join(back.parameters.tensors)
        return read_reply(name, round, (str(back.metrics.get("head", "")), tensors), size(packed))

    def close(self, why: str = "") -> None:
        """Tell everybody that it is over, and ``why`` where it ended before it was done."""
        for proxy in dict(self.manager.all()).values():
            self._hang_up(proxy, OVER, why)

    def _hang_up(self, proxy: Any, why: str, text: str) -> None:
        try:
            proxy.get_properties(self.flwr.messages.GetPropertiesIns({why: text}), PAUSE * 25, None)
            proxy.reconnect(self.flwr.messages.ReconnectIns(None), PAUSE * 25, None)
        except (self.flwr.Closed, *UNREADABLE):
            pass  # it has gone by itself, or does not understand
        self.manager.unregister(proxy)


@dataclass(frozen=True)
class Post:
    """An address of this machine at which clients can be served: checked, and not used yet."""

    address: str
    flwr: Any
    secrets: tuple[bytes, ...] | None

    @classmethod
    def at(cls, address: str, certificates: Certificates | None = None) -> Post:
        """UsageError for an address beyond this machine without certificates, ResourceError for a port in use."""
        checked_address(address, certificates)
        flwr = grpc_parts()
        secrets = None if certificates is None else certificates.read()
        if secrets is not None and len(secrets) != 3:
            raise UsageError("A server with certificates needs three files: --authority, --certificate and --key.")
        _free(address)
        return cls(address, flwr, secrets)

    @contextmanager
    def open(self, timeout: float, wait: float, note: Callable[[str], None]) -> Iterator[Remote]:
        """The fleet of those who join, until the block ends; they are told then, and why where it failed.

        ``timeout``: seconds for an answer; ``wait``: seconds to wait for clients that are not here.
        """
        manager = self.flwr.Manager()
        _free(self.address)  # two that began together
        try:
            server = self.flwr.start(client_manager=manager, server_address=self.address, certificates=self.secrets)
        except (SystemExit, RuntimeError) as error:
            what = "check that certificate and key belong together" if self.secrets else "give another address"
            raise ResourceError(f"No server can listen at '{self.address}' ({shown(str(error))}): {what}.") from None
        remote = Remote(self.flwr, manager, timeout, wait, note)
        note(f"listening at {server.bound_address}")
        why = STOPPED
        try:
            yield remote
            why = ""
        finally:
            remote.close(why)
            server.stop(grace=1).wait()


def serve(
    base: LoadedModel, plan: Plan, folder: Path, *, address: str = "127.0.0.1:8080", clients: int = 1,
    wait: float = 600.0, certificates: Certificates | None = None, note: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """Serve rounds to the clients that join, once ``clients`` are here; the same call continues a killed server.

    The server needs the base model for its fingerprint, shapes and the edit; it sees no record.  Whoever reaches the
    port may join: TLS hides the traffic, it does not say who a client is.  Raises UsageError for an address beyond
    this machine without certificates, ResourceError for a port in use or too few clients.
    """
    post, plan = Post.at(address, certificates), ready(base, plan)
    with Store(folder).locked():
        Setup(plan, {}).claim(folder)
        with post.open(plan.timeout, wait, note) as remote:
            state = federate(remote, plan, base, folder, first=clients, note=note, progress=progress)
        return finish(base, plan, state, folder)


def join(
    worker: Worker, *, address: str = "127.0.0.1:8080", wait: float = 600.0,
    certificates: Certificates | None = None, note: Callable[[str], None] = lambda line: None,
) -> int:  # fmt: skip
    """Do what a server asks until it says that it is over; returns how often that was.

    A connection that breaks is tried again for ``wait`` seconds.  UsageError with the server's reason where it refuses
    this client, ResourceError where it cannot be reached or stops before it is done.
    """
    checked_address(address, certificates)
    flwr = grpc_parts()
    authority = None if certificates is None else certificates.read()[0]
    client, said = _flwr_client(flwr, worker, note)
    last = time.monotonic()
    while OVER not in said and REFUSED not in said:
        rounds = len(said["rounds"])
        try:
            with _no_tracebacks():
                flwr.start_client(server_address=address, client=client, root_certificates=authority,
                                  insecure=certificates is None)  # fmt: skip
        except flwr.RpcError as error:
            if len(said["rounds"]) > rounds:
                last = time.monotonic()
            if time.monotonic() - last > wait:
                raise ResourceError(f"No server answers at '{address}' for {wait:g} s ({error.code().name}): start it, "
                                    "or give another address.") from None  # fmt: skip
            time.sleep(PAUSE * 5)
    if REFUSED in said:
        raise UsageError(f"The server refuses '{worker.name}': it {shown(said[REFUSED])}.")
    if said[OVER]:
        raise ResourceError(f"The server at '{address}' {shown(said[OVER])}: join again when it runs "
                            "again.")  # fmt: skip
    return len(said["rounds"])


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Keep gRPC's watcher of a channel from telling, by a traceback, that the channel was closed."""
    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        if "Channel closed" not in str(what.exc_value):
            before(what)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _flwr_client(flwr: Any, worker: Worker, note: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
    """flwr's client around ours, and what the server has said to it so far."""
    messages = flwr.messages
    said: dict[str, Any] = {"rounds": []}
    fine = messages.Status(messages.Code.OK, "")

    def get_properties(self: Any, ins: Any) -> Any:
        said.update({what: ins.config[what] for what in (REFUSED, OVER) if what in ins.config})
        own = json.dumps(vars(worker.introduce()))
        return messages.GetPropertiesRes(fine, {"member": own})

    def fit(self: Any, ins: Any) -> Any:
        asked = str(ins.config.get("head", "")), b"".join(ins.parameters.tensors)
        head, tensors = answer(worker, asked)
        told = json.loads(head)
        said["rounds"].append(told["round"])
        note(f"{named(asked)} {told['round']}: {told.get(FAILED, 'answered')}")
        parameters = messages.Parameters([tensors] if tensors else [], "safetensors")
        return messages.FitRes(fine, parameters, 1, {"head": head})

    return type("Joined", (flwr.Client,), {"get_properties": get_properties, "fit": fit})(), said
