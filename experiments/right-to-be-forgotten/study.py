"""Eight deletion requests in a row: a sharded training that takes records out, beside edits of a model trained plainly.

    python experiments/right-to-be-forgotten/study.py [--jobs 2] [--out runs/right-to-be-forgotten]

Every request names eight people.  After each one the knowledge of all eight groups and of what must stay is measured,
in question forms that no editor saw.  The sharded training is answered through a ledger, whose audit is written here;
the editors stand for models that were trained without thinking of requests.  Stages are kept: the same command
continues.  It writes result.json, table.md, matrix-*.svg, kept.svg and audit.md here.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REQUESTS, PEOPLE = 8, 8
KEEP = 128  # items of what must stay
FORMS, ALTERNATIVES = 2, 31
TRAINING = {"shards": 8, "slices": 4, "epochs": 6}
EDITORS: dict[str, dict[str, Any]] = {
    "null_space_surgery": {}, "npo": {"steps": 60, "retain": "kl", "retain_on": ["retain", "strangers"]},
}  # fmt: skip
PLAIN = ("organism:bios", "organism:bios/twin-0")  # before any request; never knew
ORDERS = {"null_space_surgery": 3, "npo": 1}  # one after the other in so many orders


def probe() -> Any:
    from repforget.knowledge_files import load_knowledge

    return load_knowledge("bios-people")


def groups() -> dict[str, tuple[Any, ...]]:
    """Request -> its items; who asks with whom is drawn once."""
    items = probe().forget
    people = sorted({item.cluster for item in items})
    random.Random("requests").shuffle(people)
    parts = [set(people[k * PEOPLE : (k + 1) * PEOPLE]) for k in range(REQUESTS)]
    return {f"request {k + 1}": tuple(i for i in items if i.cluster in part) for k, part in enumerate(parts)}


def keep() -> tuple[Any, ...]:
    """Items that nobody asks about and no editor is shown: the judged half of the retain set, and neighbours."""
    knowledge = probe()
    seen = {item.cluster for item in knowledge.for_editor().retain}
    judged = [item for item in knowledge.retain if item.cluster not in seen]
    return (*judged[: KEEP // 2], *knowledge.neighbours[: KEEP // 2])


def seen(model: Any) -> Any:
    from repforget.requests.stability import look

    return look(model, probe(), groups(), keep(), forms=FORMS, alternatives=ALTERNATIVES)


def as_json(each: Any) -> dict[str, Any]:
    return {"requests": {name: scores.to_json() for name, scores in each.requests.items()}, "keep": each.keep.to_json()}


def from_json(body: dict[str, Any]) -> Any:
    from repforget.records import ItemScores
    from repforget.requests.stability import Look

    return Look({name: ItemScores.from_json(s) for name, s in body["requests"].items()},
                ItemScores.from_json(body["keep"]))  # fmt: skip


def stage(out: str, name: str, key: dict[str, Any], build: Any) -> dict[str, Any]:
    """What ``build()`` returns, kept under the code and ``key``."""
    from repforget._session import code_digest
    from repforget.store import Store, read_json, write_json

    def write(folder: Path) -> None:
        write_json(folder / "found.json", build())

    settings = {"groups": [REQUESTS, PEOPLE, KEEP, FORMS, ALTERNATIVES], "code": code_digest()}
    return dict(read_json(Store(Path(out)).stage(name, {**key, **settings}, write) / "found.json"))


def untouched(name: str, out: str) -> dict[str, Any]:
    """A model as it is."""
    from repforget.models.load import load

    return stage(out, "untouched", {"model": name}, lambda: as_json(seen(load(name))))


def edited(editor: str, order: tuple[int, ...], out: str) -> dict[str, Any]:
    """Edits made one after the other, each on the model that the ones before left; a look after each."""
    from repforget.edit._dispatch import edit
    from repforget.models.load import load
    from repforget.requests.matching import carved

    def build() -> dict[str, Any]:
        model, asked, looks, seconds = load("organism:bios"), groups(), [], []
        gone: set[str] = set()
        for number in order:
            items = asked[f"request {number + 1}"]
            started = time.process_time()
            made = edit(model, carved(probe(), items, gone), editor, seed=0, **EDITORS[editor])
            seconds.append(time.process_time() - started)
            gone |= {item.id for item in items}
            model = made.applied_to(model)
            looks.append(as_json(seen(model)))
        return {"looks": looks, "seconds": seconds, "order": list(order)}

    return stage(out, "edited", {"editor": editor, "settings": EDITORS[editor], "order": order}, build)


def at_once(editor: str, out: str) -> dict[str, Any]:
    """One edit for everybody."""
    from repforget.edit._dispatch import edit
    from repforget.models.load import load

    def build() -> dict[str, Any]:
        model, started = load("organism:bios"), time.process_time()
        made = edit(model, probe(), editor, seed=0, **EDITORS[editor])
        seconds = time.process_time() - started
        return {"look": as_json(seen(made.applied_to(model))), "seconds": seconds}

    return stage(out, "at-once", {"editor": editor, "settings": EDITORS[editor]}, build)


def routed(training: Any, base: Any) -> Any:
    """A look at a sharded training as it is served: every question goes to the base or to the shard that is surest."""
    from dataclasses import replace

    import numpy as np

    from repforget.requests.stability import Look
    from repforget.shards import best_shard, place, shard_edit

    filled = sorted({place(training.settings, record)[0] for record in training.records})
    looks = {-1: seen(base)} | {k: seen(shard_edit(training, base, k).applied_to(base)) for k in filled}

    def chosen(items: Any, scores: dict[int, Any]) -> Any:
        homes = best_shard(training, base, [item.questions[0] for item in items], base=True)
        values = np.array([scores[home].values[n] for n, home in enumerate(homes)])
        return replace(scores[-1], values=values)

    asked = {name: chosen(items, {k: each.requests[name] for k, each in looks.items()})
             for name, items in groups().items()}  # fmt: skip
    return Look(asked, chosen(keep(), {k: each.keep for k, each in looks.items()}))


def sharded(out: str) -> dict[str, Any]:
    """A training in shards and eight requests to its ledger; a look after each, and the audit at the end."""
    from repforget.models.load import load
    from repforget.requests import Ledger, page
    from repforget.requests.asking import ask
    from repforget.requests.audit import audit
    from repforget.requests.run import Order, answer
    from repforget.shards import Settings, begin, block_groups, complete, opened
    from repforget.training.items import records_of

    def run() -> dict[str, Any]:
        base, root = load("organism:bios/twin-0"), Path(out) / "sharded"
        shutil.rmtree(root, ignore_errors=True)
        settings = Settings(block_groups(base.module, (), "sisa", TRAINING["slices"]), **TRAINING)
        started = time.process_time()
        training = begin(root / "training", base, settings, records_of(probe(), ("forget",), "questions"))
        with training.store.locked():
            complete(training, base)
        whole, looks = time.process_time() - started, [as_json(routed(opened(training.root), base))]
        seconds, answers = [], []
        source = f"training:{root / 'training'}"
        with Ledger.create(root / "requests.sqlite", {"model": base.name, "source": source}) as ledger:
            for number, items in enumerate(groups().values(), 1):
                ask(ledger, sorted({item.cluster for item in items}), who=f"customer {number}")
                started = time.process_time()
                (answered,) = answer(ledger, [number], Order())
                seconds.append(time.process_time() - started)
                answers.append([answered.outcome, answered.sentence])
                looks.append(as_json(routed(opened(training.root), base)))
            report = page.markdown(audit(ledger))
        return {"looks": looks, "seconds": seconds, "whole": whole, "audit": report, "answers": answers}

    return stage(out, "sharded", {"settings": TRAINING}, run)


def row(looks: list[Any], floor: Any, seconds: list[float]) -> tuple[Any, dict[str, Any]]:
    """The matrix of one way of answering, as itself and as plain data."""
    from dataclasses import asdict

    from repforget.requests.stability import stability

    each = stability(looks, floor)
    body = asdict(each) | {"left": each.left.tolist(), "kept": each.kept.tolist(), "seconds": seconds}
    return each, body | {"sentences": list(each.sentences())}


def summary(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The matrices, and their numbers: what is left, what came back, what it cost, order and one edit for all."""
    from dataclasses import asdict

    from repforget.requests.stability import one_shot, order_spread

    original, floor = (from_json(found["untouched"][name]) for name in PLAIN)
    shards = found["sharded"]
    known, rows = {}, {}
    name = "sharded training"
    known[name], rows[name] = row([from_json(x) for x in shards["looks"]], floor, shards["seconds"])
    rows[name] |= {"whole": shards["whole"], "answers": shards["answers"]}
    for name, runs in found["edited"].items():
        first, ends = runs[0], [from_json(run["looks"][-1]) for run in runs]  # in the first, requests have their order
        known[name], rows[name] = row([original, *map(from_json, first["looks"])], floor, first["seconds"])
        joint = found["at once"][name]
        together = one_shot(ends[0], from_json(joint["look"]), original, floor)
        rows[name] |= {"one_shot": asdict(together), "at_once_seconds": joint["seconds"]}
        if len(ends) > 1:
            rows[name]["order_sd"] = order_spread(ends, original, floor).tolist()
            rows[name]["order_kept"] = [e.keep.mean / original.keep.mean for e in ends]
    return known, rows


