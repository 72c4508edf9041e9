"""``repforget federated``: clients that train together without sharing records, and one that leaves again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _federated as f
from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

app = typer.Typer(help="Train with clients that keep their records, and forget one of them.", no_args_is_help=True,
                  rich_markup_mode="rich")  # fmt: skip

@app.callback()
def _group() -> None:
    """Train with clients that keep their records, and forget one of them."""


@app.command()
def simulate(
    context: typer.Context,
    out: f.Out,
    model: o.Model = "organism:bios/twin-0",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients to deal a probe's clusters to.")] = 8,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with one JSON-lines file per client.")] = None,
    knowledge: o.KnowledgeName = "bios-people",
    sets: Annotated[str, typer.Option("--sets", "--set", help="Set of the probe that the clients hold.")] = "forget",
    rounds: f.Rounds = 5,
    strategy: f.Strategy = "fedavg",
    epochs: f.Epochs = 1,
    batch_size: f.BatchSize = 32,
    lr: f.Rate = 1e-3,
    server_lr: f.ServerRate = 0.01,
    optimizer: f.Optimizer = "adamw",
    rank: f.Rank = 8,
    alpha: f.Alpha = 16.0,
    weights: f.Weights = None,
    min_clients: f.MinClients = 1,
    timeout: f.Timeout = 600.0,
    max_records: f.MaxRecords = 1_000_000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of one core each.")] = 2,
    engine: Annotated[str, typer.Option("--engine", help="ray, or here: one client after the other.")] = "ray",
    inject: f.Inject = None,
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Train with all clients on this machine, in flwr's simulation.  The same command continues a killed one.

    Writes the global change as an edit, the record of all rounds, and who took part and who failed.
    """
    from repforget.errors import UsageError, nearest
    from repforget.federated.faults import Fault
    from repforget.federated.run import simulate as train
    from repforget.federated.sources import of_folder, of_probe
    from repforget.models.load import load

    if engine not in ("ray", "here"):
        raise UsageError(f"There is no engine '{engine}': {nearest(engine, ('ray', 'here'))}")
    context.obj.folder = out
    plan = f.plan_of(model, strategy, epochs, batch_size, lr, optimizer, rank, alpha, weights, seed, rounds,
                     min_clients, timeout, server_lr, max_records)  # fmt: skip
    sources = of_probe(knowledge, clients, set=sets, seed=seed) if data is None else of_folder(data)
    faults = [Fault.parse(text) for text in inject or ()]
    base = load(model, device="cpu")
    with display(as_json) as (progress, echo):
        train(base, plan, sources, out, engine=engine, workers=workers, faults=faults, note=echo,  # type: ignore[arg-type]
              progress=progress)  # fmt: skip
    f.told(out, as_json)


@app.command()
def deal(
    out: Annotated[Path, typer.Option("--out", help="New folder, with one JSON-lines file per client.")],
    knowledge: o.KnowledgeName = "bios-people",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients to deal the probe's people to.")] = 8,
    seed: o.Seed = 0,
) -> None:
    """Deal what an editor may see of a probe to clients, for drills: files for 'join' and 'simulate --data'."""
    from repforget.errors import UsageError
    from repforget.federated.dealt import dealt, write_part
    from repforget.knowledge_files import load_knowledge

    if out.exists():
        raise UsageError(f"'{out}' is there already: give a new folder with --out.")
    for name, part in dealt(load_knowledge(knowledge).for_editor(), clients, seed).items():
        write_part(out / f"{name}.jsonl", part)
        typer.echo(str(out / f"{name}.jsonl"))


