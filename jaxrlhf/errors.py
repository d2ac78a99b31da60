"""Errors by kind, each with the exit status of the command line, which prints them without a traceback.

| class | exit status | meaning |
|---|---|---|
| `InputError` | 2 | a setting, a file or data is wrong |
| `TrainingDiverged` | 3 | losses or gradients are not finite, or no response has a score |
| `SilentCorruption` | 70 | a device computes or holds wrong bits (`EX_SOFTWARE`) |
| `StorageError` | 74 | a disk or a store does not take or give back what it should (`EX_IOERR`) |
| `PeerLost` | 75 | another process of the run is gone, or the run hangs; start again with `--resume` (`EX_TEMPFAIL`) |
| `Preempted` | 75 | SIGTERM, SIGUSR1 or the cloud's notice; a checkpoint was saved first |
| `Interrupted` | 130 | Ctrl-C; a checkpoint was saved first |
"""


class RunError(Exception):
    """An expected failure. The message names what was found and what to do next."""

    status = 1
    """Exit status of the command line."""


class InputError(RunError, ValueError):
    """Bad input. The message names the field, file or row, the value, and the remedy."""

    status = 2


class OutOfMemory(InputError):
    """A device ran out of memory. The message names the flags that need less; the cause is XLA's error."""


class SharedError(InputError):
    """An InputError that every process of a run raises at the same place, so that they can save a checkpoint first."""


class TrainingDiverged(RunError):
    """Training cannot go on: several steps in a row had no finite update."""

    status = 3


class SilentCorruption(RunError):
    """A device computed other bits than before, or than another device, without reporting an error."""

    status = 70


class StorageError(RunError, OSError):
    """A checkpoint, an export or a record cannot be written or read back."""

    status = 74


class PeerLost(RunError):
    """Another process of the run is gone."""

    status = 75


class Interrupted(RunError):
    """The user asked the run to stop; a checkpoint was saved first."""

    status = 130


class Preempted(Interrupted):
    """The cluster asked the run to stop; a checkpoint was saved first, and the run can be started again."""

    status = 75
