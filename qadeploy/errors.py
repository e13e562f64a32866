"""Every error that qadeploy raises on purpose.

QadeployError
├── InputError                the input cannot be used                  (exit code 2)
│   ├── CallError             compat's pipeline was called wrongly; also a ValueError
│   │   └── CallKeyError      a field or task is unknown; also a KeyError
│   ├── DataError             rows of a data file are faulty; names file, row and field
│   ├── QuestionTooLongError  the question leaves no room for the context
│   ├── StrideError           doc_stride is not below max_seq_len
│   └── TooManyWindowsError   a context needs more windows than allowed
└── FailureError              the input was fine, but the work failed   (exit code 1)
    ├── BundleError           a bundle is incomplete, damaged or unsafe
    ├── CheckpointError       a run or checkpoint folder cannot be loaded
    ├── CorpusError           a corpus index is damaged, unsafe or of another version
    ├── DeviceError           the requested device is not available
    ├── GateError             an exported model lost more than allowed
    ├── HubError              the hub is unreachable, lacks a repository or refuses access
    ├── LoadTimeoutError      a bundle takes too long to load
    ├── LogitsError           a model returned NaN or infinite logits
    ├── MissingExtraError     an optional package is not installed
    └── RemoteError           an inference server is unreachable or unsuitable

DataWarning                   data were read in a way that may not be intended (a UserWarning)
DeviceWarning                 auto chose the CPU although there is a GPU (a UserWarning)
MachineWarning                session settings come from another kind of machine (a UserWarning)
"""

from __future__ import annotations

from collections.abc import Sequence


class QadeployError(Exception):
    """Base class: ``str(error)`` is a message that a user can act on."""

    exit_code = 1


class InputError(QadeployError):
    """An input, such as a path, an option or a text, cannot be used."""

    exit_code = 2


class CallError(InputError, ValueError):
    """``compat``'s pipeline was called wrongly; also a ValueError, which transformers' pipeline raises."""


class CallKeyError(CallError, KeyError):
    """A missing field of a question, or an unknown task; also a KeyError, which transformers' pipeline raises."""

    __str__ = CallError.__str__  # a KeyError shows its message in quotes


class DataError(InputError):
    """Rows of a data file that cannot be used.

    Attributes:
        problems: One line per faulty row, ``FILE: row 4, field answer: ...``. The message shows the first ``SHOWN``
            and counts the rest.
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
    """``doc_stride`` is not below ``max_seq_len``: the overlap would exceed the window."""


class TooManyWindowsError(InputError):
    """A question and its context need more windows than the caller allows."""


class FailureError(QadeployError):
    """The input was fine, but the work did not succeed."""


class BundleError(FailureError):
    """A bundle is incomplete, damaged, of an unknown version, or unsafe to load."""


class CheckpointError(FailureError):
    """A run or checkpoint folder cannot be loaded as a question-answering model."""


class CorpusError(FailureError):
    """A corpus index is incomplete, damaged, of another version, or unsafe to load."""


class DeviceError(FailureError):
    """The requested device is not available; the message says what is missing."""


class GateError(FailureError):
    """An exported or quantized model differs from its source by more than allowed."""


class HubError(FailureError):
    """The Hugging Face hub cannot be reached, lacks the repository or the revision, or refuses the token."""


class LoadTimeoutError(FailureError):
    """A bundle was not loaded in time. Its thread keeps running and may crash a normal exit: use ``os._exit``."""


class LogitsError(FailureError):
    """A model returned NaN or infinite logits, so no answer can be trusted."""


class MissingExtraError(FailureError):
    """An optional package is not installed; the message ends with the pip command, which is also in ``fix``."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        self.package = package
        self.fix = f"pip install 'qadeploy[{extra}]'"
        super().__init__(f"{purpose} needs the package {package}, which is not installed: {self.fix}")


class RemoteError(FailureError):
    """An inference server cannot be reached, lacks the model, or does not return its logits."""


class DataWarning(UserWarning):
    """Data were read in a way that their author may not have intended; the message says how to choose another."""


class DeviceWarning(UserWarning):
    """``auto`` chose the CPU although a GPU driver is installed; the message says what CUDA lacks."""


class MachineWarning(UserWarning):
    """A bundle's session settings were measured on a CPU with other instruction sets: it works, but may be slower."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """Returns an error's message, or the name of its class if it has none, on one line, cut after ``most`` characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]
