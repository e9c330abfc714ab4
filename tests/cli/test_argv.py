"""Both spellings of an option, and several words after one."""

from __future__ import annotations

import pytest

from sam3lora.cli import argv


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ([], []),
        (["--val_data_dir", "my_dir"], ["--val-data-dir", "my_dir"]),  # the option changes, its value does not
        (["--val_data_dir=my_dir"], ["--val-data-dir=my_dir"]),
        (["--val-data-dir", "x"], ["--val-data-dir", "x"]),
        (["data.valid_split=my_split"], ["data.valid_split=my_split"]),  # an override is no option
        (["--device", "0", "1", "lora.rank=8"], ["--device", "0", "--device", "1", "lora.rank=8"]),
        (["--device", "0,1", "x"], ["--device", "0,1", "x"]),
        (["--device", "cpu"], ["--device", "cpu"]),
        (["--device"], ["--device"]),  # left for the parser to complain about
        (
            ["--prompt", "a crack", "hole", "--output", "o"],
            ["--prompt", "a crack", "--prompt", "hole", "--output", "o"],
        ),
        (["--", "--a_b"], ["--", "--a_b"]),
        (["--boundingbox", "True", "--merge"], ["--boundingbox", "--merge"]),
        (["--boundingbox", "False"], ["--no-boundingbox"]),
        (["--boundingbox=false"], ["--no-boundingbox"]),
        (["--boundingbox"], ["--boundingbox"]),
        (
            ["--box", "1", "-2", "3", "4", "--merge"],
            ["--box", "1", "--box", "-2", "--box", "3", "--box", "4", "--merge"],
        ),
    ],
)
def test_normalize(typed, read):
    assert argv.normalize_argv(typed) == read
