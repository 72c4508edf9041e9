"""Exact unlearning by sharded training: adapters of which only those that saw a record are trained again."""

from repforget.shards.combine import answers, best_shard, combined, shard_edit, shard_factors
from repforget.shards.folder import Training, begin, build, factors_of, opened, served
from repforget.shards.index import summed_scores, touched_by
from repforget.shards.plan import Settings, Stage, block_groups, expected_share, place, planned
from repforget.shards.removal import Outcome, complete, guarantee_of, share, take_out, without

__all__ = [
    "Outcome", "Settings", "Stage", "Training", "answers", "begin", "best_shard", "block_groups", "build",
    "combined", "complete", "expected_share", "factors_of", "guarantee_of", "opened", "place", "planned", "served",
    "share", "shard_edit", "shard_factors", "summed_scores", "take_out", "touched_by", "without",
]  # fmt: skip