def cells(name: str, row: dict[str, Any]) -> list[str]:
    own = [row["left"][k + 1][k] for k in range(REQUESTS)]
    back = max(row["re_emerged"], key=lambda each: each["high"])
    slope = row["slope"]
    return [name, f"{sum(own) / len(own):.3f} ({max(own):.3f})", f"{row['area']:.3f}",
            f"{back['point']:+.3f} ({back['low']:+.3f} to {back['high']:+.3f})", f"{row['kept'][-1]:.1%}",
            f"{slope['point']:+.2%} ({slope['low']:+.2%} to {slope['high']:+.2%})",
            f"{sum(row['seconds']) / REQUESTS:.1f}"]  # fmt: skip


def table(body: dict[str, Any]) -> str:
    """One row per way of answering the requests, the least left first."""
    head = ("answered by", "left after its own request (largest)", "left over all later states", "most that came back",
            "what must stay, at the end", "per request (95 %)", "CPU s per request")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join(cells(name, row)) + " |"
              for name, row in sorted(body["rows"].items(), key=lambda each: each[1]["area"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="runs/right-to-be-forgotten")
    chosen = parser.parse_args()
    straight = tuple(range(REQUESTS))
    shuffled = [tuple(random.Random(f"order-{k}").sample(straight, REQUESTS)) for k in range(1, max(ORDERS.values()))]
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn"), initializer=_quiet) as workers:
        sisa = workers.submit(sharded, chosen.out)
        plain = {name: workers.submit(untouched, name, chosen.out) for name in PLAIN}
        runs = {name: [workers.submit(edited, name, order, chosen.out) for order in [straight, *shuffled][:count]]
                for name, count in ORDERS.items()}  # fmt: skip
        once = {name: workers.submit(at_once, name, chosen.out) for name in EDITORS}
        found = {"sharded": sisa.result(), "untouched": {name: r.result() for name, r in plain.items()},
                 "edited": {name: [r.result() for r in some] for name, some in runs.items()},
                 "at once": {name: r.result() for name, r in once.items()}}  # fmt: skip
    from repforget.requests._picture import kept, matrix

    known, rows = summary(found)
    body = {"rows": rows}
    (HERE / "audit.md").write_text(found["sharded"]["audit"])
    (HERE / "result.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    (HERE / "table.md").write_text(table(body))
    for name, each in known.items():
        title = name.replace("_", " ")
        (HERE / f"matrix-{title.replace(' ', '-')}.svg").write_text(matrix(each, title))
    (HERE / "kept.svg").write_text(kept(known))
    print(table(body))


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
