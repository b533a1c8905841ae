"""Every error and warning of Memberwise: a stable code each, and one message builder."""

from __future__ import annotations

from typing import Any, NoReturn

CODES: dict[str, str] = {
    "MW101": "there is no model to stack",
    "MW102": "the models are of different classes",
    "MW103": "the models differ where one stack needs them equal",
    "MW104": "a parameter or buffer has no values yet (a lazy module)",
    "MW105": "one object is shared by all members without being declared shared",
    "MW106": "the members differ outside their tensors",
    "MW107": "tensors of one member share memory, which their stack does not",
    "MW108": "something that is not a module was given as a model",
    "MW109": "dicts of stacked tensors do not belong to one stack",
    "MW110": "functional_call was called with arguments it cannot use",
    "MW111": "a part of the template lies on the meta device and was given no values",
    "MW112": "there are more or fewer models than were announced",
    "MW113": "a part of a model is of a kind that no stack can hold",
    "MW201": "vmap was called with arguments it cannot map",
    "MW202": "a random operation was called under randomness='error'",
    "MW203": "a returned value cannot be stacked",
    "MW204": "a value is of a kind that cannot be stacked",
    "MW206": "an operation ran member by member",
    "MW207": "a function or module ran member by member",
    "MW208": "the members part ways in a backward pass, where no way back exists",
    "MW209": "a call with random streams of its own draws in a backward pass",
    "MW210": "an argument of a layer was written before a second derivative was taken",
    "MW211": "a rule raised what no member raises alone",
    "MW212": "a call writes to a leaf that needs a gradient",
    "MW213": "a rule does not fit its operation",
    "MW220": "a view reaches beyond the memory of one member",
    "MW301": "a member, or the stack, cannot be copied",
    "MW302": "build() was called with seeds it cannot use",
    "MW303": "random streams do not fit the stack",
    "MW304": "a view of a member is no view of its stack any more",
    "MW305": "there is no member of that number",
    "MW306": "an attribute is not one that a stack can answer or take",
    "MW401": "a hyperparameter has a wrong number of values",
    "MW402": "a hyperparameter has a value out of its range",
    "MW403": "members have different values where all must have one",
    "MW404": "parameters do not fit together in one optimizer",
    "MW405": "a gradient is not strided",
    "MW406": "an optimizer was traced before its state was made",
    "MW407": "a member's gradient norm is not finite",
    "MW408": "a state dict does not fit the optimizer",
    "MW409": "one number was asked of a hyperparameter that has one value a member",
    "MW410": "indices do not name members",
    "MW411": "members cannot be selected from a part of the state",
    "MW412": "there are no gradients to clip",
    "MW501": "a step cannot be captured and runs eagerly",
    "MW502": "a step runs eagerly, as there is no C++ compiler",
    "MW503": "a step is recorded anew over and over",
    "MW504": "compile was called with arguments it cannot use",
    "MW505": "a step cannot run in the chunks of members asked for",
    "MW506": "a call for several steps has no data for each of them",
    "MW507": "a step takes more memory for one member than it may for all",
    "MW601": "a stack deviates from what its members give alone",
    "MW602": "a stack fails where its members alone do not",
    "MW603": "a wrong argument of estimate()",
}
"""What each code means. MW1xx state, MW2xx engine, MW3xx Stack, MW4xx training, MW5xx capture, MW6xx checks."""


class MemberwiseError(Exception):
    """Base of all errors of Memberwise; `code` is stable across releases.

    >>> import memberwise
    >>> try:
    ...     memberwise.stack([])
    ... except memberwise.MemberwiseError as error:
    ...     error.code
    'MW101'
    """

    code: str = ""


class StateError(MemberwiseError, RuntimeError):
    """Models, or their tensors, do not fit together in one stack (torch raises RuntimeError here)."""


class ArgumentError(MemberwiseError, ValueError):
    """An argument is malformed (torch raises ValueError here)."""


class MemberIndexError(ArgumentError, IndexError):
    """A number names no member (a list raises IndexError here, and ends an iteration with it)."""


class StackAttributeError(MemberwiseError, AttributeError):
    """A stack has no such attribute (nn.Module raises AttributeError here)."""


class ParityError(MemberwiseError, AssertionError):
    """A stack does not give what its members give alone; `report` is the `Verification` that shows it."""

    report: Any = None


class KindError(MemberwiseError, TypeError):
    """An argument is of a kind that cannot be used (torch raises TypeError here)."""


class EngineError(MemberwiseError, RuntimeError):
    """An operation cannot run for all members (torch raises RuntimeError here)."""


class StackWarning(UserWarning):
    """Something about a stack that is legal, and that its owner should know.

    >>> import warnings
    >>> warnings.simplefilter("error", StackWarning)  # a slow path becomes an error
    >>> warnings.simplefilter("default", StackWarning)
    """


def text(code: str, what: str, *, do: str = "") -> str:
    """Build a message: what was expected and found, what to do about it, and the code.

    >>> text("MW103", "member 3: parameter 'w' has shape (4, 3), members 0-2 have (4, 4)", do="Regroup them.")
    "member 3: parameter 'w' has shape (4, 3), members 0-2 have (4, 4). Regroup them. [MW103]"
    """
    if code not in CODES:
        raise KeyError(f"unknown code {code}")
    lines = "\n" in what  # a list keeps its last line to itself
    parts = [what if lines else what.rstrip(".") + ".", do.rstrip(".") + "." if do else "", f"[{code}]"]
    first, *rest = [part for part in parts if part]
    return first + ("\n" if lines else " ") + " ".join(rest)


def fail(kind: type[MemberwiseError], code: str, what: str, *, do: str = "") -> NoReturn:
    """Raise `kind` with the message of `text()` and its code attached."""
    raise build(kind, code, what, do=do)


def build(kind: type[MemberwiseError], code: str, what: str, *, do: str = "") -> MemberwiseError:
    """The error that `fail` raises, for callers that raise it themselves (`from` another)."""
    error = kind(text(code, what, do=do))
    error.code = code
    return error
