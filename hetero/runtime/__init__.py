"""Execution of placed models: stages, workers, pipeline."""

from hetero.runtime.pipeline import Placed, place, place_stages
from hetero.runtime.stage import Stage, token_cross_entropy

__all__ = ["Placed", "Stage", "place", "place_stages", "token_cross_entropy"]
