"""An edit as other tools read it: a plain Hugging Face checkpoint, or a PEFT LoRA adapter.

Both are written, loaded back and compared before they count as written: a checkpoint format drops what it has
no key for (an added bias, for example) without an error, and the exported model would then be the unedited
one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repforget.artifact.fold import applied, probe_logits
from repforget.artifact.operations import LowRankDelta
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.errors import ArtifactError
from repforget.models.load import LoadedModel, copy_of

if TYPE_CHECKING:
    from repforget.artifact.edit import Edit

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
HALF_TOLERANCE = 2e-2
# config flag -> the modules of a block that it gives a bias to (all of them, or none)
BIAS_FLAGS = {"mlp_bias": "mlp", "attention_bias": "self_attn"}


def _new_folder(folder: Path) -> None:
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ArtifactError(f"'{folder}' exists and is not empty: choose a new folder for the export.")


def _compare(expected: Tensor, found: Tensor, dtype: torch.dtype, what: str) -> None:
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE) * max(1.0, float(expected.abs().max()))
    gap = float((expected - found).abs().max())
    if not gap <= tolerance:
        raise ArtifactError(f"{what} does not reproduce the edited model: logits differ by {gap:.2e} where "
                            f"{tolerance:.1e} is allowed, so that it was not written; use Edit.save "
                            "instead.")  # fmt: skip


def _written(folder: Path, write: Callable[[], None]) -> Path:
    """Run ``write``; a refusal takes the half-written folder away again."""
    _new_folder(folder)
    try:
        write()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def export_checkpoint(edit: Edit, model: LoadedModel, folder: Path) -> Path:
    """Write the edited model with ``save_pretrained``; see :meth:`Edit.export_checkpoint`."""
    edited = applied(edit, model, check=True)
    if edited.module.__dict__["_repforget_edit"].hooked:
        raise ArtifactError(f"Edit '{edit.manifest.method}' needs hooks at {', '.join(edit.manifest.sites)}, "
                            "which a checkpoint cannot hold: serve it with Edit.attach, or choose an editor "
                            "that changes weights.")  # fmt: skip
    return _written(folder, lambda: _save_checkpoint(edited, folder))


def _save_checkpoint(edited: LoadedModel, folder: Path) -> None:
    import transformers

    module: Any = edited.module
    expected = probe_logits(module)
    _declare_biases(module)
    module.save_pretrained(folder)
    edited.tokenizer.save_pretrained(folder)
    loader = getattr(transformers, type(module).__name__, transformers.AutoModelForCausalLM)
    reloaded, report = loader.from_pretrained(folder, dtype=module.dtype, output_loading_info=True)
    lost = sorted(str(key) for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")
                  for key in report.get(fault, ()))  # fmt: skip
    if lost:
        raise ArtifactError(f"The checkpoint format of {type(module).__name__} has no place for '{lost[0]}', "
                            "so that the edit would be lost on reload: keep it as an edit (Edit.save) "
                            "instead.")  # fmt: skip
    _compare(expected, probe_logits(reloaded.eval().to(module.device)), module.dtype, "The checkpoint")


def _declare_biases(module: Any) -> None:
    """Where a bias was added and a config flag allows it, set the flag; its other modules get zero biases."""
    config = module.config.get_text_config()
    for flag, part in BIAS_FLAGS.items():
        if getattr(config, flag, None) is not False:
            continue
        parts = [m for name, m in module.named_modules() if name.endswith(f".{part}")]
        linears = [layer for m in parts for layer in m.children() if isinstance(layer, nn.Linear)]
        if not any(layer.bias is not None for layer in linears):
            continue
        for layer in linears:
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
        setattr(config, flag, True)


def _adapters(edit: Edit, module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A [r, in], B [out, r]) of a purely low-rank edit; ArtifactError names what is not."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is module.get_input_embeddings().weight  # type: ignore[operator]
    for op in edit.operations:
        if not isinstance(op, LowRankDelta) or op.u.ndim != 2:
            raise ArtifactError(f"Edit '{edit.manifest.method}' holds a '{op.kind}' operation, and a LoRA "
                                "adapter holds low-rank weight deltas only: use Edit.save or export a "
                                "checkpoint.")  # fmt: skip
        owner, attribute = owner_of(module, op.weight)
        linear = isinstance(owner, nn.Linear) or is_conv1d(owner)
        if attribute != "weight" or not linear or (tied and owner is head):
            raise ArtifactError(f"'{op.weight}' is not the weight of an untied linear layer, which is all "
                                "that a LoRA adapter changes exactly: use Edit.save or export a "
                                "checkpoint.")  # fmt: skip
        path = op.weight.removesuffix(".weight")
        a, b = found.get(path, (op.v[:0], op.u[:, :0]))
        found[path] = (torch.cat([a, op.v]), torch.cat([b, op.u], dim=1))
    return found


def export_peft(edit: Edit, model: LoadedModel, folder: Path) -> Path:
    """Write the edit as a LoRA adapter (r = alpha = rank); see :meth:`Edit.export_peft`."""
    edit.check_base(model)
    pairs = _adapters(edit, model.module)
    expected = probe_logits(applied(edit, model, check=False).module)
    return _written(folder, lambda: _save_adapter(pairs, model, folder, expected))


def _save_adapter(
    pairs: dict[str, tuple[Tensor, Tensor]], model: LoadedModel, folder: Path, expected: Tensor
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = copy_of(model).module
    paths: Sequence[str] = sorted(pairs)
    kinds = {is_conv1d(base.get_submodule(path)) for path in paths}
    if len(kinds) > 1:
        raise ArtifactError("The edit changes both Conv1D and Linear layers, and one LoRA configuration can "
                            "describe only one of them: use Edit.save or export a checkpoint.")  # fmt: skip
    ranks = {path: len(pairs[path][0]) for path in paths}
    config = LoraConfig(
        r=max(ranks.values()), lora_alpha=max(ranks.values()), target_modules=list(paths),
        rank_pattern=ranks, alpha_pattern=ranks, fan_in_fan_out=kinds == {True}, lora_dropout=0.0,
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            layer: Any = adapted.get_base_model().get_submodule(path)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    adapted.save_pretrained(str(folder))
    reloaded = PeftModel.from_pretrained(copy_of(model).module, str(folder)).eval()
    _compare(expected, probe_logits(reloaded), model.dtype, "The adapter")
