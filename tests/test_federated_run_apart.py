"""The same federation with something in between: processes of ray, and gRPC on this machine."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edit_models
import numpy as np
import pytest
import tiny_models
import warm
from test_federated_moments import distance

from repforget.artifact import load_edit
from repforget.errors import ResourceError, UsageError
from repforget.federated.clients import Client, Worker
from repforget.federated.dealt import dealt, write_part
from repforget.federated.faults import Fault, Faulty
from repforget.federated.history import History
from repforget.federated.leave import leave
from repforget.federated.messages import Local
from repforget.federated.run import simulate
from repforget.federated.serve import Certificates, Post, checked_address, join, serve
from repforget.federated.server import Plan
from repforget.federated.simulate import Here
from repforget.federated.sources import Source, of_folder
from repforget.federated.together import SECURE, Sums, edit_of_fleet
from repforget.models.load import LoadedModel, load, wrap
from repforget.training import read_records

pytest.importorskip("flwr", reason="the extra 'federated' is not installed")
SETTINGS = {"rank": 2, "alpha": 4.0, "lr": 0.01, "batch_size": 2}


@pytest.fixture
def world(tmp_path: Path) -> tuple[str, dict[str, Source]]:
    """A model in a folder, and three clients with two to four records."""
    base = wrap(tiny_models.build("llama"), tiny_models.tiny_tokenizer())
    base.module.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for k, name in enumerate(("ann", "bob", "cid")):
        lines = [json.dumps({"id": f"{name}{i}", "prompt": f"{tiny_models.WORDS[k + i]} was born in",
                             "answer": tiny_models.WORDS[3 * k + i + 8]}) for i in range(k + 2)]  # fmt: skip
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "model"), of_folder(tmp_path / "data")


def plan(model: str, timeout: float = 300.0) -> Plan:
    return Plan(model, Local(**SETTINGS), 2, timeout=timeout)  # type: ignore[arg-type]


def expected(model: str, sources: dict[str, Source], folder: Path, *faults: str) -> Path:
    simulate(load(model, device="cpu"), plan(model), sources, folder, engine="here",
             faults=[Fault.parse(f) for f in faults])  # fmt: skip
    return folder


def same(a: Path, b: Path) -> None:
    """Both trainings took the same updates into the same states (rounding of other processes aside)."""
    one, two = (History.open(folder / "history") for folder in (a, b))
    assert len(one) == len(two) == 2
    for left, right in zip(one, two, strict=True):
        assert left.clients == right.clients
        for name in left.before:
            np.testing.assert_allclose(left.before[name], right.before[name], atol=1e-6)
    first, second = (load_edit(folder / "edit") for folder in (a, b))
    assert first.manifest.base_fingerprint == second.manifest.base_fingerprint
    assert first.touched == second.touched


def failed(folder: Path) -> list[dict[str, str]]:
    return [row["failed"] for row in json.loads((folder / "report.json").read_text())["rounds"]]


@pytest.mark.slow
def test_ray_gives_the_same_and_a_process_that_dies_takes_nobody_along(
    world: tuple[str, dict[str, Source]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, sources = world
    said: list[str] = []
    simulate(load(model, device="cpu"), plan(model), sources, tmp_path / "ray", workers=1, note=said.append,
             faults=[Fault("bob", 1, "die")])  # fmt: skip
    assert failed(tmp_path / "ray") == [{"bob": "died before it answered"}, {}]
    assert said == ["round 1: client 'bob' died before it answered; it is left out"]
    assert capfd.readouterr().out == ""
    same(tmp_path / "ray", expected(model, sources, tmp_path / "here", "bob:1:error"))


@pytest.mark.slow
def test_commands_over_grpc_train_forget_and_tell_moments_as_one_process_does(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base = load(model, device="cpu")
    parts = dealt(edit_models.people().for_editor(), 4)
    for name, part in parts.items():
        write_part(tmp_path / "data" / f"{name}.jsonl", part)
    at = ("--address", f"127.0.0.1:{free_port()}", "--wait", "100", "--json")

    def command(kind: str, *more: str) -> list[str]:
        return ["federated", kind, *more, *at]

    def joins(name: str, *more: str) -> list[str]:
        return command("join", name, "--data", str(tmp_path / "data" / f"{name}.jsonl"), "--model", model, *more)

    local = ("--rank", "2", "--alpha", "4", "--lr", "0.01", "--batch-size", "2", "--rounds", "2", "--clients", "2")
    lost = "client-1"
    train, forget, tell = warm.commands([
        [command("serve", "--model", model, "--out", str(tmp_path / "run"), *local),
         joins("ann"), joins("bob", "--inject", "bob:2:die")],
        [command("forget", str(tmp_path / "run"), "bob", "--out", str(tmp_path / "left"), "--keep-record"),
         joins("ann")],
        [command("moments", "--model", model, "--out", str(tmp_path / "moments"), "--clients", "4", "--minimum", "1"),
         *(joins(name, *(("--inject", f"{lost}:3:die") if name == lost else ())) for name in parts)],
    ])  # fmt: skip
    assert [code for code, _, _ in train] == [0, 0, 1] and '"rounds": 2' in train[1][1]
    body = json.loads((tmp_path / "run" / "report.json").read_text())
    assert body["clients"] == {"ann": 2, "bob": 3} and body["totals"]["up"] > 0
    assert [row["failed"] for row in body["rounds"]] == [{}, {"bob": "died before it answered"}]
    two = {name: sources[name] for name in ("ann", "bob")}
    here = expected(model, two, tmp_path / "here", "bob:2:error")
    same(tmp_path / "run", here)
    assert [code for code, _, _ in forget] == [0, 0]
    leave(base, here, "bob", "retrain", tmp_path / "kept")
    same(tmp_path / "left", tmp_path / "kept")
    assert sorted(str(code) for code, _, _ in tell) == ["0", "0", "0", "0", "1"]
    told = {name: Client(name, base, (), data=part) for name, part in parts.items() if name != lost}
    wanted, _ = edit_of_fleet(Here(told), base, "leace", 3, sums=Sums(SECURE.bound, 1))
    assert distance(load_edit(tmp_path / "moments"), wanted) < 1e-4  # rounding of other processes
    sent = json.loads(tell[0][1])["bytes"]
    assert sent.keys() == told.keys() and all(each["up"] > 1000 for each in sent.values())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_port_in_use_is_not_shared(world: tuple[str, dict[str, Source]], tmp_path: Path) -> None:
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server

    base = load(world[0], device="cpu")
    address = f"127.0.0.1:{free_port()}"
    early = Post.at(address)  # and while its model loads
    other = start_grpc_server(client_manager=SimpleClientManager(), server_address=address)
    try:
        with pytest.raises(ResourceError, match="No server can listen at '127.0.0.1:.*in use"):
            serve(base, plan(world[0]), tmp_path / "run", address=address, wait=0.1)
        with pytest.raises(ResourceError, match="in use"), early.open(1.0, 0.1, print):
            pass
    finally:
        other.stop(grace=0).wait()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ResourceError, match="too few clients"):  # free again
        serve(base, plan(world[0]), tmp_path / "run", address=address, wait=0.1)


def authority(folder: Path, name: str = "localhost") -> tuple[Path, Path, Path]:
    """A certificate authority, and a server's certificate and key that it has signed; all for this test."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("authority", name)]
    folder.mkdir()
    for k, (key, subject) in enumerate(zip(keys, names, strict=True)):
        made = (x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
                .not_valid_after(now + datetime.timedelta(1))
                .add_extension(x509.BasicConstraints(ca=k == 0, path_length=None), critical=True)
                .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
                .sign(keys[0], hashes.SHA256()))  # fmt: skip
        (folder / f"{k}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                    serialization.NoEncryption())  # fmt: skip
    (folder / "key.pem").write_bytes(private)
    return folder / "0.pem", folder / "1.pem", folder / "key.pem"


def test_over_tls_only_a_client_that_knows_the_authority_takes_part(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    model, sources = world
    base, address = load(model, device="cpu"), f"localhost:{free_port()}"
    mine, others = authority(tmp_path / "mine"), authority(tmp_path / "others")
    own = Certificates(*mine)
    came: dict[str, Any] = {}

    def act() -> None:
        came["server"] = serve(base, plan(model), tmp_path / "run", address=address, wait=60, certificates=own)

    server = threading.Thread(target=act)
    server.start()
    for wrong in (Certificates(others[0]), None):
        with pytest.raises(ResourceError, match="No server answers"):
            join(client(model, sources, "bob"), address=address, wait=0.0, certificates=wrong)
    assert join(client(model, sources, "ann"), address=address, wait=60, certificates=Certificates(mine[0])) == 2
    server.join(60)
    assert came["server"].artifact == "weights"
    same(tmp_path / "run", expected(model, {"ann": sources["ann"]}, tmp_path / "here"))
    with pytest.raises(UsageError, match="needs three files"):
        serve(base, plan(model), tmp_path / "run", address=address, certificates=Certificates(mine[0]))
    with pytest.raises(ResourceError, match="certificate and key belong together"):
        serve(base, plan(model), tmp_path / "run2", address=address, wait=0.1,
              certificates=Certificates(mine[0], mine[1], others[2]))  # fmt: skip


def client(model: str, sources: dict[str, Source], name: str, *faults: Fault, patience: float = 0.0) -> Worker:
    own = Client.of(name, load(model, device="cpu"), read_records(sources[name].path))
    return Faulty(own, faults, patience)


def apart(
    server: Callable[[str, list[str]], Any], workers: list[Worker], first: list[Worker] | None = None, wait: float = 8.0
) -> dict[str, Any]:
    """A server and its clients in threads of this process; what each came to, and what the server said.

    The others join when the ``first`` are through.
    """
    address = f"127.0.0.1:{free_port()}"
    came: dict[str, Any] = {"said": []}

    def act(name: str, work: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                came[name] = work()
            except (UsageError, ResourceError) as error:
                came[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def joining(group: list[Worker]) -> list[threading.Thread]:
        return [act(worker.name, lambda worker=worker: join(worker, address=address, wait=wait))  # type: ignore[misc]
                for worker in group]  # fmt: skip

    serving = act("server", lambda: server(address, came["said"]))
    for group in (first or [], workers):
        for thread in joining(group):
            thread.join(120)
    serving.join(120)
    return came


def together(base: LoadedModel, asked: Plan, folder: Path, workers: list[Worker], **more: Any) -> dict[str, Any]:
    """A training over gRPC in this process."""
    return apart(lambda address, said: serve(base, asked, folder, address=address, clients=len(workers), wait=20,
                                             note=said.append), workers, **more)  # fmt: skip


def test_a_late_client_is_left_out_of_its_round_and_the_others_go_on(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base = load(model, device="cpu")
    workers = [client(model, sources, "ann"),
               client(model, sources, "bob", Fault("bob", 1, "late"), patience=3.0)]  # fmt: skip
    came = together(base, plan(model, timeout=3.0), tmp_path / "run", workers, wait=1.0)
    assert not isinstance(came["server"], Exception), came["server"]
    assert failed(tmp_path / "run")[0] == {"bob": "did not answer within 3 s"}
    assert any("round 1: client 'bob' did not answer within 3 s" in line for line in came["said"])
    assert History.open(tmp_path / "run" / "history")[0].clients == ("ann",)
    assert came["ann"] == 2


def test_a_client_with_another_model_is_told_and_the_others_train(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base = load(model, device="cpu")
    other = wrap(tiny_models.build("llama", seed=5), base.tokenizer)
    stranger = Client.of("eve", other, read_records(sources["bob"].path))
    came = together(base, plan(model), tmp_path / "run", [client(model, sources, "ann")], first=[stranger])
    assert isinstance(came["eve"], UsageError) and "refuses 'eve': it has a base model" in str(came["eve"])
    assert "eve" in json.loads((tmp_path / "run" / "report.json").read_text())["refused"]
    assert sum("refused: client 'eve'" in line for line in came["said"]) == 1
    assert came["ann"] == 2
    same(tmp_path / "run", expected(model, {"ann": sources["ann"]}, tmp_path / "here"))


@pytest.mark.parametrize("method", ["retrain", "federaser", "client"])
def test_forgetting_over_grpc_is_forgetting_here_bit_for_bit(
    method: Any, world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base, run = load(model, device="cpu"), expected(model, sources, tmp_path / "run")
    more = {"keep_record": True, "editor": "grad_ascent"}
    wanted = leave(base, run, "bob", method, tmp_path / "here", **more)
    other = Client.of("eve", base, read_records(sources["ann"].path))
    few = Client.of("cid", base, read_records(sources["cid"].path)[:1])

    def server(address: str, said: list[str]) -> Any:
        return leave(base, run, "bob", method, tmp_path / "there", note=said.append, **more,
                     meet=lambda: Post.at(address).open(60.0, 20.0, said.append))  # fmt: skip

    members = [client(model, sources, name) for name in sources]
    leaving = [each for each in members if each.name == "bob" and method != "client"]
    came = apart(server, [each for each in members if each not in leaving],
                 [*leaving, other, few] if method == "retrain" else leaving)  # fmt: skip
    found = came["server"]
    for a, b in zip(wanted.operations, found.operations, strict=True):
        assert a.kind == b.kind and all(np.array_equal(getattr(a, part), getattr(b, part))
                                        for part in ("u", "v", "delta") if hasattr(a, part))  # fmt: skip
    costs = [json.loads((tmp_path / name / "forget.json").read_text()) for name in ("here", "there")]
    assert costs[0]["trainings"] == costs[1]["trainings"] and costs[0]["down"] == costs[1]["down"]
    if method == "client":
        assert (came["bob"], came["ann"]) == (1, 2)  # it unlearns, and nothing else
    else:
        assert "is the client that leaves" in str(came["bob"]) and came["ann"] == (2 if method == "retrain" else 1)
    if method == "retrain":
        assert "took no part in the training" in str(came["eve"])
        assert any("joins with 1 records and trained with 4" in line for line in came["said"])
        assert any("server compared their number alone" in line for line in found.manifest.guarantee.assumptions)


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "192.0.2.7:8080", "[::]:8080", "example.org:8080"])
def test_nothing_but_this_machine_is_served_without_certificates(address: str) -> None:
    with pytest.raises(UsageError, match="Without certificates"):
        checked_address(address, None)
    assert checked_address(address, Certificates(Path("ca.pem"))) == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:9000", "[::1]:9000"])
def test_this_machine_is_served_without(address: str) -> None:
    assert checked_address(address, None) == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":8080", "127.0.0.1:port", "127.0.0.1:70000"])
def test_an_address_needs_host_and_port(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        checked_address(address, None)


def test_a_missing_certificate_and_a_missing_server_are_one_sentence(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    with pytest.raises(UsageError, match="certificate .*ca.pem' cannot be read"):
        join(client(model, sources, "ann"), certificates=Certificates(tmp_path / "ca.pem"))
    with pytest.raises(ResourceError, match="No server answers at '127.0.0.1:"):
        join(client(model, sources, "ann"), address=f"127.0.0.1:{free_port()}", wait=0.0)
