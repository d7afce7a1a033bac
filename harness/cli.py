"""A dataclass of settings as a command line, and bad input as one line instead of a traceback.

A setting is a field made by `opt`: its default, its help and its least value stand beside it, and nothing else has to
be told about it. `parse` reads a command line, `check_values` looks at each value by itself.
"""

import argparse
import dataclasses
import math
import sys
import types
from collections.abc import Callable, Collection
from typing import get_args


class UsageError(ValueError):
    """What the user gave cannot be used; the message names the value and the fix. The command line exits with 2."""


class Ended(BaseException):
    """Another process of the run was lost, or this one was told to end. Not an error that anybody should handle."""


def require(holds: bool, message: str) -> None:
    """Raise UsageError with this message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def opt(group: str, default, help: str, low: float | None = None, free: bool = False):
    """A field of a dataclass of settings.

    group: the heading under which --help lists it. low: its least value. free: a run that is resumed may have another.
    """
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, low=low, free=free))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fixed_names(settings) -> list[str]:
    """The settings that a run keeps from beginning to end."""
    return [f.name for f in dataclasses.fields(settings) if not f.metadata["free"]]


def fill_in(settings, **defaults):
    """The settings with these values where the user left them open (None)."""
    left_open = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **left_open)


def kinds(f: dataclasses.Field) -> list[type]:
    """The types that a setting may have, None aside."""
    return [kind for kind in get_args(f.type) or (f.type,) if kind is not types.NoneType]


def check_values(settings, choices: dict[str, Collection[str]]) -> None:
    """Raise UsageError where a value is of another type, not finite, too small, or not among the setting's choices."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if value is None and f.default is None:
            continue
        low = f.metadata["low"]
        among = choices.get(f.name)
        # an int does for a float; and True, which Python takes for an int, for neither
        types_of_value = (*kinds(f), int) if float in kinds(f) else tuple(kinds(f))
        fits = isinstance(value, types_of_value) and (f.type is bool or not isinstance(value, bool))
        require(fits, f"{flag(f.name)} must be {' or '.join(kind.__name__ for kind in kinds(f))}, got {value!r}")
        if isinstance(value, float):
            require(math.isfinite(value), f"{flag(f.name)} must be a finite number, got {value}")
        if low is not None:
            require(value >= low, f"{flag(f.name)} must be at least {low}, got {value}")
        if among is not None:
            require(value in among, f"{flag(f.name)} must be one of {', '.join(among)}, got {value!r}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def count_or_share(text: str) -> int | str:
    """A count ("18") as an int, a share ("50%") as it is written."""
    return int(text) if text.isascii() and text.isdigit() else text


def parse(settings: type, choices: dict[str, Collection[str]], about: str, argv: list[str] | None) -> dict:
    """What a command line gives, by the names of the settings; --help lists them by group."""
    parser = Parser("smd.py", description=about, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {}
    for f in dataclasses.fields(settings):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(f.name), **argument(f, choices.get(f.name)))
    return vars(parser.parse_args(argv))


def argument(f: dataclasses.Field, among: Collection[str] | None) -> dict:
    """What argparse is told about a setting."""
    help = f.metadata["help"]
    if among is not None:
        help += f" {{{', '.join(among)}}}"
    if f.default is not None and f.default is not False:
        help += f" (default: {f.default})"
    if f.type is bool:
        return dict(action="store_true", help=help)
    kind = count_or_share if f.type == int | str | None else kinds(f)[0]
    return dict(type=kind, metavar=kind.__name__.upper(), help=help.replace("%", "%%"))


def run_command(main: Callable[[], None], name: str, hint: str, speaks: bool = True) -> int:
    """Run a command and return its exit code: bad input ends with one line and 2, Ctrl-C with one line and 130.

    speaks: False in a process beside another that ends alike and speaks for both. That it lost another, each says.
    """
    try:
        main()
    except Ended as e:
        print(f"{name}: {e}; {hint}", file=sys.stderr)
        return 1
    except (UsageError, FloatingPointError) as e:
        said, code = str(e), 2
    except KeyboardInterrupt:
        said, code = f"interrupted; {hint}", 130
    else:
        return 0
    if not speaks:
        return 0  # with another code, torchrun would end the process that speaks before it has spoken
    print(f"{name}: {said}", file=sys.stderr)
    return code
