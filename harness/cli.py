"""What every command needs: errors as one line instead of a traceback, and exit codes."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

OUT_OF_MEMORY = "out of memory", "can't allocate memory", "not enough memory", "bad_alloc"  # in torch's errors


class UsageError(ValueError):
    """An error that the user can fix; the message names the value and the fix."""


def require(holds: bool, message: str) -> None:
    """Raise UsageError with this message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch raises RuntimeError for it."""
    said = any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)


def with_notes(message: str, error: BaseException | None) -> str:
    """A message, and the notes that `add_note` has given to the error."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def in_short(error: BaseException) -> str:
    """The type of an error, and the beginning of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:80]}" if lines else type(error).__name__


def run_command(main: Callable[[], None], name: str, prints_errors: bool = True) -> int:
    """Run a command and return its exit code: 2 for an error that the user can fix, 130 for Ctrl-C and SIGTERM.

    The error's message and its notes (`add_note`) are printed on one line. prints_errors: False in a process beside
    another that prints the errors which all processes raise.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output lacks it, and encodes all characters
        sys.stdout.reconfigure(errors="backslashreplace")  # print π as an escape where the terminal has no such letter
    error, message, code, shared = None, "", 0, False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            main()
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.stdout.flush()  # here, because an error in Python's own flush at exit prints a traceback
    except KeyboardInterrupt as e:
        error, message, code = e, "interrupted", 130
    except ModuleNotFoundError as e:
        error, message, code, shared = e, f"the package {e.name} is missing: pip install {e.name}", 2, True
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does: end silently, with SIGPIPE's exit code
        code = 141
    except (UsageError, FloatingPointError, OSError) as e:
        error, message, code, shared = e, str(e), 2, True
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        advice = "give fewer --prompts, --samples or --eval-prompts, or a larger --accumulate"
        error, message, code = e, f"out of memory ({in_short(e)}); {advice}", 2
    if shared and not prints_errors:
        return 0  # another exit code could let torchrun kill the other process before it has printed the error
    if message:
        with contextlib.suppress(OSError):
            print(f"{name}: {' '.join(with_notes(message, error).splitlines())}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # drop what cannot be written: Python flushes again when it exits, and would fail with code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
