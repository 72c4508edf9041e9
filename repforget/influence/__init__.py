"""Influence: which training records are behind an answer, by the curvature of the training loss."""

from repforget.influence.audit import Ranking, rank
from repforget.influence.ekfac import Curvature, curvature
from repforget.influence.factors import Factors
from repforget.influence.maps import linear_maps
from repforget.influence.score import scores, self_scores

__all__ = ["Curvature", "Factors", "Ranking", "curvature", "linear_maps", "rank", "scores", "self_scores"]
