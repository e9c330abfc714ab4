"""`python -m sam3lora` is the same as `sam3lora`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
