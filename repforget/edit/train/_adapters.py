"""Adapters of peft on a model for as long as a block lasts: trained, switched off, written down as operations.

What is inside is the model with tuner layers in place of its modules; what comes out is an exact weight change.  On
leaving, every module, class, table, flag and bit is what it was.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.artifact import BiasDelta, DenseDelta, LowRankDelta, Operation
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit.train._fila import start_at
from repforget.errors import UnknownNameError, UsageError, nearest

# Tuners of peft that start as the model itself, train by a loss alone, switch off bit for bit and merge into the
# weights: tests hold each to it.  Of the others, some have no weight form (prompts, bottlenecks, routers), some start
# elsewhere, adalora needs a rank schedule of its own, boft compiles code on first use, waveft is another change in half
# precision, and ln_tuning is plain training.
KINDS = (
    "adamss", "c3a", "deft", "delora", "fila", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "loha",
    "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "randlora", "road", "shira", "supertuning", "tinylora",
    "vera",
)  # fmt: skip
PAIRED = ("gralora", "hra")  # start as the identity at even ranks only
LARGE = 1_000_000_000  # parameters from which "auto" means lora
LOW_RANK = ("lora", "fila")
NAME = "default"
BLOCKS = ("oft_block_size", "block_size", "group_size")  # settings of peft that must divide the sizes of a matrix
SEEDS = ("projection_prng_key", "projection_seed", "random_loc_seed", "random_seed", "rng_seed")
TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapter that is on a module: its ``parameters`` (name -> trainable tensor), and what it amounts to."""

    kind: str
    parameters: Mapping[str, nn.Parameter]
    layers: Mapping[str, Any]  # adapted parameter of the model -> tuner layer

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the module computes what it did without the adapter, bit for bit; no flag of a parameter changes."""
        before = [(layer, layer.disable_adapters) for layer in self.layers.values()]
        for layer, _ in before:
            layer._disable_adapters = True  # peft's own switch would freeze the adapter
        try:
            yield
        finally:
            for layer, value in before:
                layer._disable_adapters = value

    def operations(self) -> list[Operation]:
        """What the adapter adds to the weights: low-rank deltas of LoRA (exact), dense ones of any other kind.

        The dense ones are (merged - base) in float64, one module at a time; parts that are zero are left out.
        """
        found: list[Operation] = []
        for name, layer in self.layers.items():
            found += [_low_rank(name, layer)] if self.kind in LOW_RANK else _merged(name, layer)
        return found


@contextmanager
def adapted(
    module: nn.Module, kind: str, names: Sequence[str], *, rank: int = 16, alpha: float | Literal["auto"] = "auto",
    seed: int = 0, importance: Mapping[str, Tensor] | None = None,
) -> Iterator[Adapter]:  # fmt: skip
    """Put an adapter of peft on the named weights ("model.layers.0.mlp.down_proj.weight") while inside ``with``.

    ``rank`` and ``alpha`` (auto: twice the rank) reach the kinds that have them; block sizes are the largest that
    divide the matrices, up to peft's own; dropout is 0.  The model computes at first what it did before: bit for bit
    for "lora", up to rounding for kinds that decompose the weights.  Adapters of half-precision models are float32.
    "fila" is "lora" started where ``importance`` points (:mod:`repforget.edit.train._fila`).

    Raises UnknownNameError for a kind or weight that does not exist, UsageError for one that cannot be adapted.
    Memory: the adapter; nothing of the base is copied.
    """
    _check_kind(kind, rank)
    _check_names(module, kind, names)
    alpha = 2.0 * rank if alpha == "auto" else alpha
    with _as_before(module):
        with torch.random.fork_rng(range(torch.cuda.device_count())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about saving adapters that are never saved
            torch.manual_seed(seed)
            tuner = _inject(module, kind, _config(module, kind, names, rank, alpha, seed))
            found = _layers(module)
            if strays := sorted(set(names) ^ set(found)):
                raise UsageError(f"Adapter '{kind}' did not take exactly the targets, for example {strays[0]}: name "
                                 "others, or use 'lora'.")  # fmt: skip
            layers = {name: found[name] for name in names}
            if kind == "fila":
                start_at(tuner, layers, importance or {}, NAME)
        own = {id(p): (name, p) for name, p in (*tuner.named_parameters(), *module.named_parameters())}
        yield Adapter(kind, {name: p for name, p in own.values() if p.requires_grad}, layers)


def model_size_default(module: nn.Module) -> Literal["none", "lora"]:
    """What ``adapter: auto`` means: the weights themselves below 1 B parameters, LoRA from there on."""
    return "lora" if sum(p.numel() for p in module.parameters()) >= LARGE else "none"


def adaptable(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that LoRA takes: matrices of linear layers that are not tied, and stacks of experts."""
    return tuple(name for name in names if _obstacle(module, name) is None)


def _obstacle(module: nn.Module, name: str) -> str | None:
    owner, attribute = owner_of(module, name)
    parameter = owner._parameters[attribute]
    shared = [n for n, p in module.named_parameters(remove_duplicate=False) if p is parameter]
    if len(shared) > 1:
        return f"is tied to {next(n for n in shared if n != name)}"
    linear = attribute == "weight" and (isinstance(owner, nn.Linear) or is_conv1d(owner))
    if not linear and (parameter is None or parameter.ndim != 3):
        return "is neither the matrix of a linear layer nor a stack of experts"
    return None


