"""The same federation with something in between: processes of ray, and gRPC on this machine."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from repforget.artifact import load_edit
from repforget.errors import ResourceError, UsageError
from repforget.federated.clients import Client, Worker
from repforget.federated.faults import Fault, Faulty
from repforget.federated.history import History
from repforget.federated.messages import Local
from repforget.federated.run import simulate
from repforget.federated.serve import Certificates, checked_address, join, serve
from repforget.federated.server import Plan
from repforget.federated.sources import Source, of_folder
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
def test_processes_over_grpc_give_the_same_and_one_that_dies_is_named(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    address = f"127.0.0.1:{free_port()}"
    base = load(model, device="cpu")
    server = threading.Thread(target=lambda: serve(base, plan(model), tmp_path / "run", address=address, clients=2,
                                                   wait=300))  # fmt: skip
    server.start()
    data = {name: str(tmp_path / "data" / f"{name}.jsonl") for name in ("ann", "bob")}
    ann = start("join", "ann", "--data", data["ann"], "--model", model, "--address", address, "--json")
    bob = start("join", "bob", "--data", data["bob"], "--model", model, "--address", address, "--inject", "bob:2:die")
    server.join(300)
    assert ann.communicate(timeout=60)[0] == json.dumps({"client": "ann", "rounds": 2}, indent=1) + "\n"
    bob.communicate(timeout=60)
    assert bob.returncode == 1
    body = json.loads((tmp_path / "run" / "report.json").read_text())
    assert body["clients"] == {"ann": 2, "bob": 3} and body["totals"]["up"] > 0
    assert [row["failed"] for row in body["rounds"]] == [{}, {"bob": "died before it answered"}]
    two = {name: sources[name] for name in ("ann", "bob")}
    same(tmp_path / "run", expected(model, two, tmp_path / "here", "bob:2:error"))


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "repforget", "federated", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_port_in_use_is_not_shared(world: tuple[str, dict[str, Source]], tmp_path: Path) -> None:
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server

    base = load(world[0], device="cpu")
    address = f"127.0.0.1:{free_port()}"
    other = start_grpc_server(client_manager=SimpleClientManager(), server_address=address)
    try:
        with pytest.raises(ResourceError, match="No server can listen at '127.0.0.1:.*in use"):
            serve(base, plan(world[0]), tmp_path / "run", address=address, wait=0.1)
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


def together(base: LoadedModel, asked: Plan, folder: Path, workers: list[Worker], **more: Any) -> dict[str, Any]:
    """A server and its clients in threads of this process; what each came to, and what the server said."""
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

    threads = [act("server", lambda: serve(base, asked, folder, address=address, clients=len(workers), wait=20,
                                           note=came["said"].append, **more))]  # fmt: skip
    threads += [act(worker.name, lambda worker=worker: join(worker, address=address, wait=8))  # type: ignore[misc]
                for worker in workers]  # fmt: skip
    for thread in threads:
        thread.join(120)
    return came


def test_a_late_client_is_left_out_of_its_round_and_the_others_go_on(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base = load(model, device="cpu")
    workers = [client(model, sources, "ann"),
               client(model, sources, "bob", Fault("bob", 1, "late"), patience=5.0)]  # fmt: skip
    came = together(base, plan(model, timeout=5.0), tmp_path / "run", workers)
    assert not isinstance(came["server"], Exception), came["server"]
    assert failed(tmp_path / "run")[0] == {"bob": "did not answer within 5 s"}
    assert any("round 1: client 'bob' did not answer within 5 s" in line for line in came["said"])
    assert History.open(tmp_path / "run" / "history")[0].clients == ("ann",)
    assert came["ann"] == 2


def test_a_client_with_another_model_is_told_and_the_others_train(
    world: tuple[str, dict[str, Source]], tmp_path: Path
) -> None:
    model, sources = world
    base = load(model, device="cpu")
    other = wrap(tiny_models.build("llama", seed=5), base.tokenizer)
    stranger = Client.of("eve", other, read_records(sources["bob"].path))
    came = together(base, plan(model), tmp_path / "run", [client(model, sources, "ann"), stranger])
    assert isinstance(came["eve"], UsageError) and "refuses 'eve': it has a base model" in str(came["eve"])
    assert "eve" in json.loads((tmp_path / "run" / "report.json").read_text())["refused"]
    assert sum("refused: client 'eve'" in line for line in came["said"]) == 1
    assert came["ann"] == 2
    same(tmp_path / "run", expected(model, {"ann": sources["ann"]}, tmp_path / "here"))


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
