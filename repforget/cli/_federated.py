"""Options of ``repforget federated``, and what they come to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repforget.cli._output import print_json, print_table

if TYPE_CHECKING:
    from repforget.federated.serve import Certificates, Post
    from repforget.federated.server import Plan
    from repforget.guarantee import Guarantee

Out = Annotated[Path, typer.Option("--out", help="Folder of the training; the same command continues there.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds in all.")]
Strategy = Annotated[str, typer.Option("--strategy", help="fedavg, fedsgd or fedadam.")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes of a client over its records in a round.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Records per step.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate of the clients.")]
ServerRate = Annotated[float, typer.Option("--server-lr", help="Learning rate of the server, for fedadam.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, adam, descent, ...; fedsgd takes plain steps.")]
Rank = Annotated[int, typer.Option("--rank", min=0, help="Rank of the adapters; 0 trains the weights themselves.")]
Alpha = Annotated[float, typer.Option("--alpha", help="Scale of the adapters is alpha over rank.")]
Weights = Annotated[list[str] | None, typer.Option("--weights", help="Part of the names of weights; repeatable.")]
MinClients = Annotated[int, typer.Option("--min-clients", min=1, help="A round with fewer is repeated, then refused.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds for one round.")]
Inject = Annotated[
    list[str] | None,
    typer.Option("--inject", help="Drill: CLIENT:ROUND:KIND, of die, late, nan, inf, shape, error."),
]
Address = Annotated[str, typer.Option("--address", help="HOST:PORT; port 0 takes a free one.")]
MaxRecords = Annotated[int, typer.Option("--max-records", min=1, help="A client that claims more is refused.")]
Minimum = Annotated[int, typer.Option("--minimum", min=1, help="Points behind every mean that is told.")]
Wait = Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for the other side.")]
Authority = Annotated[Path | None, typer.Option("--authority", help="PEM of the certificate authority.")]
Certificate = Annotated[Path | None, typer.Option("--certificate", help="PEM of the server's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM of the server's key.")]
Join = Annotated[str | None, typer.Option("--address", help="HOST:PORT at which the clients join; without: here.")]


def plan_of(
    model: str, strategy: str, epochs: int, batch_size: int, lr: float, optimizer: str, rank: int, alpha: float,
    weights: list[str] | None, seed: int, rounds: int, min_clients: int, timeout: float, server_lr: float,
    max_records: int,
) -> Plan:  # fmt: skip
    from repforget.federated.aggregate import Adam
    from repforget.federated.messages import Local
    from repforget.federated.server import Plan

    settings: dict[str, Any] = {"rule": strategy, "optimizer": optimizer}
    local = Local(**settings, epochs=epochs, batch_size=batch_size, lr=lr, rank=rank, alpha=alpha, seed=seed,
                  weights=tuple(weights or ()))  # fmt: skip
    return Plan(model, local, rounds, min_clients, timeout, Adam(rate=server_lr), max_records)


def certificates_of(
    authority: Path | None, certificate: Path | None = None, key: Path | None = None
) -> Certificates | None:
    from repforget.errors import UsageError
    from repforget.federated.serve import Certificates

    if authority is None:
        if certificate or key:
            raise UsageError("--certificate and --key need --authority, against which clients check them: give all "
                             "three.")  # fmt: skip
        return None
    return Certificates(authority, certificate, key)


def post_of(address: str | None, authority: Path | None, certificate: Path | None, key: Path | None) -> Post | None:
    """Where clients are to join; None where no address is given."""
    from repforget.errors import UsageError
    from repforget.federated.serve import Post

    certificates = certificates_of(authority, certificate, key)
    if address is not None:
        return Post.at(address, certificates)
    if certificates is not None:
        raise UsageError("Certificates are of use at an --address alone: give it, or leave them out.")
    return None


def told(folder: Path, as_json: bool) -> None:
    """Who took part and who did not, from the report."""
    from repforget.store import read_json

    report = read_json(folder / "report.json")
    if as_json:
        print_json({**report, "edit": str(folder / "edit")})
        return
    kept = [row for row in report["rounds"] if row["kept"]]
    rows = []
    for name, records in sorted(report["clients"].items()):
        answered = sum(any(took["client"] == name for took in row["took_part"]) for row in kept)
        failed = [f"round {row['round']}: {row[kind][name]}" for row in report["rounds"]
                  for kind in ("failed", "unusual") if name in row[kind]]  # fmt: skip
        rows.append((name, str(records), str(answered), "; ".join(failed)))
    rows += [(name, "", "0", f"refused: {reason}") for name, reason in sorted(report["refused"].items())]
    print_table(("client", "records", f"of {len(kept)} rounds", "failed or unusual"), rows, numbers=[1, 2])
    totals = report["totals"]
    typer.echo(f"{totals['down'] / 1e6:.1f} MB to the clients, {totals['up'] / 1e6:.1f} MB back; the edit is in "
               f"'{folder / 'edit'}'")  # fmt: skip


def left(out: Path, client: str, held: Guarantee | None, as_json: bool) -> None:
    """What forgetting a client cost, and what holds of the result."""
    from repforget.store import read_json

    cost = read_json(out / "forget.json")
    if as_json:
        claim = None if held is None else asdict(held)
        print_json({**cost, "client": client, "edit": str(out / "edit"), "guarantee": claim})
        return
    print_table(("what", "value"), [("local trainings", str(cost["trainings"])),
                                    ("steps of distillation", str(cost.get("distil_steps", 0))),
                                    ("CPU seconds", f"{cost['cpu_seconds']:.1f}"),
                                    ("MB to and from clients", f"{(cost['down'] + cost['up']) / 1e6:.1f}"),
                                    *(held.lines() if held else (("holds", "nothing: verify it"),))])  # fmt: skip
    typer.echo(f"the edit is in '{out / 'edit'}'")