def _check_kind(kind: str, rank: int) -> None:
    if kind not in KINDS:
        raise UnknownNameError(f"There is no adapter '{kind}' that trains by a loss alone and merges exactly into the "
                               f"weights: {nearest(kind, KINDS)} All of them: {', '.join(KINDS)}.")  # fmt: skip
    if kind in PAIRED and rank % 2:
        raise UsageError(f"Adapter '{kind}' needs an even rank: {rank} was given.")


def _check_names(module: nn.Module, kind: str, names: Sequence[str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise UsageError("The model carries an adapter already: merge it into the weights before it is edited.")
    if not names:
        raise UsageError(f"Adapter '{kind}' has no weight to train: give targets that match the model's parameters.")
    for name in names:
        obstacle = _obstacle(module, name)
        if obstacle is None and kind != "lora" and owner_of(module, name)[1] != "weight":
            obstacle = "is a stack of experts, which 'lora' alone takes"
        if obstacle is not None:
            raise UsageError(f"Adapter '{kind}' cannot be put on '{name}', which {obstacle}: choose other targets, or "
                             "train the weights themselves (adapter: none).")  # fmt: skip


def _config(module: nn.Module, kind: str, names: Sequence[str], rank: int, alpha: float, seed: int) -> Any:
    """The configuration of a kind: only settings that its class knows are given."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[_type(kind)]
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(made)}
    owners = {name: owner_of(module, name) for name in names}
    paths = [name.rpartition(".")[0] for name, (_, attribute) in owners.items() if attribute == "weight"]
    sizes = [size for owner, a in owners.values() if a == "weight" for size in owner._parameters[a].shape]  # type: ignore[union-attr]
    wanted = {
        "target_modules": paths, "target_parameters": [n for n in names if owners[n][1] != "weight"] or None,
        "r": 0 if kind == "oft" else rank, "alpha": alpha, "lora_alpha": alpha, "randlora_alpha": alpha,
        "fan_in_fan_out": any(is_conv1d(owner) for owner, _ in owners.values()),
        "n_frequency": min(known.get("n_frequency", 1), math.prod(sorted(sizes)[:2])), "progressbar": False,
        "feedforward_modules": _inward(module, paths) if kind == "ia3" else [],
        **{name: math.gcd(known[name], *sizes) for name in BLOCKS if name in known},
        **dict.fromkeys(SEEDS, seed),
    }  # fmt: skip
    if kind in ("c3a", "fourierft"):
        wanted["init_weights"] = True  # zeros, unlike their defaults
    return made(**{name: value for name, value in wanted.items() if name in known})


def _type(kind: str) -> Any:
    from peft import PeftType

    return PeftType("LORA" if kind in LOW_RANK else kind.upper())


def _inward(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """Modules whose inputs IA3 scales: the MLP output projections."""
    from repforget.models.weights import writers

    down = {ref.name.rpartition(".")[0] for ref in writers(module) if ref.role == "mlp_out"}
    return [path for path in paths if path in down]


def _inject(module: nn.Module, kind: str, config: Any) -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[_type(kind)](module, config, NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"Adapter '{kind}' cannot be put on these weights ({reason}): choose other targets or another "
                         "rank, or use 'lora'.") from error  # fmt: skip
    cast_adapter_dtype(module, NAME)
    return tuner


def _layers(module: nn.Module) -> dict[str, Any]:
    """Adapted parameter -> tuner layer; wrappers of several parameters of one module are nested in one another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for path, part in module.named_modules():
        if isinstance(part, BaseTunerLayer):
            found[f"{path.replace('.base_layer', '')}.{getattr(part, 'parameter_name', 'weight')}"] = part
    return found


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """On leaving: classes, tables, attributes and flags of the module tree as they were; dictionaries stay the same."""
    kept = [(part, part.__class__, {k: dict(v) if k in TABLES else v for k, v in vars(part).items()})
            for part in module.modules()]  # fmt: skip
    flags = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    try:
        yield
    finally:
        for part, kind, state in kept:
            part.__class__ = kind
            for name in set(vars(part)) - set(state):
                del part.__dict__[name]
            for name, value in state.items():
                if name in TABLES:
                    part.__dict__[name].clear()
                    part.__dict__[name].update(value)
                else:
                    part.__dict__[name] = value
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """(left [.., out, r], right [.., r, in]) of a LoRA layer in Linear orientation, float64, the scale in the left."""
    if hasattr(layer, "parameter_name"):
        with torch.no_grad():
            left, right, scale = layer.get_delta_factors(name)
    else:
        left, right, scale = layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]
    return left.detach().double() * scale, right.detach().double()


def _low_rank(name: str, layer: Any) -> LowRankDelta:
    pairs = [_factors(layer, adapter) for adapter in layer.lora_A]
    return LowRankDelta(name, torch.cat([u for u, _ in pairs], -1), torch.cat([v for _, v in pairs], -2))


def _merged(name: str, layer: Any) -> list[Operation]:
    twin = copy.deepcopy(layer).double()
    before = {a: p.detach().clone() for a, p in twin.get_base_layer().named_parameters(recurse=False)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.merge()
    found: list[Operation] = []
    for attribute, parameter in twin.get_base_layer().named_parameters(recurse=False):
        delta = (parameter.detach() - before[attribute]).float().cpu()
        if delta.any():
            path = f"{name.rpartition('.')[0]}.{attribute}"
            found.append(BiasDelta(path, delta) if attribute == "bias" else DenseDelta(path, delta))
    return found
