"""What a run works with: the loaded models, the knowledge, the run folder and the key that every stage shares."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repforget.errors import ResourceError
from repforget.knowledge import Knowledge, Split
from repforget.knowledge_files import load_knowledge
from repforget.progress import Progress, track
from repforget.recipe import Recipe
from repforget.records import Evidence, Measurement, Verdict
from repforget.store import Store, read_json, write_json

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel
    from repforget.verify.arms import Arm

Echo = Callable[[str], None]
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "safetensors")
PRESENTATION = ("cli", "report")  # rooms that change no number
TRAINING_COPIES = 4  # a float32 copy that is fine-tuned: weights, gradient, two AdamW moments


@dataclass(frozen=True)
class Step:
    """One stage of a plan: what it does and what it costs, in counts."""

    stage: str
    what: str
    cost: str


@dataclass(frozen=True)
class Plan:
    """What a run will need, computed from headers and the probe alone: no weight is loaded."""

    recipe: Recipe
    parameters: int
    peak_bytes: int
    available_bytes: int
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.canonical(), "parameters": self.parameters, "peak_bytes": self.peak_bytes,
            "available_bytes": self.available_bytes, "fits": self.fits,
            "steps": [vars(step) for step in self.steps], "notes": list(self.notes),
        }  # fmt: skip


def plan(recipe: Recipe) -> Plan:
    """Say what ``recipe`` will do and need before anything is loaded.

    The peak is an upper estimate: original and twins as loaded, with one copy and one float32 copy that is fine-tuned,
    or with what the largest training of an edit needs (:mod:`repforget.edit.train._cost`).  Times follow from a product
    of matrices that is timed here.
    """
    from repforget.edit.train._plan import planned
    from repforget.models.load import device_of, estimate, free_memory

    knowledge = load_knowledge(recipe.knowledge, seed=recipe.seed)
    sizes = [estimate(name, device=recipe.device, dtype=recipe.dtype) for name in (recipe.model, *recipe.twins)]
    own = sizes[0]
    loaded = sum(size.bytes for size in sizes)
    peak = loaded + own.bytes + 4 * TRAINING_COPIES * own.parameters
    free = free_memory(device_of(recipe.device))
    if recipe.limits.memory is not None:
        free = min(free, int(recipe.limits.memory * 2**30))
    counts = ", ".join(f"{len(getattr(knowledge, name))} {name}" for name in ("forget", "retain", "neighbours"))
    arms = 3 + len(recipe.twins)
    size = f"{own.parameters / 1e6:.1f} M parameters each"
    steps = [Step("load", f"{recipe.model} and {len(recipe.twins)} twins", size),
             Step("knowledge", f"{knowledge.name}: {counts} items", "no forward pass")]  # fmt: skip
    steps += [Step("locate", choice.name, "forwards over the forget statements") for choice in recipe.locate]
    data, place = knowledge.for_editor(), device_of(recipe.device)
    for choice in recipe.ladder:
        training = planned(choice.name, choice.settings, own, data, place)
        cost = "one edit, screened on dev, then at the gate"
        if training is not None:
            peak, cost = max(peak, loaded + training.bytes - own.bytes), f"{training.text}; then {cost}"
        steps.append(Step("edit", choice.name, cost))
    level = recipe.verify if isinstance(recipe.verify, str) else ", ".join(choice.name for choice in recipe.verify)
    steps.append(Step("sealed", f"{level} verification of the saved edit in a fresh process", f"{arms} arms"))
    notes = list(knowledge.notes)
    if not recipe.twins:
        notes.append("no twin is given: the floor is chance, and the unlearning depth score is left out")
    return Plan(recipe, own.parameters, peak, free, tuple(steps), tuple(notes))


@dataclass(frozen=True)
class Session:
    """Everything the stages of one run share; ``key`` makes a stage's key from what is special about it."""

    recipe: Recipe
    store: Store
    knowledge: Knowledge
    model: LoadedModel
    twins: tuple[LoadedModel, ...]
    progress: Progress | None = None
    echo: Echo = field(default=lambda line: None)

    @cached_property
    def base(self) -> dict[str, Any]:
        return {
            "model": self.model.fingerprint, "twins": [twin.fingerprint for twin in self.twins],
            "knowledge": self.knowledge.digest, "seed": self.recipe.seed, "dtype": str(self.model.dtype),
            "device": self.model.device.type, "versions": versions(), "code": code_digest(),
        }  # fmt: skip

    def room_for(self, processes: int) -> bool:
        """True when that many processes with models of their own fit into memory beside this one."""
        planned = plan(self.recipe)
        return processes * planned.peak_bytes <= planned.available_bytes

    def key(self, **own: Any) -> dict[str, Any]:
        return {**self.base, **own}

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hashes for the report; nothing that differs between two runs on one machine."""
        return {
            "versions": versions(), "python": platform.python_version(), "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."), "model_fingerprint": self.model.fingerprint,
            "twin_fingerprints": [twin.fingerprint for twin in self.twins],
            "knowledge_digest": self.knowledge.digest, "code_digest": self.base["code"],
        }  # fmt: skip

    def measure(self, edit: Path, split: Split, level: Any) -> tuple[Evidence, ...]:
        """Evidence on the saved ``edit``, the original and the twins, and beyond the dev screen on its placebo."""
        from repforget.verify.battery import assemble

        screen = ("original", "edit", *(f"twin-{k}" for k in range(len(self.twins))))
        only = screen if split == "dev" else None
        return assemble(self.measure_arms(edit, split, level, only), self._tasks(level, split))

    def measure_arms(
        self, edit: Path | None, split: Split, level: Any, only: Sequence[str] | None = None
    ) -> dict[str, Mapping[str, Measurement]]:
        """Measurements by arm, each arm a stage of its own; ``only`` names the arms to measure."""
        from repforget.artifact import load_edit
        from repforget.verify._verify import arms_of
        from repforget.verify.arms import References
        from repforget.verify.battery import asks_shuffled, measure_arm

        loaded = None if edit is None else load_edit(edit)
        if loaded is not None:
            loaded.check_base(self.model)
        references = References(self.model, self.twins)
        view, chosen = self.knowledge.view(split), self._tasks(level, split)
        verifiers = {task.name: task.settings for task in chosen}
        everyone = arms_of(loaded, references, seed=self.recipe.seed, shuffled=asks_shuffled(level, chosen))
        arms = [arm for arm in everyone if only is None or arm.name in only]
        measured: dict[str, Mapping[str, Measurement]] = {}
        for arm in track(self.progress, arms, f"verify on {split}", len(arms)):

            def build(folder: Path, arm: Arm = arm) -> None:
                found = measure_arm(arm, view, chosen, references, seed=self.recipe.seed, progress=self.progress)
                write_json(folder / "measurements.json", {name: m.to_json() for name, m in found.items()})

            identity = loaded.digest if loaded is not None and arm.name in ("edit", "placebo", "shuffled") else None
            key = self.key(arm=arm.name, edit=identity, split=split, verifiers=verifiers)
            data = read_json(self.store.stage(f"measure-{split}-{arm.name}", key, build) / "measurements.json")
            measured[arm.name] = {name: Measurement.from_json(m) for name, m in data.items()}
        return measured

    def _tasks(self, level: Any, split: Split) -> Any:
        from repforget.verify.battery import ready

        def listed(choices: Any) -> Any:
            return choices if choices is None or isinstance(choices, str) else [{c.name: c.settings} for c in choices]

        return ready(listed(level), split, listed(self.recipe.held_out))

    def judge(self, edit: Path, split: Split, level: Any, *, alpha: float = 0.05) -> Verdict:
        """Measure and judge one saved edit on one split; ``alpha`` is the level of its one-sided limits."""
        return self.verdict(edit, self.measure(edit, split, level), split, alpha=alpha)

    def verdict(
        self, edit: Path, evidence: tuple[Evidence, ...], split: Split, *, alpha: float = 0.05
    ) -> Verdict:
        from repforget.artifact import load_edit
        from repforget.verify.verdict import judge

        manifest = load_edit(edit).manifest
        return judge(evidence, margin=self.recipe.margin, utility_margin=self.recipe.limits.utility_drop,
                     seed=self.recipe.seed, alpha=alpha, split=split, artifact=manifest.artifact,
                     sites=manifest.sites)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from repforget import __version__

    return {"repforget": __version__, **{name: version(name) for name in PACKAGES}}


def code_digest() -> str:
    """sha256 over the source that makes numbers, so that a changed method never meets a result of the old one."""
    root = Path(__file__).parent
    body = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in PRESENTATION:
            continue
        body.update(path.relative_to(root).as_posix().encode())
        body.update(path.read_bytes())
    return body.hexdigest()


def open_session(recipe: Recipe, store: Store, progress: Progress | None, echo: Echo) -> Session:
    """Load models and knowledge, refusing before loading where the plan does not fit into memory."""
    wanted = plan(recipe)
    if not wanted.fits:
        raise ResourceError(f"The run needs about {wanted.peak_bytes / 2**30:.1f} GiB and "
                            f"{wanted.available_bytes / 2**30:.1f} GiB may be used: take a smaller dtype, fewer twins, "
                            "or a larger machine ('repforget plan' shows the parts).")  # fmt: skip
    from repforget.models.load import load

    knowledge = load_knowledge(recipe.knowledge, seed=recipe.seed)
    model, *twins = (load(name, device=recipe.device, dtype=recipe.dtype) for name in (recipe.model, *recipe.twins))
    return Session(recipe, store, knowledge, model, tuple(twins), progress, echo)
