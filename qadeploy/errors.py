"""Every error that qadeploy raises on purpose.

QadeployError
├── InputError                what the user gave cannot be used            (exit code 2)
│   ├── CallError             a call of compat's pipeline; a ValueError too
│   │   └── CallKeyError      a field or task it does not know; a KeyError too
│   ├── DataError             a data file: names the file, row and field
│   ├── QuestionTooLongError  the question leaves no room for the context
│   ├── StrideError           doc_stride leaves windows no way forward
│   └── TooManyWindowsError   a context makes more windows than the caller takes
└── FailureError              the input was fine, the work did not succeed (exit code 1)
    ├── BundleError           a bundle is incomplete, damaged or unsafe
    ├── CheckpointError       a run or checkpoint folder cannot be loaded
    ├── DeviceError           the device asked for is not to be had
    ├── GateError             an exported model lost more than it may
    ├── LogitsError           a model returned NaN or infinite logits
    ├── MissingExtraError     an optional package is not installed
    └── RemoteError           an inference server cannot be reached, or is not the right one

DeviceWarning                 auto took the CPU although a GPU is there (a UserWarning)
MachineWarning                session settings were measured on another kind of machine (a UserWarning)
"""

from __future__ import annotations

from collections.abc import Sequence


class QadeployError(Exception):
    """Base class: ``str(error)`` is one message a user can act on."""

    exit_code = 1


class InputError(QadeployError):
    """What the user gave cannot be used: a path, an option, a text."""

    exit_code = 2


class CallError(InputError, ValueError):
    """A call of ``compat``'s pipeline that cannot be understood; also a ValueError, which transformers' raises."""


class CallKeyError(CallError, KeyError):
    """A field that a question lacks, or an unknown task; also a KeyError, which transformers' pipeline raises."""

    __str__ = CallError.__str__  # a KeyError shows its message in quotes


class DataError(InputError):
    """Rows of a data file that cannot be used.

    ``problems`` holds one line a row (``FILE: row 4, field answer: ...``), all of them;
    the message shows the first ``SHOWN`` and counts the rest.
    """

    SHOWN = 20

    def __init__(self, problems: Sequence[str], fix: str = "") -> None:
        self.problems = tuple(problems)
        lines = list(self.problems[: self.SHOWN])
        if len(self.problems) > self.SHOWN:
            lines.append(f"... and {len(self.problems) - self.SHOWN} more rows with problems")
        if fix:
            lines.append(fix)
        super().__init__("\n".join(lines))


class QuestionTooLongError(InputError):
    """The question and the special tokens fill ``max_seq_len``: no token of context fits."""


class StrideError(InputError):
    """``doc_stride`` is at least the room left for context, so windows would not move forward."""


class TooManyWindowsError(InputError):
    """A question and its context make more windows than the caller takes."""


class FailureError(QadeployError):
    """The input was fine, but the work did not succeed."""


class BundleError(FailureError):
    """A bundle is incomplete, damaged, of an unknown version, or unsafe to load."""


class CheckpointError(FailureError):
    """A run or checkpoint folder cannot be loaded as a question-answering model."""


class DeviceError(FailureError):
    """The device asked for is not to be had; the message says what is missing."""


class GateError(FailureError):
    """An exported or quantized model differs from its source by more than allowed."""


class LogitsError(FailureError):
    """A model returned NaN or infinite logits, so no answer can be trusted."""


class MissingExtraError(FailureError):
    """An optional package is not installed; the message gives the pip line, ``fix`` alone holds it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        self.package = package
        self.fix = f"pip install 'qadeploy[{extra}]'"
        super().__init__(f"{purpose} needs the package {package}, which is not installed: {self.fix}")


class RemoteError(FailureError):
    """An inference server cannot be reached, has not the model, or answers something else than its logits."""


class DeviceWarning(UserWarning):
    """``auto`` took the CPU although a GPU's driver is there; the message says what CUDA lacks."""


class MachineWarning(UserWarning):
    """A bundle's session settings were measured on a machine with other instruction sets: it answers, perhaps slower."""
