"""The command line, `python -m diffad_ref`: words come in, and one line goes out if they are wrong.

Nobody who uses a shell should have to read a traceback, unless the package itself is at fault.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys

import torch
import tyro
from pydantic import ValidationError

from diffad_ref.checkpoints import said
from diffad_ref.tools import commands

COMMANDS = (
    commands.Data
    | commands.Train
    | commands.Continual
    | commands.Evaluate
    | commands.Compare
    | commands.Plan
    | commands.Reproduce
    | commands.Predict
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 with a message when the input is at fault, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so it was while all was loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = tyro.cli(
        COMMANDS,
        prog="python -m diffad_ref",
        description="Find defects with diffusion models. Exit codes: 0 done, 2 the input is at "
        "fault (a message says how), 130 interrupted.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any sign
    try:
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        chosen.run("python -m diffad_ref " + shlex.join(argv))
        if sys.stdout:  # a shell may have closed it
            sys.stdout.flush()  # here, where a reader that is gone is known
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:  # of a training on a GPU, `fit` says it better
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or "t allocate memory" in str(error)):
            raise
        words = (
            f"the {'GPU' if on_gpu else 'computer'}'s memory is too small for this: try a smaller"
        )
        print(f"diffad_ref: {words} --batch-size, or --precision\n{error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        words = said(error) if isinstance(error, ValidationError) else str(error)
        words = words.rsplit(f"\n{type(error).__name__}: ", 1)[-1]  # of a process that loads
        print(f"diffad_ref: {words.rstrip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffad_ref: stopped; a training goes on where it was saved", file=sys.stderr)
        return 130
    return 0
