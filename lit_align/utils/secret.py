"""Find secrets in configurations by key and by shape, and keep them out of everything that is written.

Give a secret as `${VAR}`: files hold the reference, and the value is filled in where it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

REDACTED = "<redacted>"
WAY_OUT = "write ${NAME} for it and set the environment variable NAME"

# Keys that hold secrets, in snake case.
_KEY = re.compile(
    r"(?:^|_)(?:api_?key|access_?key(?:_id)?|account_key|secret(?:_key)?|client_secret|private_?key|passw(?:or)?d|"
    r"passphrase|pwd|authorization|auth|cookies?|credentials?|connection_string|dsn|sig|signature|bearer)$"
    r"|^(?:(?:hf|hub|api|auth|access|bearer|secret|refresh|session|security|id|sas|wandb|use_auth|x_auth|csrf|x_csrf)_)*"
    r"token$|security_token$"
)
# Also secret as keys in a URL query or in fsspec options.
_SHORT = {"key", "code", "secret", "token", "sid", "session", "apikey"}
# Headers that are never secret; any other header may be.
_PLAIN_HEADERS = {"accept", "cache_control", "connection", "content_type", "host", "user_agent", "origin", "referer"}
# Scheme words before a secret, not secret themselves.
_SCHEMES = re.compile(r"\b(?:bearer|basic|token|digest|api-?key|key|negotiate)\b", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{\w+\}|\$\w+")
_USER = re.compile(
    r"(?P<scheme>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,30}:(?P<slashes>/{1,2}))(?P<user>[^\s/?#\"'<>]*)@", re.IGNORECASE
)
_QUERY = re.compile(r"(?P<name>[?&;#]([\w.-]+)=)(?P<value>[^&;#\s\"']+)")
# Schemes whose user name is only secret together with a password.
_LOGINS = ("ssh://", "git://", "git+ssh://", "sftp://", "hdfs://")
# API keys of well-known services, in any text.
_SHAPES = re.compile(
    r"(?<![\w-])(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}|(?<=[Bb]asic )[A-Za-z0-9+/=]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)


def redacted(value: Any, key: str = "") -> Any:
    """Replace literal secrets in a value; references such as `${VAR}` stay.

    Args:
        value: nested mappings and lists; only strings and numbers in them can be replaced.
        key: dotted key of the value.
    """
    return _redacted(value, _context(key, "") if key else "")


def redact_text(text: object) -> str:
    """Redact passwords in URLs and API keys of well-known shape in a log line or an error."""
    return _in_text(str(text))


def found(value: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys whose values hold a literal secret."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from found(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and not isinstance(redacted(value, key), str):
        for number, item in enumerate(value):
            yield from found(item, f"{key}.{number}")
    elif redacted(value, key) != value:
        yield key


def warn_of(value: Any, where: str = "") -> None:
    """Warn about literal secrets in a configuration, and name the way out.

    Args:
        value: the configuration.
        where: name of the file or stage, for the warning.
    """
    if keys := list(found(value)):
        warnings.warn(
            f"{where}{', '.join(keys)}: the configuration holds a secret; files and logs of the run leave it out. "
            f"Better: {WAY_OUT}",
            stacklevel=2,
        )


@contextlib.contextmanager
def without(path: Path, content: Any) -> Iterator[Path]:
    """Write YAML without its literal secrets.

    Args:
        path: the file to keep.
        content: mappings and lists.

    Yields:
        A file with the whole content: `path` itself if nothing was left out, otherwise a private file beside it, which
        is removed at the end.
    """
    kept = redacted(content)
    write_private(path, yaml.safe_dump(kept, sort_keys=False), private=kept != content)
    if kept == content:
        yield path
        return
    for left in path.parent.glob(f".{path.stem}-*{path.suffix}"):  # by a process that was killed
        left.unlink(missing_ok=True)
    whole = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write_private(whole, yaml.safe_dump(content, sort_keys=False))
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def write_private(path: Path, text: str, private: bool = True) -> None:
    """Write a file with mode 0600 if it is private, replacing an existing one."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "w") as file:
        file.write(text)


def _redacted(value: Any, context: str) -> Any:
    """Redact a value; `context` comes from its keys: "", "headers", "options" (of fsspec) or "secret"."""
    if isinstance(value, Mapping):
        return {name: _redacted(item, _context(str(name), context)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_redacted(item, context) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if context == "secret":
        given = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        return REDACTED if given and _literal(str(value)) else value
    if not isinstance(value, str):
        return value
    if context == "headers":  # a list of "Name: value", or YAML on the command line
        name, colon, content = value.partition(":")
        hidden = not colon or _context(name, context) == "secret"
        return REDACTED if hidden and _literal(content if colon else value) else value
    return _nested(value) or _in_text(value)


def _context(key: str, outside: str) -> str:
    for part in key.split("."):
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower().replace("-", "_")
        if outside == "secret" or _KEY.search(name):
            return "secret"
        if outside == "headers" and not part.isdecimal():
            return "" if name in _PLAIN_HEADERS or name.startswith("accept_") else "secret"
        if outside == "options" and name in _SHORT:
            return "secret"
        if re.search(r"(?:^|_)headers?$", name):
            outside = "headers"
        elif name == "storage_options":
            outside = "options"
    return outside


def _literal(text: str) -> bool:
    """True if a text holds more than references and a scheme word."""
    return bool(re.search(r"\w", _SCHEMES.sub("", _REFERENCE.sub("", text.replace(REDACTED, "")))))


def _in_text(text: str) -> str:
    def user(match: re.Match[str]) -> str:
        # A path object collapses the slashes of a URL to one; without a password such a text is a path.
        plain = match["scheme"].lower() in _LOGINS or match["slashes"] == "/"
        login = ":" not in match["user"] and plain
        return match[0] if login or not _literal(match["user"]) else f"{match['scheme']}{REDACTED}@"

    def query(match: re.Match[str]) -> str:
        secret = _context(match[2], "options") == "secret" or match[2].lower().startswith("x-amz-cred")
        return f"{match['name']}{REDACTED}" if secret and _literal(match["value"]) else match[0]

    if ":/" in text:
        text = _QUERY.sub(query, _USER.sub(user, text))
    return _SHAPES.sub(REDACTED, text)


def _nested(text: str) -> str | None:
    """Redact YAML inside a string, as on the command line; None if it holds no secret."""
    if not text.lstrip().startswith(("{", "[")) or len(text) > 100_000:
        return None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    kept = _redacted(content, "") if isinstance(content, (dict, list)) else content
    return None if kept == content else json.dumps(kept)
