"""What names a target: a path, or a URL; no message shows the latter, which may hold a credential."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

from staged.errors import InvalidInput, Unsupported

__all__ = ["local_path", "split"]


def split(target: str | os.PathLike[str]) -> tuple[str, str]:
    """A URL's scheme in small letters and what follows it; no scheme, and all of it, for a path.

    What follows `file://` is the path that it stands for, without its percent signs.

    Raises:
        InvalidInput: It is neither, or a file URL of another form than `file:///lake/flights`.
        Unsupported: It is a URL of no known form.
    """
    text = os.fspath(target)
    if not isinstance(text, str):
        raise InvalidInput("A target is a str, a path or a driver.")
    scheme, found, rest = text.partition("://")
    if text[:5].lower() == "file:":
        if len(scheme) > 4 or not rest.startswith("/"):
            raise InvalidInput("A file URL names an absolute path and no host: file:///lake/flights.")
        return "file", os.fsdecode(unquote_to_bytes(os.fsencode(rest)))
    if not found or "/" in scheme:
        return "", text
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) is None:
        raise Unsupported("There is no driver for a URL of that form.")
    return scheme.lower(), rest


def local_path(target: str | os.PathLike[str]) -> str:
    """The path of a local directory, however it is named.

    Raises:
        InvalidInput: It is the URL of another store.
    """
    scheme, path = split(target)
    if scheme not in ("", "file"):
        raise InvalidInput("A local directory is a path, or a URL such as file:///lake/flights.")
    return os.path.expanduser(path)
