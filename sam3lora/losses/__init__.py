"""SAM 3's training loss in torch: matching, terms and the criterion. No Ray and no files.

criterion = Criterion()
output = criterion(Predictions(logits, boxes, presence, ...), Targets(counts, boxes, masks, mask_valid))
output.total.backward()
"""

from sam3lora.config.loss import LossSection

from .criterion import Criterion, LossOutput
from .matching import HungarianCost, Matches, OneToManyRule, Pairs, match
from .targets import Predictions, Targets
from .terms import Normalizer

__all__ = [
    "Criterion",
    "HungarianCost",
    "LossOutput",
    "LossSection",
    "Matches",
    "Normalizer",
    "OneToManyRule",
    "Pairs",
    "Predictions",
    "Targets",
    "match",
]
