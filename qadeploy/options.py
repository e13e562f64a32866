"""Every option is declared once, as a field of a dataclass: its type, default, range, help and names.

The command-line flags, the checks of a config file, the environment variables, the validation of the arguments of library calls
and the tables in the documentation are all made from these declarations::

    @dataclass(frozen=True)
    class Options:
        epochs: int | None = option(None, "Epochs at most.", least=1, shown="3", also=("--num-train-epochs",))

    declared(Options)["epochs"].flag  # --epochs
    check(Options(epochs=0))          # InputError: epochs must be a whole number from 1, not 0
"""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache, partial
from inspect import get_annotations
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qadeploy.errors import InputError

_KEY = "option"
PREFIX = "QADEPLOY_"


@dataclass(frozen=True, slots=True)
class Option:
    """One declared option.

    Attributes:
        name: The field's name.
        kind: ``bool``, ``int``, ``float`` or ``str``; with ``many``, the type of each item.
        default: The default; None if it is chosen later.
        help: What the option does, in a sentence or two.
        least: The smallest value allowed.
        most: The largest value allowed.
        choices: The values allowed, () for any; for a number, words allowed besides numbers.
        also: Further flags with the same meaning.
        off: The flag that means False, for a bool that is True or None by default.
        shown: A description of the default, if the value itself is not shown.
        many: Whether the option may be given several times.
        named: The flag, if it does not follow from the field's name.
    """

    name: str
    kind: type
    default: Any
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    off: str = ""
    shown: str = ""
    many: bool = False
    named: str = ""

    @property
    def flag(self) -> str:
        """The flag: ``--max-queue`` for ``max_queue``, ``--cors-origin`` for ``cors_origins``, which may be repeated."""
        return self.named or flag_of(self.name.removesuffix("s") if self.many else self.name)

    @property
    def env(self) -> str:
        """The environment variable, for options that have one."""
        return PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    @property
    def default_text(self) -> str:
        """The default as help texts show it."""
        if self.shown:
            return self.shown
        if self.default is None or self.default == ():
            return "none"
        return ("on" if self.default else "off") if self.kind is bool else str(self.default)

    def problem(self, value: Any) -> str:
        """Describes what is wrong with a value; "" if nothing is."""
        if value is None:
            return "" if self.default is None else "is missing"
        if self.many and not isinstance(value, str):
            return next((text for text in map(self._one_problem, value) if text), "")
        return self._one_problem(value)

    def _one_problem(self, value: Any) -> str:
        if self.kind is bool or self.kind is str:
            if not isinstance(value, self.kind):
                return f"must be {'true or false' if self.kind is bool else 'text'}, not {value!r}"
            if self.choices and value not in self.choices:
                return f"is {value!r}: choose {', '.join(self.choices)}"
            return ""
        if isinstance(value, str) and value in self.choices:
            return ""
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return f"must be {self.range_text}, not one of over 300 digits"
        right = (int,) if self.kind is int else (int, float)
        if isinstance(value, right) and not isinstance(value, bool) and math.isfinite(value) and self._inside(value):
            return ""
        return f"must be {self.range_text}, not {value!r}"

    def _inside(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def range_text(self) -> str:
        """The allowed numbers, as text."""
        text = "".join(f"{word} or " for word in self.choices)
        text += "a whole number" if self.kind is int else "a number"
        if self.least is not None and self.most is not None:
            return f"{text} from {self.least:g} to {self.most:g}"
        if self.least is not None:
            return f"{text} from {self.least:g}"
        return text if self.most is None else f"{text} up to {self.most:g}"


def option(
    default: Any,
    help: str,  # noqa: A002 - its name in click
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    off: str = "",
    shown: str = "",
    secret: bool = False,
    named: str = "",
) -> Any:
    """Declares an option as a dataclass field; see ``Option`` for the arguments. A ``secret`` is not printed."""
    values = {
        "help": help, "least": least, "most": most, "choices": choices, "also": also,
        "off": off, "shown": shown, "named": named,
    }  # fmt: skip
    return field(default=default, repr=not secret, metadata={_KEY: values})


@cache
def declared(cls: Any) -> dict[str, Option]:
    """The options that a dataclass declares, by field name, in order."""
    hints = get_type_hints(cls)
    own = get_annotations(cls)  # its own options go before the inherited ones
    ordered = sorted(fields(cls), key=lambda each: each.name not in own)
    return {each.name: _of(each, hints[each.name]) for each in ordered if _KEY in each.metadata}


def _of(each: Field[Any], hint: Any) -> Option:
    kinds = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    several = [get_args(k)[0] for k in kinds if get_origin(k) is tuple]
    kind, *others = several or (k for k in kinds if k is not NoneType)
    values = dict(each.metadata[_KEY])
    if get_origin(kind) is Literal:
        values["choices"], kind = get_args(kind), str
    elif others:
        values["choices"] = get_args(others[0])
    default = None if each.default is MISSING else each.default
    return Option(name=each.name, kind=kind, default=default, many=bool(several), **values)


def check(options: Any) -> None:
    """Checks the values of a dataclass against its declarations.

    Raises:
        InputError: A value has the wrong type, is out of range or is not among the choices; the message names the option.
    """
    cls: Any = type(options)
    for name, each in declared(cls).items():
        problem = each.problem(getattr(options, name))
        if problem:
            raise InputError(f"{name} {problem}")


def flag_of(name: str) -> str:
    """The flag of a field: ``--max-queue`` for ``max_queue``."""
    return f"--{name.replace('_', '-')}"


def table(cls: type, *, env: bool = False) -> str:
    """The options of a dataclass as a table in Markdown, with their environment variables if ``env``."""
    head = ["flag", "environment", "default", "what"] if env else ["flag", "default", "what"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in declared(cls).values():
        cells = [f"`{each.flag}`", *([f"`{each.env}`"] if env else []), each.default_text, each.help]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- options that several commands share

# Each declares the field of the same name.
bundle_sha256 = partial(
    option, None, "SHA-256 of the bundle's manifest.json (sha256sum); any other bundle is refused.", shown="any bundle"
)
load_timeout = partial(option, 300.0, "Seconds that loading the bundle may take.", least=0.001)
device = partial(option, "auto", "auto, cpu, cuda or cuda:N.")
threads = partial(option, None, "CPU threads.", least=1, shown="all")
trust_remote_code = partial(option, False, "Run the Python code that comes with a model. Read it first.")
allow_pickle = partial(
    option, False, "Read weights that exist only as a pickle (pytorch_model.bin); torch loads only tensors from it."
)
hub_token = partial(  # for the field ``token``
    option,
    None,
    "Token for the hub, for private models and data sets.",
    shown="$HF_TOKEN, or a login",
    secret=True,
    named="--hub-token",
    also=("--token",),
)
columns = partial(
    option, None, "Which column holds which field, e.g. context=review,answer=ans,span=indices.", shown="usual names"
)
no_answer_token = partial(
    option, None, "An answer that means 'none in this context', e.g. ANSWERNOTFOUND; '' for a blank one."
)
on_ambiguous = partial(
    option, "error", "What to do with an answer that occurs several times in its context and has no answer_start."
)
label = partial(
    option,
    None,
    "The label of the regions that are answers, if an annotation tool's export has several.",
    shown="the only one",
)
empty_answers = partial(
    option,
    None,
    "What an empty list of answers means if no other field says that there is no answer; reject: the labels are withheld.",
    shown="no-answer, with a warning",
)
prefilter = partial(
    option,
    None,
    "Read only this many windows of a long context, those that share most with the question (BM25).",
    least=1,
    shown="all",
)
min_score = partial(option, 0.0, "Leave out answers with a lower score, 'no answer' included.", least=0, most=1)
snippet = partial(
    option,
    None,
    "Also return the sentence around each answer, or whole words within this many characters on each side.",
    least=1,
    most=5_000,
    shown="nothing",
)
offsets = partial(
    option,
    "codepoints",
    "What start and end count: code points (Python), UTF-16 units (JavaScript, Java) or UTF-8 bytes.",
)


def keep(what: str) -> Any:
    """Declares the field ``cache``: whether ``what`` is kept for the next run."""
    return option(True, f"Keep {what} in $QADEPLOY_CACHE (~/.cache/qadeploy).", off="--no-cache")
