"""The command line: one module per verb; a verb imports heavy packages only when it runs."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Sequence

from sam3lora.cli.argv import normalize_argv, refuse_bad_paths
from sam3lora.errors import RunFailed, RunStopped, UserError

EXIT_OK, EXIT_INTERNAL, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_TERMINATED = RunStopped.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: the words after the program's name, or None for those of this process.

    Returns:
        The exit status: 0 success, 1 failure (with a traceback where it is a fault in the program), 2 a user's mistake
        (with one message), 130 interrupted, 143 a run that SIGTERM stopped after it had saved.
    """
    from sam3lora.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    try:
        refuse_bad_paths(words)
        app(args=normalize_argv(words), prog_name="sam3lora")
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # Ray's handler, while Ray starts
            return EXIT_TERMINATED
        return stop.code if isinstance(stop.code, int) else (EXIT_OK if stop.code is None else EXIT_INTERNAL)
    except UserError as error:
        _print_error(str(error))
        return EXIT_USER
    except RunFailed as error:
        _print_error(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        from sam3lora.files import is_full

        if not is_full(error):
            return _report_fault()
        _print_error(
            f"cannot write {error.filename or 'a file'} ({error.strerror}): make room for it, and run this again"
        )
        return EXIT_INTERNAL
    except Exception:
        return _report_fault()
    return EXIT_OK


def _report_fault() -> int:
    traceback.print_exc()
    _print_error('this is a fault in sam3lora: please report it with the output of "sam3lora env"')
    return EXIT_INTERNAL


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from sam3lora.data.faults import printable

    message = "\n".join(map(printable, message.split("\n")))
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
