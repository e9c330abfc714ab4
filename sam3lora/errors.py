"""The exceptions that the command line prints without a traceback."""


class UserError(ValueError):
    """A mistake in a file, an option or the set-up; the message says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A run ended early for a reason its message explains in full, such as a loss that is not finite."""

    exit_status = 1


class OutOfMemory(RunFailed):
    """The device or the host had too little memory for a batch; a smaller one may fit."""


class DiskFull(RunFailed):
    """There was no more space for a file of a run."""


class RunStopped(RunFailed):
    """SIGTERM ended a run, which saved a checkpoint before."""

    exit_status = 128 + 15  # as a shell reports a process that SIGTERM ended


class WorkerStopped(RuntimeError):
    """SIGTERM ended a worker of Ray, which saved a checkpoint before; the run goes on from there."""


class WorkerLost(RunFailed):
    """A worker process was gone, more often than the run allows."""
