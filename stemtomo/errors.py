"""The errors a user can meet. Each also derives from the builtin it refines, so ``except ValueError`` keeps working."""


class StemtomoError(Exception):
    """Base of every error raised on purpose; its text says what, where, expected and found, and what to do."""


class ConfigurationError(StemtomoError, ValueError):
    """A configuration key or a physical parameter is unknown, missing or out of its allowed range."""


class FormatError(StemtomoError, ValueError):
    """A file is not what it was said to be: wrong shape, dtype, axes, or truncated."""


class AcquisitionError(StemtomoError, RuntimeError):
    """An acquisition stalled, shrank, or does not hold the frames its scan promises."""


class StalledError(AcquisitionError):
    """An acquisition brought no new frame within the deadline; a later call continues where this one ended."""


class CalibrationError(StemtomoError, ValueError):
    """The data do not determine a calibration that was asked for."""


class StoreError(StemtomoError, OSError):
    """A store cannot be read or written: newer schema, missing result, no room on the disk."""


class UnfinishedError(StemtomoError, RuntimeError):
    """The work was asked to stop and did, at a checkpoint; run again, it continues there."""


class UnreachableError(StoreError):
    """Object storage does not answer; run again, the work continues when it does."""


class RefusedError(UnreachableError):
    """Object storage answers, and refuses: no such bucket, no rights. That is to be mended before running again."""


class MemoryPlanError(StemtomoError, MemoryError):
    """A plan does not fit the memory it was given; the text names both numbers and what would fit."""


class AcquisitionWarning(UserWarning):
    """Something of an acquisition looks wrong, but does not keep it from being used; said once for each tilt."""
