"""What the one parser of relative paths lets through, and what it does not."""

# ruff: noqa: RUF001

from __future__ import annotations

import ntpath
import os
import posixpath
import random
import sys
import threading
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath

import anyio.to_thread
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from staged import open_store
from staged.errors import InvalidPath, StagedError
from staged.paths import MAX_PART, MAX_PATH, RESERVED, fold, join, parents, parse, parse_prefix

Figure = Callable[[str, str], None]

DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{at}{n}" for at in ("com", "lpt") for n in "123456789¹²³"),
}

# Why a part is refused -> such parts.
ENDS = "ends in a dot or a space"
HOLDS = "holds a control character or one of"
BAD: dict[str, list[str]] = {
    "has the part": ["", ".", ".."],
    ENDS: ["...", "a.", "a ", "a. .", " ", "name.txt ", ".. "],
    HOLDS: [
        *(f"a{chr(code)}b" for code in (*range(0x20), *range(0x7F, 0xA0))),
        *(f"a{sign}b" for sign in '\\:<>"|?*'),
        *["\0", "C:", "c:x", "a:stream", "\\\\host\\share", "..\\x", "\\x"],
    ],
    "device name on Windows": ["con", "PRN", "Aux.txt", "nul.tar.gz", "com1", "LPT9.log", "CONIN$", "conout$", "COM¹"],
    "reserved name": [RESERVED, "_STAGED", "_Staged", "_ſtaged"],
    "the reserved name": ["＿staged", "_ﬆaged", "_ⓢtaged", "＿ＳＴＡＧＥＤ", "_𝐬𝐭𝐚𝐠𝐞𝐝"],
    "cannot be written as UTF-8": ["\ud800", "a\udfffb", "\udcff.txt"],
    "has a part of 256 bytes": ["x" * 256, "é" * 128, "😀" * 64],
}
GOOD = [
    *["a", "part-0.parquet", "year=2026", "month=01", "_SUCCESS", "_delta_log", ".hidden", "..x", "a..b", "two words"],
    *[
        "ünïcode",
        "e\u0301",
        "日本",
        "Ελλάς",
        "😀",
        "x" * 255,
        "é" * 127,
        "content",
        "console",
        "auxiliary",
        "nul-0",
        "com10",
    ],
    *[
        "_stage",
        "_staged_",
        "staged",
        "x_staged",
        "con-1",
        "a'b",
        "50%",
        "~a",
        "-rf",
        "$x",
        "#",
        "&",
        "a;b",
        "{x}",
        "[0]",
    ],
]


def _escape(path: str) -> str | None:
    """How an accepted path could do harm after all; None where it cannot."""
    for form in (path, path.casefold(), *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))):
        if not posixpath.normpath(posixpath.join("/lake/t", form)).startswith("/lake/t/"):
            return "leaves a POSIX root"
        if not ntpath.normpath(ntpath.join("C:\\lake\\t", form)).startswith("C:\\lake\\t\\"):
            return "leaves a Windows root"
    if posixpath.normpath(path) != path:
        return "is not in its normal form"
    if len(path.encode()) > MAX_PATH or any(len(part.encode()) > MAX_PART for part in path.split("/")):
        return "is too long"
    for part in path.split("/"):
        if part.partition(".")[0].casefold() in DEVICES:
            return "is a device"
        if part != part.rstrip(". "):
            return "ends in what Windows takes away"
        if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in part):
            return "holds a control character"
    if any(RESERVED in form.split("/") for form in (path.casefold(), fold(path))):
        return "is reserved"
    return None


def _paths(count: int) -> list[str]:
    """Mostly sound parts, mixed with everything that is known to do harm, and with noise."""
    rng = random.Random(20261123)
    bad = [part for parts in BAD.values() for part in parts]
    signs = [
        *"abcXYZ019._-= /\\:*",
        "\0",
        "\x1f",
        "\x85",
        "\ud800",
        "é",
        "e\u0301",
        "＿",
        "ſ",
        "／",
        "．",
        "\u2028",
        "😀",
    ]
    found = []
    for _ in range(count):
        parts = rng.choices(GOOD, k=rng.randint(1, 6))
        for at in range(len(parts)):
            chance = rng.random()
            if chance < 0.1:
                parts[at] = rng.choice(bad)
            elif chance < 0.25:
                parts[at] = "".join(rng.choices(signs, k=rng.randint(1, 8)))
            elif chance < 0.27:
                parts[at] = "".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(3))
        path = "/".join(parts)
        found.append(rng.choice(["/", "//", "C:/", "~/", "./", "../"]) + path if rng.random() < 0.05 else path)
    return found


def test_what_is_accepted_stays_below_any_root_unchanged(figure: Figure) -> None:
    fuzzed = _paths(10_000)
    accepted, escapes = 0, []
    for path in fuzzed:
        try:
            found = parse(path)
        except InvalidPath:
            continue
        accepted += 1
        assert found == path
        assert parse(found) == path
        assert parse_prefix(path) == path
        if (harm := _escape(path)) is not None:
            escapes.append((path, harm))
    figure("paths", f"{len(fuzzed):,} fuzzed, {accepted:,} accepted, {len(escapes)} escapes")
    assert not escapes
    assert 2_000 < accepted < 8_000, "the fuzzer no longer mixes good and bad"


