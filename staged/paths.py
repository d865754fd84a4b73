"""One parser for every relative path, whoever wrote it: a user, a record, a listing of our own staging.

A path is relative, POSIX, in parts that every common file system takes. What passes here can be joined to a root without
leaving it (symbolic links are the drivers' care).
"""

from __future__ import annotations

import re
import unicodedata

from staged.errors import InvalidPath

__all__ = ["MAX_PART", "MAX_PATH", "RESERVED", "fold", "join", "parents", "parse", "parse_prefix"]

RESERVED = "_staged"
"""The name of the control area, in the target's parent or in the target."""

MAX_PART = 255
"""Bytes of one part in UTF-8: the limit of ext4, xfs, NTFS and APFS."""

MAX_PATH = 1000
"""Bytes of a whole relative path in UTF-8: leaves room for a prefix within S3's 1,024."""

# A part holds no control character, none of \ : < > " | ? *, and does not end in a dot or a space.
_PART = r'[^\x00-\x1f\x7f-\x9f/\\:<>"|?*]*[^\x00-\x1f\x7f-\x9f/\\:<>"|?*. ]'
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\..*)?", re.IGNORECASE)
# One look at the whole path tells whether a part could be a device name or the reserved one.
_SUSPECT = re.compile(r"(?:^|/)(?:con|prn|aux|nul|com|lpt|_staged)", re.IGNORECASE)


def parse(path: str) -> str:
    """Check a relative path and return it.

    Args:
        path: Such as `"year=2026/part-0.parquet"`.

    Raises:
        InvalidPath: It is empty, absolute, has a part that some common file system refuses or folds away (`.`, `..`, an
            empty part, a backslash, a colon, a control character, a trailing dot or space, a Windows device name, over
            255 bytes), has the reserved part `_staged`, or is over 1,000 bytes.
    """
    if not isinstance(path, str):
        raise InvalidPath(f"A path is a str, not {type(path).__name__}.")
    if _PATH.fullmatch(path) is None:
        raise InvalidPath(f"{path!r} is not a relative POSIX path of plain names. {_why(path)}")
    if len(path) > MAX_PART or not path.isascii():
        _check_length(path)
    if _SUSPECT.search(path) is not None:
        for part in path.split("/"):
            if part.casefold() == RESERVED:
                raise InvalidPath(f"{path!r} uses the reserved name {RESERVED!r}.")
            if _DEVICE.fullmatch(part):
                raise InvalidPath(f"{path!r} has the part {part!r}, a device name on Windows.")
    if not path.isascii() and RESERVED in fold(path).split("/"):
        raise InvalidPath(f"{path!r} reads as the reserved name {RESERVED!r}.")
    # Records take no subclasses: numpy's str among others.
    return path if type(path) is str else str.__str__(path)


def parse_prefix(prefix: str) -> str:
    """Check a directory below a target; the empty string is the target itself."""
    return parse(prefix) if prefix else prefix


def fold(path: str) -> str:
    """The form under which a store that folds case and Unicode sees a path; equal forms collide there."""
    if path.isascii():
        return path.lower()
    return "/".join(map(_fold_part, path.split("/")))


def _fold_part(part: str) -> str:
    # NFKC makes "c/o" of one character: on every store it is part of one name all the same.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold()).replace("/", "\uff0f")


def leads_out(path: str) -> bool:
    """Whether a name that a listing found is none that could be written down and removed later."""
    return any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path


def parents(path: str) -> list[str]:
    """Every directory above a path within the target, the nearest first; not the target itself."""
    found = []
    while (at := path.rfind("/")) >= 0:
        path = path[:at]
        found.append(path)
    return found


def join(prefix: str, path: str) -> str:
    """A prefix and a path; either may be empty."""
    return f"{prefix}/{path}" if prefix and path else prefix or path


def _check_length(path: str) -> None:
    try:
        encoded = path.encode()
    except UnicodeEncodeError as error:
        raise InvalidPath(f"{path!r} cannot be written as UTF-8.") from error
    if len(encoded) > MAX_PATH:
        raise InvalidPath(f"{path[:60]!r}… has {len(encoded)} bytes; a path has at most {MAX_PATH}.")
    for part in encoded.split(b"/"):
        if len(part) > MAX_PART:
            raise InvalidPath(f"{path[:60]!r}… has a part of {len(part)} bytes; a part has at most {MAX_PART}.")


def _why(path: str) -> str:
    if not path:
        return "It is empty."
    if path.startswith("/"):
        return "It is absolute."
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"It has the part {part!r}."
        if part[-1] in ". ":
            return f"The part {part!r} ends in a dot or a space."
    return 'It holds a control character or one of \\ : < > " | ? *.'
