"""The errors that a user can mend.

Every message says what was expected, what came, and how to repair it. The
command line prints such an error as one line, without a traceback, and exits
with status 2; anything else is a defect of gpt_tf and keeps its traceback.
"""


class InputError(ValueError):
    """What the user handed in cannot be used as it is."""


class InputTypeError(InputError, TypeError):
    """An object of the wrong kind was handed in, a Keras 3 layer for example."""


class DamagedFileError(InputError):
    """A file is truncated, tampered with, or not what its manifest says."""


class TrainingDivergedError(InputError):
    """Training came to a loss, or to weights, that contain NaN or infinity."""


class PeerLostError(RuntimeError):
    """Another worker of the run is gone; started again, all go on together.

    The command line then exits with `EXIT_STATUS`, "try again" of sysexits.h.
    """

    EXIT_STATUS = 75


class WorkerFailedError(RuntimeError):
    """A process that works for this one failed, and is not started again.

    Args:
        message: Which worker failed, and how.
        status: The exit status for the command line.
    """

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status
