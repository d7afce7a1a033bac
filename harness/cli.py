"""A dataclass of settings as a command line, and bad input as one line instead of a traceback.

A setting is a field made by `opt`: its help and its least value stand beside it, and nothing else has to be told about
it. `parse` reads a command line, `check_values` looks at each value by itself.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import math
import os
import shlex
import signal
import sys
import types
from collections.abc import Callable, Collection
from typing import get_args


class UsageError(ValueError):
    """What the user gave cannot be used; the message names the value and the fix. The command line exits with 2."""


class Ended(BaseException):
    """Another process of the run was lost, or this one was told to end. Not an error that anybody should handle."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code  # with which the command exits


def require(holds: bool, message: str) -> None:
    """Raise UsageError with this message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def opt(group: str, help: str, low: float | None = None, free: bool = False, default=None):
    """A field of a dataclass of settings.

    group: the heading under which --help lists it. low: its least value. free: a run that is resumed may have another.
    default: None where nobody gives it.
    """
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, low=low, free=free))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def words(**given) -> str:
    """Settings as a command line of a shell gives them."""
    found = []
    for name, value in given.items():
        word = shlex.quote(str(value))
        # what begins with a dash is taken for a flag, unless it is tied to its own
        tie = "=" if word.startswith("-") else " "
        found.append(flag(name) if value is True else f"{flag(name)}{tie}{word}")
    return " ".join(found)


def in_short(error: BaseException) -> str:
    """An error in some words: its type, and the beginning of its message."""
    said = str(error).splitlines()
    return f"{type(error).__name__}: {said[0][:80]}" if said else type(error).__name__


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
        if isinstance(value, int):
            require(value < 2**63, f"{flag(f.name)} must be at most {2**63 - 1}, got {value}")
        if isinstance(value, str):
            require("\0" not in value, f"{flag(f.name)} must be text without NUL characters, got {value!r}")
        if low is not None:
            require(value >= low, f"{flag(f.name)} must be at least {low}, got {value}")
        if among is not None:
            require(value in among, f"{flag(f.name)} must be one of {', '.join(among)}, got {value!r}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", file=file)  # argparse itself hides that it cannot be written


def count_or_share(text: str) -> int | str:
    """A count ("18") as an int, a share ("50%") as it is written."""
    return int(text) if text.isascii() and text.isdigit() else text


def parse(
    settings: type, choices: dict[str, Collection[str]], about: str, argv: list[str] | None,
    default: Callable[[str], str] = lambda name: "",
) -> dict:  # fmt: skip
    """What a command line gives, by the names of the settings; --help lists them by group.

    default: what the help adds of what a setting is where it is not given.
    """
    parser = Parser("smd.py", description=about, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {}
    for f in dataclasses.fields(settings):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(f.name), **argument(f, choices.get(f.name), default(f.name)))
    return vars(parser.parse_args(argv))


def argument(f: dataclasses.Field, among: Collection[str] | None, default: str) -> dict:
    """What argparse is told about a setting."""
    help = f.metadata["help"]
    if among is not None:
        help += f" {{{', '.join(among)}}}"
    help += default
    if f.type is bool:
        return dict(action="store_true", help=help)
    kind = count_or_share if f.type == int | str | None else kinds(f)[0]
    return dict(type=kind, metavar=kind.__name__.upper(), help=help.replace("%", "%%"))


def escape_output() -> None:
    """Print the characters that a terminal's encoding lacks as escapes, where they would be an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def told_to_end(number: int, _) -> None:
    raise Ended(f"ended by {signal.Signals(number).name}", 128 + number)


def run_command(main: Callable[[], None], name: str, speaks: bool = True) -> int:
    """Run a command and return its exit code: bad input ends with one line and 2, Ctrl-C with one line and 130.

    What was noted on an error (`add_note`) stands behind its message. speaks: False in a process beside another that
    ends alike and speaks for both. That it lost another, each says.
    """
    escape_output()
    said = None
    before = signal.signal(signal.SIGTERM, told_to_end)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # an error of this must be met here: at the end of Python it is a traceback
        code = 0
    except Ended as e:
        said, code, speaks = with_notes(e), e.code, True
    except KeyboardInterrupt as e:
        said, code = with_notes(e, "interrupted"), 130
    except (UsageError, FloatingPointError) as e:
        said, code = with_notes(e), 2
    except ModuleNotFoundError as e:
        said, code = f"the package {e.name} is needed for this: pip install {e.name}", 2
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # a reader that has seen enough, as in `| head`, ends a command without a word, and with SIGPIPE's code
        said = (
            None if e.errno == errno.EPIPE else with_notes(e, f"the output cannot be written: {e.strerror}; make room")
        )
        code = 2 if said else 141
    finally:
        signal.signal(signal.SIGTERM, before)
    if not speaks:
        return 0  # with another code, torchrun would end the process that speaks before it has spoken
    with contextlib.suppress(OSError):
        if said:
            print(f"{name}: {said}", file=sys.stderr, flush=True)
    discard_unwritable_output()
    return code


def with_notes(error: BaseException, message: str | None = None) -> str:
    return "; ".join([message or str(error), *getattr(error, "__notes__", [])])


def discard_unwritable_output() -> None:
    """Drop what could not be written, or Python tries once more when it ends, and fails with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
