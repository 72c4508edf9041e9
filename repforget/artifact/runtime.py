"""Site operations at work: the functions that hooks call, and what they must know about the pass they are in.

Gates and positions depend on padding, on how many tokens lie in the cache already, and on where the prompt
ends; a site function sees none of that, so a pre-hook on the stack of blocks notes it before each pass.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repforget.artifact.operations import AddVector, ClampFeatures, Gate, SiteOperation, active_features, change
from repforget.errors import ArtifactError, NumericalError
from repforget.features import share_open
from repforget.models.sites import site_map
from repforget.records import Site

SiteFunction = Callable[[Tensor], Tensor | None]
_PASSES = "_repforget_passes"
_ROWS = "repforget_rows"  # attribute of a cache: what hooks know of its rows; whoever selects rows selects there too
HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Pass:
    """The pass under way: columns already cached, which columns are real tokens, and where the prompt
    ends.
    """

    start: int = 0
    mask: Tensor | None = None  # [b, start + s] bool
    prompt: int | None = None  # columns of the prompt of the present cache
    given: int | None = None  # columns that generate() was given, while inside it
    opened: dict[int, Tensor] = field(default_factory=dict)  # gate -> [b, columns] open so far

    def __deepcopy__(self, memo: dict[int, Any]) -> Pass:
        return self  # the hooks of a copied module keep this object, so its generate must reach the same one

    def real(self, x: Tensor) -> Tensor:
        """[b, s] bool: which columns of the present pass hold a real token."""
        if self.mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.mask[:, self.start : self.start + x.shape[1]].to(x.device)

    def first(self, x: Tensor) -> Tensor:
        """[b, s] bool: the first real token of each row, where it lies in the present pass."""
        columns = torch.arange(self.start, self.start + x.shape[1], device=x.device)
        if self.mask is None:
            return (columns == 0).expand(x.shape[:2])
        return columns == self.mask.to(x.device).int().argmax(1, keepdim=True)


def _note(state: Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    cache = given.get("past_key_values")
    state.start = 0 if cache is None else int(cache.get_seq_length())
    ids = given.get("input_ids")
    width = (ids if ids is not None else given["inputs_embeds"]).shape[1]
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ArtifactError("A gated or positioned edit needs the plain [batch, columns] attention mask, and "
                            "this call prepared its own: call the model with a 2-D mask and a dynamic "
                            "cache.")  # fmt: skip
    state.mask = None if mask is None else mask.bool()
    if state.start == 0:
        state.prompt = min(width, state.given) if state.given is not None else width
        state.opened.clear()
    else:
        state.opened.update(getattr(cache, _ROWS, {}).get(state, {}))


def _keep(state: Pass, output: Any) -> None:
    """Leave the gates with the cache, so that they stay with its rows when some are chosen or repeated."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and state.opened:
        vars(cache).setdefault(_ROWS, {})[state] = dict(state.opened)
        cache.reorder_cache = types.MethodType(_reorder, cache)


def _reorder(self: Any, beam_idx: Tensor) -> None:
    """reorder_cache() of the cache's own class, and of what gates noted about the rows of beams."""
    type(self).reorder_cache(self, beam_idx)
    vars(self)[_ROWS] = {state: {n: t.index_select(0, beam_idx.to(t.device)) for n, t in gates.items()}
                         for state, gates in vars(self)[_ROWS].items()}  # fmt: skip


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """generate() of the module's own class, with the length of what it was given noted in every followed
    pass.
    """
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    passes: list[Pass] = self.__dict__[_PASSES]
    for state in passes:
        state.given = None if inputs is None else int(inputs.shape[1])
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        for state in passes:
            state.given = None


