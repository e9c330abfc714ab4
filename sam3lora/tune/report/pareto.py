"""Quality against size: the trials that no other beats in both."""

from __future__ import annotations

from collections.abc import Iterable

from sam3lora.tune.run.ledger import TrialRecord, better


def pareto_front(records: Iterable[TrialRecord], mode: str) -> list[TrialRecord]:
    """The Pareto front of value and trainable parameters, by rising size and so by rising quality.

    A trial is on it unless another is as good and smaller, or as small and better. Trials that are equal in both are
    all on it; those that failed or have no value are not.

    Args:
        records: The trials.
        mode: "min" or "max": which values are better.
    """
    measured = [record for record in records if record.value is not None and record.status != "failed"]

    def beats(other: TrialRecord, record: TrialRecord) -> bool:
        if other.trainable_parameters > record.trainable_parameters or better(record.value, other.value, mode):
            return False
        return other.trainable_parameters < record.trainable_parameters or better(other.value, record.value, mode)

    front = [record for record in measured if not any(beats(other, record) for other in measured)]
    return sorted(front, key=lambda record: (record.trainable_parameters, record.number))