@pytest.mark.parametrize("beside", ["x", "é", "content"])
def test_a_bad_part_is_refused_wherever_it_stands_and_the_message_says_why(beside: str) -> None:
    wrong = []
    for why, parts in BAD.items():
        for part in parts:
            for path in (f"{beside}/{part}/{beside}", f"{beside}/{part}", f"{part}/{beside}", part):
                expected = why
                if not part and not path.startswith(beside):
                    expected = "is absolute" if path else "is empty"
                try:
                    parse(path)
                except InvalidPath as error:
                    if expected not in str(error):
                        wrong.append((path, str(error)))
                else:
                    wrong.append((path, "was accepted"))
    assert not wrong


@pytest.mark.parametrize("path", ["aux .txt", "x/NUL  .tar.gz", "com1 ."])
def test_a_device_name_before_spaces_and_a_dot_is_refused(path: str) -> None:
    # Windows looks at what is before the first dot, without trailing spaces.
    with pytest.raises(InvalidPath):
        parse(path)


def test_a_path_of_over_1000_bytes_is_refused() -> None:
    for part in ("x", "é"):
        name = part * (200 // len(part.encode()))
        longest = "/".join([name] * 4 + ["y" * (MAX_PATH - 4 * 201)])
        assert len(parse(longest).encode()) == MAX_PATH
        with pytest.raises(InvalidPath, match="has 1001 bytes; a path has at most 1000"):
            parse(longest + "y")


@pytest.mark.parametrize("path", [None, b"x", PurePosixPath("x"), 1])
def test_only_a_str_is_a_path(path: object) -> None:
    with pytest.raises(InvalidPath, match="A path is a str"):
        parse(path)  # type: ignore[arg-type]


def test_plain_names_are_accepted() -> None:
    for part in GOOD:
        for path in (part, f"{part}/x", f"x/{part}", f"year=2026/month=01/{part}"):
            assert parse(path) == path
    assert parse("year=2026/month=01/part-0.parquet") == "year=2026/month=01/part-0.parquet"
    assert parse_prefix("") == ""


LETTERS = st.text(st.characters(categories=("Lu", "Ll", "Lo", "Nd", "Mn")), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(LETTERS, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=4))
def test_letters_and_digits_of_any_script_with_spaces_inside_are_accepted(parts: list[str]) -> None:
    assume(not any(part.casefold() in DEVICES for part in parts))
    assert parse("/".join(parts)) == "/".join(parts)


def test_case_and_unicode_twins_of_every_character_fold_together() -> None:
    wrong = []
    for code in range(0x30000):  # the planes that have letters
        sign = chr(code)
        twins = {sign, sign.lower(), *(unicodedata.normalize(form, sign) for form in ("NFC", "NFD"))}
        if sign != "ı":  # the dotless i has the upper case of another letter
            twins.add(sign.upper())
        folded = {fold(twin) for twin in twins}
        if len(folded) > 1 or {fold(twin) for twin in folded} != folded:
            wrong.append(sign)
    assert not wrong


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20))
def test_twins_of_any_text_fold_together(text: str) -> None:
    assert fold(unicodedata.normalize("NFC", text)) == fold(unicodedata.normalize("NFD", text)) == fold(text)
    assert fold(text.lower()) == fold(text.casefold()) == fold(text)
    assert fold(fold(text)) == fold(text)


def test_names_that_are_not_twins_fold_apart() -> None:
    plain = "abcdefghijklmnopqrstuvwxyz0123456789-_=. /"
    assert fold(plain) == plain
    assert len({fold(name) for name in ("a", "b", "ä", "ab", "a/b", "a b", "é", "è")}) == 8


def test_folding_changes_no_directory() -> None:
    # "℅" is "c/o" in NFKC, but it is one name on every store.
    moved = [sign for sign in map(chr, range(0x30000)) if fold(sign).count("/") != sign.count("/")]
    assert not moved


