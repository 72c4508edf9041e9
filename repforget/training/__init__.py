"""Training: the steps that the organism, the trained editors and the relearning attacks share."""

from repforget.training.adapters import ADAPTER, low_rank_adapters
from repforget.training.examples import NO_LABEL, Example, batches, collate, label_loss
from repforget.training.finetune import Step, finetune, only, select
from repforget.training.stepper import AnyOptimizer, Optimizer, Precision, Schedule, Stepper, learning_rate

__all__ = [
    "ADAPTER", "NO_LABEL", "AnyOptimizer", "Example", "Optimizer", "Precision", "Schedule", "Step", "Stepper",
    "batches", "collate", "finetune", "label_loss", "learning_rate", "low_rank_adapters", "only", "select",
]  # fmt: skip
