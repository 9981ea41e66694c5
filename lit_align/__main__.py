"""`python -m lit_align`, and the command `lit-align`."""

import os
import sys

if os.environ.get("LIT_ALIGN_OWN_MODULES"):  # a worker process, which imports the main module again
    from lit_align.config.own_modules import inherit

    inherit()


def entry() -> int:
    """Run the command line; what the user can mend ends in one line, and so does what a signal stopped."""
    from lit_align.utils.stopping import Stopped, stoppable

    try:
        with stoppable():
            return _entry()
    except Stopped as stopped:
        _failed(str(stopped))
        return int(128 + stopped.number)
    except KeyboardInterrupt:  # before or after that
        return 130


def _entry() -> int:
    from lit_align.utils import versions
    from lit_align.utils.display import escape_the_rest

    escape_the_rest()
    debug = bool(os.environ.get("LIT_ALIGN_DEBUG"))
    try:
        from lit_align.cli.entry import main
    except Exception as error:  # a broken release raises anything when it is imported
        if debug:
            raise
        return _failed(versions.failed_import(error))
    try:
        main()
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        if debug:
            raise
        untested = versions.advice(error) if versions.outside() else None
        notes = [*getattr(error, "__notes__", ()), *([untested] if untested else [])]
        return _failed("; ".join([str(error), *notes]) or type(error).__name__)
    except Exception as error:
        # A bug of this package keeps its traceback; an untested version explains most other surprises.
        untested = versions.advice(error)
        if debug or untested is None:
            raise
        return _failed(f"{type(error).__name__}: {error}; {untested} (LIT_ALIGN_DEBUG=1 shows the traceback)")
    return 0


def _failed(message: str) -> int:
    from lit_align.utils.display import printable
    from lit_align.utils.secret import redact_text

    print(f"lit-align: {printable(redact_text(' '.join(message.split())))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(entry())