def follow(module: nn.Module, state: Pass, *, prompts: bool) -> Callable[[], None]:
    """Keep ``state`` up to date on every pass of ``module``; returns the function that stops it.

    ``prompts`` also notes what ``generate`` was given (bound as a method, so that copies of the module follow
    too).
    """
    # The stack of blocks, because some models (OPT) call it past their own base model.
    base = module.get_submodule(site_map(module).anatomy.stack)

    def before(which: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _note(state, which, args, kwargs)

    def after(which: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _keep(state, output)

    handles = base.register_forward_pre_hook(before, with_kwargs=True), base.register_forward_hook(after)
    own = module.__dict__
    if prompts and hasattr(type(module), "generate"):
        own.setdefault(_PASSES, []).append(state)
        own.setdefault("generate", types.MethodType(_generate, module))

    def stop() -> None:
        for handle in handles:
            handle.remove()
        if state in own.get(_PASSES, ()):
            own[_PASSES].remove(state)
            if not own[_PASSES]:
                del own[_PASSES], own["generate"]

    return stop


def _arrays(operation: SiteOperation) -> dict[str, Tensor]:
    return {name: value for name, value in vars(operation).items() if isinstance(value, Tensor)}


class _Tensors:
    """The arrays of an operation per device and dtype, moved once."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self._arrays = arrays
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def like(self, x: Tensor) -> dict[str, Tensor]:
        key = (x.device, x.dtype)
        if key not in self._moved:
            moved = {name: t.to(x.device) for name, t in self._arrays.items()}
            self._moved[key] = {n: t.to(x.dtype) if t.is_floating_point() else t for n, t in moved.items()}
        return self._moved[key]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def gate_function(gate: Gate, number: int, state: Pass) -> SiteFunction:
    """A reading function that notes in ``state.opened[number]`` where the gate is open, [b, columns so
    far].
    """
    tensors = _Tensors({"direction": gate.direction})

    def read(x: Tensor) -> None:
        wide = _wide(x.detach())
        direction = tensors.like(wide)["direction"]
        score = wide @ direction
        if gate.cosine:
            score = score / (wide.norm(dim=-1) * direction.norm()).clamp(min=torch.finfo(wide.dtype).tiny)
        is_open = (score > gate.threshold) if gate.above else (score < gate.threshold)
        is_open = is_open & state.real(x)
        if not gate.first:
            is_open = is_open & ~state.first(x)
        both = _appended(state, number, is_open)
        state.opened[number] = both.long().cumsum(dim=1) > 0 if gate.scope == "prefix" else both

    return read


def _appended(state: Pass, number: int, now: Tensor) -> Tensor:
    """What was noted under ``number`` for the cached columns, followed by ``now`` [b, s]: [b, columns so far]."""
    before = state.opened.get(number)
    if before is None or state.start == 0:
        before = now.new_zeros(len(now), state.start)
    before = before[:, : state.start].to(now.device)
    if len(before) != len(now):
        if len(now) % max(len(before), 1):
            raise ArtifactError(f"A gate saw {len(before)} rows in the prompt and {len(now)} in a later "
                                "step: keep the rows of a batch together while a cache is in "
                                "use.")  # fmt: skip
        before = before.repeat_interleave(len(now) // len(before), dim=0)
    return torch.cat([before, now], dim=1)


def _clamped(operation: ClampFeatures, x: Tensor, tensors: Mapping[str, Tensor], number: int, state: Pass) -> Tensor:
    """[b, s] bool: the tokens of the present pass whose features are clamped."""
    counts = state.real(x) & ~state.first(x)
    if operation.share is None:
        return counts
    active = (active_features(operation, x, tensors)[0] > 0).any(-1) & counts
    seen = state.opened[-1 - number] = _appended(state, -1 - number, active)  # gates count from 0
    known = torch.ones_like(seen) if state.mask is None else state.mask[:, : seen.shape[1]].to(x.device)
    tokens = (known.long().cumsum(1) - 1).clamp(min=0)  # without the first
    return share_open(seen, tokens, operation.share, operation.prior)[:, state.start :]


def _positions(operation: AddVector, x: Tensor, state: Pass) -> Tensor:
    """[b, s] bool: where the positions of ``operation`` lie in the present pass."""
    columns = torch.arange(state.start, state.start + x.shape[1], device=x.device).expand(x.shape[:2])
    prompt = state.prompt if state.prompt is not None else state.start + x.shape[1]
    if operation.positions == "prompt":
        return columns < prompt
    if operation.positions == "generated":
        return columns >= prompt
    if state.mask is None:
        return columns == prompt - 1
    real = state.mask[:, :prompt].to(x.device)
    last = (real.long() * torch.arange(real.shape[1], device=x.device)).argmax(1, keepdim=True)
    return columns == last


def site_function(operation: SiteOperation, number: int, state: Pass) -> SiteFunction:
    """The function that carries out one site operation on activations [b, s, d]; never in place."""
    tensors = _Tensors(_arrays(operation))
    gated = getattr(operation, "gate", None) is not None
    placed = isinstance(operation, AddVector) and operation.positions != "all"

    def edit(x: Tensor) -> Tensor:
        wide = _wide(x)
        added = change(operation, wide, tensors.like(wide))
        chosen: Tensor | None = None
        if gated:
            chosen = state.opened[number][:, state.start : state.start + x.shape[1]].to(x.device)
        if placed and isinstance(operation, AddVector):
            where = _positions(operation, x, state)
            chosen = where if chosen is None else chosen & where
        if isinstance(operation, ClampFeatures):
            where = _clamped(operation, wide, tensors.like(wide), number, state)
            chosen = where if chosen is None else chosen & where
        if chosen is not None:
            added = torch.where(chosen.unsqueeze(-1), added, added.new_zeros(()))
        return (wide + added).to(x.dtype)

    return edit


def _chain(functions: Sequence[SiteFunction]) -> SiteFunction:
    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = x if (new := function(x)) is None else new
        return x

    return run


def site_functions(operations: Sequence[SiteOperation], state: Pass) -> dict[Site, SiteFunction]:
    """One function per site that carries out its operations in order, gates read first where they are
    asked.
    """
    chains: dict[Site, list[SiteFunction]] = {}
    for number, operation in enumerate(operations):
        gate = getattr(operation, "gate", None)
        if gate is not None:
            chains.setdefault(gate.site or operation.site, []).append(gate_function(gate, number, state))
        chains.setdefault(operation.site, []).append(site_function(operation, number, state))
    return {site: _chain(functions) for site, functions in chains.items()}


def needs_pass(operations: Sequence[SiteOperation]) -> bool:
    """True when some operation depends on padding, cache or prompt."""
    return any(getattr(op, "gate", None) is not None or isinstance(op, ClampFeatures) or needs_prompt([op])
               for op in operations)  # fmt: skip


def needs_prompt(operations: Sequence[SiteOperation]) -> bool:
    return any(isinstance(op, AddVector) and op.positions != "all" for op in operations)


def check_finite(name: str, tensor: Tensor) -> None:
    """NumericalError that names the tensor when it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"Tensor '{name}' has NaN or infinite entries after the edit: lower its "
                             "strength, or fit it on more data or with more regularisation.")  # fmt: skip
