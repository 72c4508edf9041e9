"""Training: the steps that the organism, the trained editors and the relearning attacks share."""

from repforget.training.adapters import ADAPTER, low_rank_adapters
from repforget.training.examples import NO_LABEL, Example, batches, collate, label_logits, label_loss
from repforget.training.finetune import Step, finetune, only, select
from repforget.training.items import Record, chosen, encoded, read_records, records_of
from repforget.training.stepper import AnyOptimizer, Optimizer, Precision, Schedule, Stepper, learning_rate

__all__ = [
    "ADAPTER", "NO_LABEL", "AnyOptimizer", "Example", "Optimizer", "Precision", "Record", "Schedule", "Step", "Stepper",
    "batches", "chosen", "collate", "encoded", "finetune", "label_logits", "label_loss", "learning_rate",
    "low_rank_adapters", "only", "read_records", "records_of", "select",
]  # fmt: skip
