"""The metrics of a dense run while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sam3lora.data.images import ImageError
from sam3lora.evaluation.dense.label_meter import LabelMeter
from sam3lora.model.dense.model import DenseSam3
from sam3lora.training.dense.runner import DenseRunner
from sam3lora.training.validator import Validator, values_of_all


@dataclass
class DenseValidator(Validator):
    """As `Validator`; the metrics are those of `LabelMeter` at the size of the images."""

    model: DenseSam3
    runner: DenseRunner

    def metrics(self) -> dict[str, Any]:
        labels, size = self.data.valid_settings.label_maps, self.config.training.images_per_forward
        assert labels is not None
        meter = LabelMeter(self.model.settings, labels)
        self.model.eval()
        with torch.no_grad():
            for records in self.my_records(size):
                for record, logits in self._logits(records):
                    meter.add(logits, record)
        return values_of_all(meter)

    def _logits(self, records: list[Any]) -> list[tuple[Any, Any]]:
        """Of each record whose image can be read: (record, logits (N, 4g, 4g) on the host)."""
        runner, readable, features = self.runner, [], []
        with torch.autocast(runner.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
            for record in records:
                try:
                    features.append(runner.images.of_records([record]))
                    readable.append(record)
                except ImageError:
                    if self.config.training.on_bad_image == "stop":
                        raise
            if not readable:
                return []
            tokens = [torch.cat(each) for each in zip(*features, strict=True)]
            logits = self.model.logits(tokens)[0].float().cpu().numpy()
        return list(zip(readable, logits, strict=True))
