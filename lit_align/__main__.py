"""`python -m lit_align`, and the command `lit-align`."""

import os
import sys


def entry() -> int:
    """Run the command line; what the user can mend ends in one line."""
    from lit_align.cli import main

    try:
        main()
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        if os.environ.get("LIT_ALIGN_DEBUG"):
            raise
        said = "; ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"lit-align: {' '.join(said.split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(entry())