@given(st.lists(st.sampled_from(["a", "b", "c d"]), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_parents_are_every_directory_above_the_nearest_first(parts: list[str]) -> None:
    path = "/".join(parts)
    assert parents(path) == ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    assert join("", path) == join(path, "") == path
    assert join(path, path) == "/".join(parts + parts)


# ------------------------------------------------------------------------------------------ links swapped in for directories

DIRECTORIES = [f"d{n}" for n in range(4)]
MODES = ["full_drop", "append", "overwrite_files", "overwrite_partitions"]


class Flipper(threading.Thread):
    """Puts a link to somewhere else in the place of a directory of the target or the staging, and takes it away again."""

    def __init__(self, target: Path, area: Path, outside: Path, limbo: Path) -> None:
        super().__init__()
        self._target, self._area, self._outside, self._limbo = target, area, outside, limbo
        self._lake = os.path.realpath(target.parent)
        self._chance = random.Random(20261123)
        self._done = threading.Event()
        self.flips = 0

    def run(self) -> None:
        while not self._done.is_set():
            place = self._chance.choice(self._places())
            away = str(self._limbo / str(self.flips))
            try:
                parent = os.open(place.parent, os.O_DIRECTORY)
            except OSError:
                continue
            try:
                # A link that the writer moved away with a tree is not followed: it is the writer who is looked at.
                if f"{os.readlink(f'/proc/self/fd/{parent}')}/".startswith(f"{self._lake}/"):
                    self._flip(parent, place.name, away)
            finally:
                os.close(parent)
            self._done.wait(self._chance.choice([0.0005, 0.02]))

    def _flip(self, parent: int, name: str, away: str) -> None:
        try:
            os.rename(name, away, src_dir_fd=parent)
            os.symlink(self._outside, name, dir_fd=parent)
        except OSError:
            with suppress(OSError):
                os.rename(away, name, dst_dir_fd=parent)
            return
        self.flips += 1
        self._done.wait(self._chance.choice([0, 0.0002, 0.001]))
        with suppress(OSError):  # the writer made it anew meanwhile
            os.unlink(name, dir_fd=parent)
            os.rename(away, name, dst_dir_fd=parent)

    def _places(self) -> list[Path]:
        transactions = [Path(entry.path) for entry in _scan(self._area / "tx")]
        trees = [tree for tx in transactions for tree in (tx / "tree", tx / "part")]
        inner = [self._chance.choice([self._target, *trees]) / self._chance.choice(DIRECTORIES) for _ in range(4)]
        return [self._target, *transactions, *trees, *inner, *(self._area / name for name in ("log", "outcome", "old"))]

    def stop(self) -> None:
        self._done.set()
        self.join()


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _mirror(outside: Path) -> None:
    """Somewhere else, with all the names under which something of ours could be written, replaced or removed."""
    inner = [*DIRECTORIES, "tree", "part", "old", "log", "outcome", "tx", "record"]
    for at in (outside, *(outside / name for name in inner), *(outside / "tree" / name for name in DIRECTORIES)):
        at.mkdir(parents=True, exist_ok=True)
        for name in ("0", "1", "2", "a", "_SUCCESS", "part-0.parquet", "kept"):
            (at / name).write_text("outside")


def _state(outside: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for path in (outside, *outside.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_size)
    return found


@pytest.mark.anyio
async def test_no_path_leads_out_while_links_take_the_places_of_directories(
    tmp_path: Path, anyio_backend: str, figure: Figure
) -> None:
    target, outside, limbo = tmp_path / "lake" / "target", tmp_path / "outside", tmp_path / "limbo"
    for directory in (target, limbo):
        directory.mkdir(parents=True)
    _mirror(outside)
    before = _state(outside)
    half = ("asyncio", "trio").index(anyio_backend)
    soak = int(os.environ.get("STAGED_SOAK", "1"))
    fuzzed = _paths(10_000 * soak)[half::2]
    store = open_store(target, durability="none")
    await store.capabilities()  # a link at the target itself is resolved once, and is none by now
    flipper = Flipper(target, tmp_path / "lake" / "_staged" / "target", outside, limbo)
    flipper.start()
    commits = refused = failed = 0
    try:
        for number, at in enumerate(range(0, len(fuzzed), 100)):
            try:
                async with store.staged_write(MODES[number % 4], lock_timeout=0) as tx:
                    for n, path in enumerate(fuzzed[at : at + 100]):
                        try:
                            await tx.write(f"{DIRECTORIES[n % 4]}/{n}/{path}", b"ours")
                        except InvalidPath:
                            refused += 1
                        except StagedError:
                            failed += 1  # the next may be luckier
                    if MODES[number % 4] == "full_drop":
                        await tx.write("d0/kept", b"ours", overwrite=True)
                    if MODES[number % 4] == "overwrite_files":
                        await tx.delete("d0/kept")
                commits += 1
            except StagedError:
                failed += 1
            try:
                await store.recover(resolve=("keep", "replace")[number % 2])  # type: ignore[arg-type]
                if number % 8 == 0:
                    await store.gc(older_than=timedelta(0))
            except StagedError:
                failed += 1
    finally:
        await anyio.to_thread.run_sync(flipper.stop)
    after = await anyio.to_thread.run_sync(_state, outside)
    both = {path: (before.get(path), after.get(path)) for path in before.keys() | after.keys()}
    escapes = {path: states for path, states in both.items() if states[0] != states[1]}
    figure(
        f"links in the places of directories, {anyio_backend}",
        f"{len(fuzzed):,} fuzzed paths ({refused:,} refused), {flipper.flips:,} links, {commits} commits, {failed} errors, "
        f"{len(escapes)} escapes",
    )
    assert not escapes
