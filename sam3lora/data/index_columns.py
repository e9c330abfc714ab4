"""Objects of a whole index as NumPy arrays, for what counts or selects them without making a record of every image.

Legend: I images (rows of the table), T annotations in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sam3lora.data.void import is_void


@dataclass(frozen=True)
class ObjectColumns:
    """The annotations of an index table: row of their image, category and whether they are crowd regions."""

    num_images: int
    rows_T: np.ndarray  # int64
    codes_T: np.ndarray  # int64, positions in `categories`
    crowd_T: np.ndarray  # bool
    categories: tuple[str, ...]  # names in the order of their first annotation

    @property
    def void_T(self) -> np.ndarray:
        """bool: The annotations that are void regions, see `sam3lora.data.void`."""
        is_named = np.array([is_void({"category": name, "iscrowd": True}) for name in self.categories], dtype=bool)
        return self.crowd_T & is_named[self.codes_T]

    def count_per_image(self, chosen_T: np.ndarray | None = None) -> np.ndarray:
        """Number of annotations, or of the chosen ones, of each image: int64 (I,)."""
        rows_T = self.rows_T if chosen_T is None else self.rows_T[chosen_T]
        return np.bincount(rows_T, minlength=self.num_images)

    def count_per_category(self) -> dict[str, int]:
        """Number of annotations of each category that has any; void regions do not count."""
        counts = np.bincount(self.codes_T[~self.void_T], minlength=len(self.categories)).tolist()
        return {name: count for name, count in zip(self.categories, counts, strict=True) if count}

    def count_pairs(
        self, key_of: Callable[[str], str] = str, chosen_T: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """How many annotations of each category every image has, for the pairs that occur.

        Args:
            key_of: Categories with equal keys count as one.
            chosen_T: Annotations to count, as booleans; None for all.

        Returns:
            Row of the image, position in the list of keys and number of annotations of each pair, ordered by row and
            position, and the keys.
        """
        keys = list(dict.fromkeys(map(key_of, self.categories)))
        position = {key: number for number, key in enumerate(keys)}
        of_code = np.array([position[key_of(name)] for name in self.categories], dtype=np.int64)
        rows_T, codes_T = (values if chosen_T is None else values[chosen_T] for values in (self.rows_T, self.codes_T))
        pairs, counts = np.unique(rows_T * max(len(keys), 1) + of_code[codes_T], return_counts=True)
        rows, positions = np.divmod(pairs, max(len(keys), 1))
        return rows, positions, counts, keys


def object_columns(table: pa.Table) -> ObjectColumns:
    """The annotations of an index table, without their masks and boxes."""
    rows, codes, crowds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    code_of: dict[str, int] = {}
    first_row = 0
    for chunk in table["annotations"].chunks:
        annotations = chunk.flatten()
        rows.append(np.repeat(np.arange(first_row, first_row + len(chunk)), pc.list_value_length(chunk).to_numpy()))
        encoded = annotations.field("category").dictionary_encode()
        own = [code_of.setdefault(name, len(code_of)) for name in encoded.dictionary.to_pylist()]
        codes.append(np.array(own, np.int64)[encoded.indices.to_numpy()])
        crowds.append(annotations.field("iscrowd").to_numpy(zero_copy_only=False))
        first_row += len(chunk)
    return ObjectColumns(
        table.num_rows, np.concatenate(rows), np.concatenate(codes), np.concatenate(crowds), tuple(code_of)
    )


def keep_annotations(table: pa.Table, kept_T: np.ndarray) -> pa.Table:
    """The table with those annotations only for which `kept_T` is true; all images stay."""
    chunks, start = [], 0
    for chunk in table["annotations"].chunks:
        annotations = chunk.flatten()
        kept = kept_T[start : start + len(annotations)]
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy())
        offsets = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], ends])]
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), annotations.filter(pa.array(kept))))
        start += len(annotations)
    position = table.schema.get_field_index("annotations")
    kept_column = pa.chunked_array(chunks, type=table.schema.field(position).type)
    return table.set_column(position, table.schema.field(position), kept_column)
