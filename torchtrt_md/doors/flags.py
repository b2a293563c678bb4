"""Hints of errors, which name the arguments of Python's functions, in the words of the command line."""

from __future__ import annotations

import re

from torchtrt_md.errors import MDError

_ARGUMENT = re.compile(r"""(?P<name>[a-z_]+)=(?:"(?P<one>\w+)"|'(?P<other>\w+)'|(?P<rest>True|False|\.{3}))""")
# What no option stands for: the plan is in the model's file.
_IN_FILE = {
    "check=False, --no-verify": "check=False",
    "pass parallel=": "let the model file say parallel = ",
    "pass one: ": "let the list `parallel` of the model file have one: ",
    "load(..., weights=...)": "weights=...",
}
_OPTIONS = frozenset(
    {
        *("mesh", "strategy", "placement", "compute", "transport", "exchange_dtype", "target"),
        *("weights", "weight_streaming", "strip_weights", "weight_budget", "kernel_cache"),
    }
)


def for_command_line(error: MDError) -> MDError:
    """The same error, its hint in the words of the command line."""
    return MDError(error.problem, fix=in_flags(error.fix), at=error.at)


def in_flags(hint: str) -> str:
    """``use placement="split"`` -> ``use --placement split``; what is no option stays as it is."""
    for ours, theirs in _IN_FILE.items():
        hint = hint.replace(ours, theirs)

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"], found["one"] or found["other"] or found["rest"]
        if (name, value) == ("check", "False"):
            return "--no-verify"
        if name not in _OPTIONS:
            return found[0]
        option = f"--{name.replace('_', '-')}"
        if value == "False":
            return f"no {option}"
        return option if value in ("True", "...") else f"{option} {value}"

    return _ARGUMENT.sub(flag, hint)