@app.command()
def moments(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder for the edit.")],
    method: Annotated[str, typer.Argument(help="leace, or null_space.")] = "leace",
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients to deal people to, or to wait for.")] = 8,
    layers: Annotated[list[int] | None, typer.Option("--layers", help="Layers of null_space; repeatable.")] = None,
    in_clear: Annotated[bool, typer.Option("--in-clear", help="Every client tells its own moments, unmasked.")] = False,
    minimum: f.Minimum = 5,
    bound: Annotated[float, typer.Option("--bound", help="Largest number that a client may put into a sum.")] = 1e8,
    address: f.Join = None,
    wait: f.Wait = 600.0,
    timeout: f.Timeout = 600.0,
    authority: f.Authority = None,
    certificate: f.Certificate = None,
    key: f.Key = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Make an edit from the moments of clients: no record and no activation leaves a client.

    The clients are dealt the people of a probe in this process, or bring files of their own and 'join' at --address.
    Moments are added up by secure sums, so that the server sees their total alone; a client that is lost before the
    first total is known is left out, later it is waited for.
    """
    from contextlib import nullcontext

    from repforget.federated.dealt import fleet_of
    from repforget.federated.together import Sums, edit_of_fleet, editor_of
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load

    sums = Sums(None if in_clear else bound, minimum)
    editor_of(method, clients, layers or (), sums)
    context.obj.interrupted = "Interrupted: nothing was written; the clients' data are where they were."
    post = f.post_of(address, authority, certificate, key)
    base = load(model, device=device, dtype=dtype)
    with display(as_json) as (progress, echo):
        fleet = (post.open(timeout, wait, echo) if post is not None else
                 nullcontext(fleet_of(base, load_knowledge(knowledge).for_editor(), clients, seed)))  # fmt: skip
        with fleet as members:
            edit, traffic = edit_of_fleet(members, base, method, clients, layers=layers or (),  # type: ignore[arg-type]
                                          sums=sums, seed=seed, note=echo, progress=progress)  # fmt: skip
    edit.save(out)
    if as_json:
        print_json({"edit": str(out), "clients": len(traffic), "notes": list(edit.manifest.notes),
                    "bytes": {name: {"down": down, "up": up} for name, (down, up) in traffic.items()}})  # fmt: skip
        return
    for note in edit.manifest.notes:
        typer.echo(note)
    print_table(("client", "bytes to it", "bytes from it"),
                [(name, str(down), str(up)) for name, (down, up) in traffic.items()], numbers=[1, 2])  # fmt: skip
    typer.echo(f"saved to {out}")


@app.command()
def serve(
    context: typer.Context,
    out: f.Out,
    model: o.Model = "organism:bios/twin-0",
    address: f.Address = "127.0.0.1:8080",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients to wait for before the first round.")] = 2,
    rounds: f.Rounds = 5,
    strategy: f.Strategy = "fedavg",
    epochs: f.Epochs = 1,
    batch_size: f.BatchSize = 32,
    lr: f.Rate = 1e-3,
    server_lr: f.ServerRate = 0.01,
    optimizer: f.Optimizer = "adamw",
    rank: f.Rank = 8,
    alpha: f.Alpha = 16.0,
    weights: f.Weights = None,
    min_clients: f.MinClients = 1,
    timeout: f.Timeout = 600.0,
    max_records: f.MaxRecords = 1_000_000,
    wait: f.Wait = 600.0,
    authority: f.Authority = None,
    certificate: f.Certificate = None,
    key: f.Key = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Serve rounds to clients that join over the network; the server sees no record.

    Without certificates only this machine is served.  TLS hides the traffic; it does not say who a client is, and the
    average follows who says that it has most records.  The same command continues a killed server.
    """
    from repforget.federated.serve import serve as listen
    from repforget.models.load import load

    context.obj.folder = out
    plan = f.plan_of(model, strategy, epochs, batch_size, lr, optimizer, rank, alpha, weights, seed, rounds,
                     min_clients, timeout, server_lr, max_records)  # fmt: skip
    base = load(model, device=device, dtype=dtype)
    with display(as_json) as (progress, echo):
        listen(base, plan, out, address=address, clients=clients, wait=wait, note=echo, progress=progress,
               certificates=f.certificates_of(authority, certificate, key))  # fmt: skip
    f.told(out, as_json)


@app.command()
def join(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of this client.")],
    data: Annotated[Path, typer.Option("--data", help="JSON lines with this client's records; they stay here.")],
    model: o.Model = "organism:bios/twin-0",
    address: f.Address = "127.0.0.1:8080",
    wait: f.Wait = 600.0,
    minimum: Annotated[int, typer.Option("--minimum", min=1, help="Least points behind a mean told in the clear.")] = 5,
    authority: f.Authority = None,
    inject: f.Inject = None,
    timeout: f.Timeout = 600.0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Do what a server asks: train, train again, unlearn, or tell moments; no record leaves this process.

    Moments are told of the facts in --data, whose lines then say by 'set' (forget, retain or general) what they are,
    and by 'relation' what they tell.
    """
    from repforget.federated.clients import Client
    from repforget.federated.dealt import read_part
    from repforget.federated.faults import Fault, Faulty
    from repforget.federated.serve import join as take_part
    from repforget.models.load import load

    context.obj.interrupted = f"Interrupted: '{name}' has left; its records are where they were."
    faults = tuple(Fault.parse(text) for text in inject or ())
    records, facts = read_part(data)
    client = Client.of(name, load(model, device=device, dtype=dtype), records, facts, minimum)
    with display(as_json) as (_, echo):
        rounds = take_part(Faulty(client, faults, timeout), address=address, wait=wait, note=echo,
                           certificates=f.certificates_of(authority))  # fmt: skip
    if as_json:
        print_json({"client": name, "rounds": rounds})
    else:
        typer.echo(f"'{name}' answered {rounds} times")


@app.command()
def forget(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the finished training.")],
    client: Annotated[str, typer.Argument(help="Name of the client that leaves.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the result.")],
    method: Annotated[str, typer.Option("--method", help="retrain, federaser, rollback or client.")] = "retrain",
    interval: Annotated[int, typer.Option("--interval", min=1, help="FedEraser: use every so many rounds.")] = 1,
    local_share: Annotated[float, typer.Option("--local-share", help="FedEraser: share of the local epochs.")] = 0.5,
    editor: Annotated[str, typer.Option("--editor", help="Client: what it unlearns its records by.")] = "simnpo",
    distil: Annotated[bool, typer.Option(help="Rollback: let the model with the client repair the rest.")] = True,
    distil_steps: Annotated[int, typer.Option("--distil-steps", min=1, help="Rollback: steps of distillation.")] = 200,
    texts: Annotated[Path | None, typer.Option("--texts", help="Rollback: JSON lines to distil on.")] = None,
    keep_record: Annotated[bool, typer.Option("--keep-record", help="Leave its updates in the record.")] = False,
    address: f.Join = None,
    wait: f.Wait = 600.0,
    authority: f.Authority = None,
    certificate: f.Certificate = None,
    key: f.Key = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Make the result of a finished training without one of its clients.

    Only 'retrain' is exact; 'rollback' distils on the probe's general texts, or on --texts.  The client goes out of the
    training's history, report and list of clients; the edit that was trained with it stays in FOLDER, and so do sums
    over all clients.  The same command continues an interrupted one.

    With --address the clients are asked where they are: each is to 'join' there with the records that it trained on;
    the one that leaves is refused, but for 'client', where it is asked to unlearn.
    """
    from functools import partial

    from repforget.federated.distil import Distillation
    from repforget.federated.leave import known, leave
    from repforget.federated.run import Setup
    from repforget.models.load import load

    context.obj.interrupted = f"Interrupted: what is finished is kept in '{out}'; the same command continues."
    given = "" if texts is None else str(texts.resolve())
    how = Distillation(distil_steps, texts=given) if distil and method == "rollback" else None
    known(method)
    plan = Setup.read(run).plan
    post = f.post_of(address, authority, certificate, key)
    base = load(plan.model, device=device, dtype=dtype)
    with display(as_json) as (progress, echo):
        meet = None if post is None else partial(post.open, plan.timeout, wait, echo)
        edit = leave(base, run, client, method, out, interval=interval, local_share=local_share,  # type: ignore[arg-type]
                     editor=editor, distil=how, keep_record=keep_record, meet=meet, note=echo,
                     progress=progress)  # fmt: skip
    f.left(out, client, edit.manifest.guarantee, as_json)
