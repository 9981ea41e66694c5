"""A parser of arguments whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_align.config.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message} (see {self.prog} --help)")
