"""Forward passes that begin where a change begins: what lies before it is taken from an earlier pass.

While resumed, blocks, attentions and MLPs that the change cannot reach are replaced by modules that answer what was
kept; embedding, masks and position embeddings are made by the model itself, so that what does run is called with the
arguments of a full pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.models._hooking import eager, run_forward
from repforget.models._names import core
from repforget.models.check import probe_batch
from repforget.models.gather import Batch
from repforget.models.sites import PROVEN, SiteMap, site_map
from repforget.records import Site

Part = Literal["run", "last", "kept"]  # as a whole; its output projection alone; not at all
ATTENTION_INSIDE = frozenset({"attn_in", "q", "k", "v"})
MLP_INSIDE = frozenset({"mlp_in", "mlp_gate", "mlp_up"})


@dataclass(frozen=True, order=True)
class Start:
    """Blocks before ``layer`` do not run, and of this block what is not 'run'; ``layer`` 0 with all 'run' is a full
    pass."""

    layer: int = 0
    attention: Part = "run"
    mlp: Part = "run"

    @property
    def blocks(self) -> float:
        """Blocks not run, as a rough number: attention counts a third of one."""
        saved = {"run": 0.0, "last": 0.6, "kept": 1.0}
        return self.layer + saved[self.attention] / 3 + saved[self.mlp] * 2 / 3


def start_of(places: SiteMap, sites: Iterable[Site]) -> Start:
    """The latest start that still runs everything behind ``sites``; after the last block without any."""
    depth = places.n_layers
    layers = [depth if s.kind in ("final_norm", "logits") else s.layer for s in sites]
    first = min(layers, default=depth)
    if first in (-1, depth):
        return Start(max(first, 0))
    kinds = {s.kind for s in sites if s.layer == first}
    paths = places.anatomy.layers[first]
    attention = _part("resid_pre" in kinds, kinds, ATTENTION_INSIDE, "attn_z")
    before = kinds & {"resid_mid", "attn_out"} or attention != "kept"
    mlp = _part("resid_pre" in kinds or (bool(before) and not places.parallel), kinds, MLP_INSIDE, "mlp_post")
    if paths.mlp is None or (mlp == "last" and paths.down is None):
        mlp = "run"
    return Start(first, attention, mlp)


def _part(reached: bool, kinds: Collection[str], inside: Collection[str], last: str) -> Part:
    if reached or any(kind in inside for kind in kinds):
        return "run"
    return "last" if last in kinds else "kept"


def begin(model: Any, changes: Sequence[Collection[Site]]) -> dict[Start, list[int]]:
    """Which changes (by their number) begin where; all in full passes where the unchanged pass would not pay."""
    full = {Start(): list(range(len(changes)))}
    if len(changes) < 2 or not can_resume(model):
        return full
    places, found = site_map(model), dict[Start, list[int]]()
    for number, sites in enumerate(changes):
        found.setdefault(start_of(places, sites), []).append(number)
    saved = sum(start.blocks * len(numbers) for start, numbers in found.items())
    return found if saved > places.n_layers else full


@dataclass
class Kept:
    """What one unchanged pass left behind: output of each module and input of each output projection, by path."""

    module: nn.Module
    places: SiteMap
    starts: Collection[Start]
    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)  # output projections whose output is that of their whole part

    @classmethod
    def of(cls, model: Any, starts: Collection[Start]) -> Kept:
        """Nothing kept yet; ``starts`` are those that will be asked for."""
        return cls(core(model), site_map(model), starts)

    def record(self, batch: Batch) -> None:
        """One forward pass without the unembedding, of which the starts' states are kept; none where all are full."""
        if set(self.starts) <= {Start()}:
            return
        with ExitStack() as stack:
            for path in {self.places.anatomy.layers[s.layer - 1].path for s in self.starts if s.layer}:
                stack.callback(self._hook(path, self._keep(path)))
            for path, last, part in {p for start in self.starts for p in self._parts(start)}:
                if part == "last":
                    stack.callback(self._hook(last, self._keep_input(last)))
                stack.callback(self._hook(path, self._keep(path, last if part == "last" else "")))
            stack.enter_context(eager())
            run_forward(self.module, batch, vocabulary=False)

    @contextmanager
    def resumed(self, start: Start, times: int) -> Iterator[None]:
        """Forward passes inside begin at ``start``, on the kept batch repeated ``times`` times."""
        layers = self.places.anatomy.layers
        with ExitStack() as stack:
            stack.enter_context(eager())
            if start.layer:
                before = self._answer(layers[start.layer - 1].path, times)
                for paths in layers[: start.layer]:
                    stack.callback(self._swap(paths.path, before))
            for path, last, part in self._parts(start):
                if part == "kept":
                    stack.callback(self._swap(path, self._answer(path, times)))
                elif last in self.exact:
                    stack.callback(self._swap(path, self._projected(path, last, times)))
            yield

    def _parts(self, start: Start) -> list[tuple[str, str, Part]]:
        """Module, its output projection, and what of it is needed, for the parts of the starting block not run."""
        if start.layer == self.places.n_layers:
            return []
        paths = self.places.anatomy.layers[start.layer]
        both = [(paths.attention, paths.attention_out, start.attention), (paths.mlp or "", paths.down or "", start.mlp)]
        return [(path, last, part) for path, last, part in both if part != "run"]

    def _hook(self, path: str, visit: Callable[..., None]) -> Callable[[], None]:
        return self.module.get_submodule(path).register_forward_hook(visit).remove

    def _keep(self, path: str, last: str = "") -> Callable[..., None]:
        def visit(module: nn.Module, args: Any, output: Any) -> None:
            value, rest = (output[0], len(output) - 1) if isinstance(output, tuple) else (output, None)
            self.outputs[path] = value.detach().clone(), rest  # a block may add to it in place
            if last and torch.equal(value, self.outputs[last]):
                self.exact.add(last)
            self.outputs.pop(last, None)

        return visit

    def _keep_input(self, last: str) -> Callable[..., None]:
        def visit(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[last], self.outputs[last] = args[0].detach().clone(), output.detach()

        return visit

    def _answer(self, path: str, times: int) -> Callable[[], Any]:
        value, rest = self.outputs[path]
        wide = value.repeat(times, *[1] * (value.ndim - 1))
        return lambda: wide if rest is None else (wide, *[None] * rest)

    def _projected(self, path: str, last: str, times: int) -> Callable[[], Any]:
        value, rest = self.inputs[last], self.outputs[path][1]
        wide, project = value.repeat(times, *[1] * (value.ndim - 1)), self.module.get_submodule(last)
        return lambda: project(wide) if rest is None else (project(wide), *[None] * rest)

    def _swap(self, path: str, answer: Callable[[], Any]) -> Callable[[], None]:
        """Put a module that only answers in the place of the one at ``path``; returns what puts that back."""
        holder, _, name = path.rpartition(".")
        modules: dict[str, Any] = self.module.get_submodule(holder)._modules
        original = modules[name]
        modules[name] = _StandIn(original, answer)
        return lambda: modules.update({name: original})


class _StandIn(nn.Module):
    """Answers instead of a module, of which everything but the computation can still be asked."""

    def __init__(self, original: nn.Module, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__.update(original=original, answer=answer)  # not a submodule: its parameters are not counted twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


def can_resume(model: Any) -> bool:
    """Whether passes of this model can begin in the middle: not under hooks, which may count on running, nor through a
    wrapper, which may call it with other arguments.

    Architectures that the test suite does not prove are tried once, by a short pass per block.
    """
    module = core(model)
    if getattr(model, "module", model) is not module:
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    if site_map(module).anatomy.model_type in PROVEN:
        return True
    if module not in _TRIED:
        _TRIED[module] = _tried(module)
    return _TRIED[module]


_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _tried(module: nn.Module) -> bool:
    places = site_map(module)
    starts = [start_of(places, [Site(kind, layer)]) for layer in range(places.n_layers)
              for kind in ("resid_pre", "attn_z", "mlp_out")]  # fmt: skip
    small = probe_batch(module)
    batch = small.to(module.get_input_embeddings().weight.device)  # type: ignore[operator]
    wide = Batch(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1))
    try:
        kept = Kept.of(module, starts)
        kept.record(batch)
        plain = run_forward(module, wide, vocabulary=True).logits
        for start in starts:
            run_forward(module, Batch(wide.ids.flip(1), wide.mask), vocabulary=False)  # what blocks remember is of this
            with kept.resumed(start, 2):
                again = run_forward(module, wide, vocabulary=True).logits
            if not torch.allclose(again, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
                return False
    except (TypeError, AttributeError, AssertionError, LookupError, RuntimeError, ValueError):
        return False  # it calls its blocks in a way of its own
    return True
