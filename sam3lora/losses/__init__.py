"""SAM 3's training loss in pure torch: matching, terms and the criterion. No Ray, no configuration, no I/O.

criterion = Criterion()
output = criterion(Predictions(logits, boxes, presence, ...), Targets(counts, boxes, masks, mask_valid))
output.total.backward()
"""

from .criterion import Criterion, LossOutput
from .matching import HungarianCost, Matches, OneToManyRule, Pairs, match
from .targets import Predictions, Targets, count_semantic
from .weights import LossWeights, Normalizer

__all__ = [
    "Criterion",
    "HungarianCost",
    "LossOutput",
    "LossWeights",
    "Matches",
    "Normalizer",
    "OneToManyRule",
    "Pairs",
    "Predictions",
    "Targets",
    "count_semantic",
    "match",
]
