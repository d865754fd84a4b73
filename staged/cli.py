"""The `staged` command: load files into a store from a shell, look at a store, repair it.

click and rich are loaded on use, so that `main` can name the extra where they are missing. What the commands do comes
first, in functions that know nothing of click; `commands` gives them their options.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import anyio
import msgspec
from anyio import to_thread

from staged import paths, urls
from staged.errors import Busy, CommitIncomplete, InvalidInput, StagedError, StorageError
from staged.lifecycle import Transaction
from staged.model import (
    Decided,
    Event,
    Mode,
    Outcome,
    Prepared,
    Receipt,
    Recovered,
    Resolve,
    Staged,
    Status,
    TransactionStatus,
    TxState,
)
from staged.observers import Observer
from staged.states import Phase
from staged.store import Store, open_store

if TYPE_CHECKING:
    import click
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

__all__ = ["commands", "main", "parse_duration", "receipt_table", "status_table"]

T = TypeVar("T")

_ERROR, _UNKNOWN, _INCOMPLETE, _BUSY, _INTERRUPTED = 1, 3, 4, 5, 130

_EXIT_CODES = (
    ("0", "done"),
    ("1", "an error; the target is untouched, unless only the output could not be written"),
    ("2", "wrong usage"),
    ("3", "the outcome is unknown: ask `staged outcome`, or `staged recover`"),
    (
        "4",
        "committed, but not complete, or blocked, by this or an earlier command: `staged recover`; or a damaged record",
    ),
    ("5", "busy: another process holds it; try again"),
    ("130", "Ctrl-C; rolled back"),
)

_ERRORS = (
    "An error is one message on stderr; with --json, and but for wrong usage, one JSON object there with error, message, "
    "outcome and transaction."
)

# What the library says to those who call it, as those say who use the command.
_IN_SHELL_WORDS = {
    r'recover\(resolve="(keep|replace)"\)': r"`staged recover --resolve \1`",
    r"recover\(\)": "`staged recover`",
    r"gc\(\)": "`staged gc`",
    r"store\.outcome\('(\w+)'\)": r"`staged outcome URL \1`",
    r"its own store, such as store\.child\(…\)": "its own URL",
    r"allow_empty=True": "--allow-empty",
    r"partitions=": "--partition",
}

# A message that says so already.
_SAYS_UNTOUCHED = re.compile(r"untouched|changed nothing|Nothing was (?:begun|changed)")

# Files of one `put` that are staged at once: enough to hide latency, few enough to bound memory and open files.
_TASKS = 8

_CHUNK = 1 << 20

# Columns of a terminal from which on a progress bar also tells the speed.
_WIDE = 72

_NOBODY = "nobody has written here"

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def main() -> None:
    """Run the `staged` command; ends the process with one of the codes that `staged --help` lists."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as missing:
        print(f"The staged command needs {missing.name}: pip install 'staged[cli]'", file=sys.stderr)
        sys.exit(_ERROR)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    commands()(prog_name="staged")


def parse_duration(text: str) -> timedelta:
    """A length of time as a user writes it: `0`, `30s`, `15m`, `12h`, `7d`; a bare number is seconds.

    Raises:
        ValueError: It is written otherwise, or is too long.
    """
    found = re.fullmatch(r"([0-9]+)([smhd]?)", text)
    if found is None:
        raise ValueError(f"{text!r} is not a duration such as 0, 30s, 15m, 12h or 7d.")
    try:
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])
    except OverflowError:
        raise ValueError(f"{text!r} is too long a duration.") from None


# ------------------------------------------------------------------------------------------------------------------ put


@dataclass(frozen=True, slots=True)
class _File:
    """One local file, and the path that it gets in the target."""

    path: str
    source: str
    size: int


@dataclass(frozen=True, slots=True)
class _Load:
    """What `put` was asked for."""

    sources: tuple[str, ...]
    at: _At
    mode: Mode
    key: str | None
    partitions: tuple[str, ...] | None
    allow_empty: bool
    durability: str | None
    lock_timeout: float


async def _put(load: _Load, opened: list[Transaction]) -> Receipt:
    """Load the sources in one transaction, which is left in `opened` for whoever must say how it ended."""
    files = await to_thread.run_sync(_collect, load.sources)
    options: dict[str, object] = {} if load.durability is None else {"durability": load.durability}
    with _bar(files) as (observer, count):
        async with load.at.open(observers=[observer], **options) as store:
            async with store.staged_write(
                load.mode,
                key=load.key,
                partitions=load.partitions,
                allow_empty=load.allow_empty,
                lock_timeout=load.lock_timeout,
            ) as tx:
                opened.append(tx)
                if not (tx.done or tx.skipped):
                    await _stage(tx, files, count)
            return tx.receipt


async def _stage(tx: Transaction, files: Sequence[_File], count: Callable[[int], None]) -> None:
    """Stage a few files at a time; the first error is raised as itself, and the others' writes are discarded."""
    waiting = iter(files)

    async def work() -> None:
        for file in waiting:
            try:
                async with aclosing(_read(file.source, count)) as chunks:
                    await tx.put_stream(file.path, chunks)
            except OSError as error:
                error.filename = error.filename or file.source  # a read does not know it
                raise

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(min(_TASKS, len(files))):
                tasks.start_soon(work)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _read(source: str, count: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """A file piece by piece, each of which is counted when it was taken."""
    async with await anyio.open_file(source, "rb") as file:
        while chunk := await file.read(_CHUNK):
            yield chunk
            count(len(chunk))


def _collect(sources: Iterable[str]) -> list[_File]:
    """Every file that the sources name: a file under its name, a directory's files under their paths within it."""
    found: dict[str, _File] = {}
    for source in sources:
        for path, file in _walk(source):
            info = os.stat(file)
            if not stat.S_ISREG(info.st_mode):
                # A pipe would be waited for, and a device never ends.
                raise InvalidInput(f"{file!r} is not a regular file. Nothing was begun.")
            if (twin := found.get(paths.parse(path))) is not None:
                raise InvalidInput(f"{twin.source!r} and {file!r} would both become {path!r}. Nothing was begun.")
            found[path] = _File(path, file, info.st_size)
    return list(found.values())


def _walk(source: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(source):
        yield os.path.basename(os.path.abspath(source)), source
        return
    for directory, below, names in os.walk(source, onerror=_raise):
        for name in below:
            if os.path.islink(os.path.join(directory, name)):
                # Following it could leave the source or run in circles, and to pass over it would lose files silently.
                raise InvalidInput(
                    f"{os.path.join(directory, name)!r} is a symbolic link to a directory; name the directory itself "
                    "as a source. Nothing was begun."
                )
        below.sort()
        for name in sorted(names):
            file = os.path.join(directory, name)
            yield os.path.relpath(file, source).replace(os.sep, "/"), file


def _raise(error: OSError) -> NoReturn:
    raise error


@contextmanager
def _bar(files: Sequence[_File]) -> Iterator[tuple[Observer, Callable[[int], None]]]:
    """A progress bar on stderr, where that is a terminal: an observer for it, and what counts its bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = _console(stderr=True)
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn(f"{{task.fields[files]}}/{len(files)} files", markup=False),
        DownloadColumn(),
        *([TransferSpeedColumn()] if console.width >= _WIDE else []),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("staging", total=sum(file.size for file in files), files=0)
        staged = 0

        def observe(event: Event) -> None:
            nonlocal staged
            match event:
                case Staged():
                    staged += 1
                    progress.update(task, files=staged)
                case Prepared():
                    progress.update(task, description="committing")
                case Decided():
                    progress.update(task, description="publishing")

        yield observe, lambda size: progress.advance(task, size)


# ------------------------------------------------------------------------------------------------ looking and repairing


@dataclass(frozen=True, slots=True)
class _At:
    """A target as the command line names it: its URL, and where its control area lies if that is another place."""

    url: str
    staging: str | None = None

    def open(self, **options: Any) -> Store:
        """A store that outlives the command."""
        if urls.split(self.url)[0] == "memory":
            raise InvalidInput("What memory:// holds is gone with its process: the command needs another store.")
        if self.staging is not None:
            options["staging"] = self.staging
        return open_store(self.url, **options)


async def _status(at: _At) -> Status:
    async with at.open() as store:
        return await store.status()


async def _outcome(at: _At, id: str) -> Outcome:
    async with at.open() as store:
        return await store.outcome(id)


async def _recover(at: _At, resolve: Resolve | None) -> tuple[Recovered, bool]:
    """What was done, and whether nobody had ever written there: a URL with a slip in it looks like that."""
    async with at.open() as store:
        is_new = _is_new(await store.status())
        return await store.recover(resolve=resolve), is_new


async def _recover_all(root: str, resolve: Resolve | None) -> list[tuple[str, Recovered | StagedError]]:
    """Recover every target at or below a local directory; one that fails does not keep the others from it."""
    done: list[tuple[str, Recovered | StagedError]] = []
    for target in await to_thread.run_sync(_find_targets, root):
        try:
            recovered, _ = await _recover(_At(target), resolve)
            done.append((target, recovered))
        except StagedError as error:
            done.append((target, error))
    return done


def _find_targets(root: str) -> list[str]:
    """Every local target at or below a directory that has a control area: beside it, or within it."""
    root = os.path.abspath(root)
    parent, name = os.path.split(root)
    found = [root] if _is_control(os.path.join(parent, paths.RESERVED, name)) else []
    for directory, below, _ in os.walk(root, onerror=_raise):
        if paths.RESERVED not in below:
            continue
        # Never descended into: what lies there is nobody's target.
        below.remove(paths.RESERVED)
        area = os.path.join(directory, paths.RESERVED)
        names = [name for name in os.listdir(area) if _is_control(os.path.join(area, name))]
        # Under the reserved name once more lies the control area of the directory itself.
        found += [directory if name == paths.RESERVED else os.path.join(directory, name) for name in names]
    return sorted(set(found))


def _is_control(directory: str) -> bool:
    """A head lies there, or the record of a transaction that began before there was one."""
    head, transactions = (_mode(os.path.join(directory, name)) for name in ("head", "tx"))
    return stat.S_ISREG(head) or stat.S_ISDIR(transactions)


def _mode(path: str) -> int:
    """What lies there: nothing is 0, and what is closed to this user a file, so that its recovery says so."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        return stat.S_IFREG
    except OSError:
        return 0


async def _gc(at: _At, older_than: timedelta) -> tuple[Recovered, bool]:
    """What was done, and whether nobody had ever written there."""
    async with at.open() as store:
        is_new = _is_new(await store.status())
        return await store.gc(older_than=older_than), is_new


# ------------------------------------------------------------------------------------------------------------- printing


def receipt_table(receipt: Receipt) -> Table:
    """A receipt, for people."""
    phases = {
        "done": "done before, under the same key",
        "skipped": "skipped: the target is not empty",
        "committing": "committed, not complete",
        "rolled_back": "rolled back",
    }
    return _facts(
        {
            "transaction": receipt.id,
            "mode": receipt.mode.value,
            "phase": phases.get(receipt.phase, receipt.phase),
            "key": receipt.key,
            "files": f"{receipt.files:,}",
            "rows": None if receipt.rows is None else f"{receipt.rows:,}",
            "bytes": f"{receipt.bytes:,}",
            "removed": "the old tree" if receipt.removed is None else f"{receipt.removed:,}",
            "left in place": f"{receipt.left:,}" if receipt.left else None,
            "staged in": _seconds(receipt.staging_seconds),
            "committed in": _seconds(receipt.commit_seconds) if receipt.phase == "committed" else None,
        }
    )


def status_table(status: Status) -> RenderableType:
    """The status of a store, for people."""
    from rich.console import Group

    last = status.last
    facts = _facts(
        {
            "head": status.head.value,
            "epoch": f"{status.epoch:,}",
            "committing": _committing(status),
            "commits": f"{status.commits:,}",
            "last commit": None if last is None else last.transaction + (f", key {last.key}" if last.key else ""),
            "not ended": f"{len(status.transactions):,}",
            "dead": _dead(status),
            "damaged": ", ".join(status.damaged) or None,
            "": _NOBODY if _is_new(status) else None,
        }
    )
    return Group(facts, "", _transactions(status.transactions)) if status.transactions else facts


def _committing(status: Status) -> str | None:
    """The transaction that is decided, and who completes it."""
    if status.committing is None:
        return None
    alive = any(tx.alive for tx in status.transactions if tx.id == status.committing)
    return f"{status.committing}, {'its process is alive' if alive else 'to be completed by `staged recover`'}"


def _dead(status: Status) -> str | None:
    """How many transactions were not decided when their process died, and wait for nobody."""
    dead = sum(
        tx.alive is False and tx.id != status.committing and (tx.block or tx.state is not TxState.PREPARED)
        for tx in status.transactions
    )
    return f"{dead:,}, to be cleaned up by `staged recover`" if dead else None


def _is_new(status: Status) -> bool:
    return status.epoch == 0 and not status.transactions and not status.damaged


def _transactions(transactions: Sequence[TransactionStatus]) -> RenderableType:
    """A line for each, where the lines fit; else its facts one below the other."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table

    rows = [
        {
            "transaction": tx.id,
            "state": tx.state.value,
            "mode": tx.mode.value,
            # The last part of an owner tells apart the transactions of one process; the first two find the process.
            "by": tx.owner.rpartition(":")[0] or tx.owner,
            "alive": "?" if tx.alive is None else "yes" if tx.alive else "no",
            "age": _age(tx.age),
            "key": tx.key or None,
        }
        for tx in transactions
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in shown:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return _Fitting(Padding(table, (0, 1)), Group(*[part for row in rows for part in (_facts(row), "")][:-1]))


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A table where a console is wide enough to cut nothing off; elsewhere the same in another form."""

    wide: RenderableType
    narrow: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = console.measure(self.wide, options=options.update(max_width=10_000)).maximum
        yield self.wide if needed <= options.max_width else self.narrow


def _outcome_table(outcome: Outcome) -> Table:
    states = {
        "rolled_back": "rolled back",
        "committing": "decided, to be completed by `staged recover`",
        "unknown": "unknown: never begun here, or collected by `staged gc`",
    }
    facts = {
        "transaction": outcome.id,
        "state": states.get(outcome.state, outcome.state),
        "epoch": None if outcome.epoch is None else f"{outcome.epoch:,}",
        "previous": outcome.previous,
    }
    if (receipt := outcome.receipt) is not None:
        facts |= {
            "mode": receipt.mode.value,
            "key": receipt.key,
            "files": f"{receipt.files:,}",
            "rows": None if receipt.rows is None else f"{receipt.rows:,}",
            "bytes": f"{receipt.bytes:,}",
            "left in place": f"{receipt.left:,}" if receipt.left else None,
        }
    return _facts(facts)


def _recovered_table(recovered: Recovered, target: str | None = None, *, is_new: bool = False) -> Table:
    return _facts(
        {
            "target": target,
            "finished": ", ".join(recovered.finished) or "none",
            "rolled back": ", ".join(recovered.rolled_back) or "none",
            "prepared": ", ".join(recovered.prepared) or None,
            "alive": ", ".join(recovered.alive) or None,
            "damaged": ", ".join(recovered.damaged) or None,
            "collected": f"{recovered.collected:,}" if recovered.collected else None,
            "": _NOBODY if is_new else None,
        }
    )


def _facts(facts: dict[str, str | None]) -> Table:
    """Names and values; what is not known or not there is left out."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, show_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, value)
    return table


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit in ("d", "h", "m"):
        if seconds >= _UNITS[unit]:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{int(seconds)}s"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # Paths, keys and messages are shown as they are, whatever brackets and colons they hold.
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def _show(value: object, table: Callable[[], RenderableType], as_json: bool) -> None:
    with _output(as_json):
        if as_json:
            print(msgspec.json.encode(value).decode())
        else:
            _console().print(table())


@contextmanager
def _output(as_json: bool) -> Iterator[None]:
    """What is printed within is written at its end; where it cannot be, one message says so."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # click ends quietly then
    except OSError as error:
        # Else the interpreter would try to write it again, and complain of it once more.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        message = f"The output could not be written: {error.strerror or error}. What the command did is done."
        _complain("OSError", message, "unknown", None, as_json)
        sys.exit(_ERROR)


# -------------------------------------------------------------------------------------------------------------- the end


def _run(work: Callable[[], Awaitable[T]], as_json: bool, opened: Sequence[Transaction] = ()) -> T:
    """Run a command to its end; whatever fails ends the process with one message and its code."""
    try:
        return anyio.run(work)
    except KeyboardInterrupt:
        _interrupted(as_json, opened)
    except (StagedError, OSError) as error:
        sys.exit(_report(error, as_json))


def _report(error: StagedError | OSError, as_json: bool, where: str | None = None) -> int:
    """Say on stderr what went wrong, at which of many targets; returns the exit code."""
    message = "\n".join([f"{where}: {error}" if where else str(error), *getattr(error, "__notes__", ())])
    for python, shell in _IN_SHELL_WORDS.items():
        message = re.sub(python, shell, message)
    # The only files that commands touch by themselves are the sources of a load, before its commit.
    outcome = error.outcome if isinstance(error, StagedError) and not _is_refused(error) else "untouched"
    tx = error.transaction if isinstance(error, StagedError) else None
    if outcome == "untouched" and (tx or isinstance(error, OSError)) and not _SAYS_UNTOUCHED.search(message):
        message += f"{'' if message.endswith('.') else '.'} The target is untouched."
    if isinstance(error, Busy):
        message += " Try again later."
    _complain(type(error).__name__, message, outcome, tx, as_json)
    return _code(error) if isinstance(error, StagedError) else _ERROR


def _code(error: StagedError) -> int:
    if isinstance(error, Busy):
        return _BUSY
    if _is_refused(error):
        return _ERROR
    if isinstance(error.__cause__, CommitIncomplete):
        return _INCOMPLETE  # another's, which must be completed first
    return {"untouched": _ERROR, "committed": _INCOMPLETE, "unknown": _UNKNOWN}[error.outcome]


def _is_refused(error: StagedError) -> bool:
    """This user may not look or repair there; of a commit that was under way nothing is in doubt."""
    return type(error) is StorageError and isinstance(error.__cause__, PermissionError)


def _damage(recovered: Recovered, as_json: bool, where: str | None = None) -> int:
    """Say on stderr which records could not be read, if any; returns the exit code."""
    if not recovered.damaged:
        return 0
    ids = ", ".join(recovered.damaged)
    message = f"{where}: " if where else ""
    message += f"The records of these transactions are damaged, and nothing was done with them: {ids}. Restore them."
    _complain("DamagedRecord", message, "unknown", recovered.damaged[0], as_json)
    return _INCOMPLETE


def _interrupted(as_json: bool, opened: Sequence[Transaction]) -> NoReturn:
    """After Ctrl-C: what it came to, which is a commit where that was decided already."""
    tx = opened[0] if opened else None
    if tx is None:
        _complain("Interrupted", "Interrupted.", "untouched", None, as_json)
        sys.exit(_INTERRUPTED)
    if tx.phase is Phase.ROLLED_BACK:
        message = f"Interrupted: transaction {tx.id} was rolled back, the target is untouched."
        _complain("Interrupted", message, "untouched", tx.id, as_json)
        sys.exit(_INTERRUPTED)
    if tx.phase is Phase.COMMITTED:
        print("Interrupted after the decision: the commit was completed.", file=sys.stderr)
        _show(tx.receipt, lambda: receipt_table(tx.receipt), as_json)
        sys.exit(0)
    if tx.phase is Phase.INCOMPLETE:
        message = f"Interrupted: transaction {tx.id} is committed, but not complete; `staged recover` completes it."
        _complain("Interrupted", message, "committed", tx.id, as_json)
        sys.exit(_INCOMPLETE)
    message = f"Interrupted: how transaction {tx.id} ended is not known; ask `staged outcome URL {tx.id}`, or `staged recover`."
    _complain("Interrupted", message, "unknown", tx.id, as_json)
    sys.exit(_UNKNOWN)


def _complain(error: str, message: str, outcome: str, transaction: str | None, as_json: bool) -> None:
    if as_json:
        fault = {"error": error, "message": message, "outcome": outcome, "transaction": transaction}
        print(msgspec.json.encode(fault).decode(), file=sys.stderr)
    else:
        console = _console(stderr=True)
        # Wrapped between words for people; one line for whoever collects it.
        console.print(message if error == "Interrupted" else f"Error: {message}", soft_wrap=not console.is_terminal)


# --------------------------------------------------------------------------------------------------------- the commands


def commands() -> click.Group:
    """The click group behind `staged`; needs click and rich (extra `cli`)."""
    import click

    def duration(context: click.Context, parameter: click.Parameter, value: str) -> timedelta:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    class Source(click.Path):
        """A local path; a URL given in its place is not echoed, since it may hold a credential."""

        def convert(
            self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
        ) -> str | bytes | os.PathLike[str]:
            if "://" in os.fspath(value):
                self.fail("A source is a local file or directory, not a URL.", param, ctx)
            return super().convert(value, param, ctx)

    url = click.argument("url")
    staging_option = click.option(
        "--staging", metavar="DIR", help="Where the target's control area lies, if its writers chose another place."
    )
    json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")

    class Commands(click.Group):
        """Whose help cuts nothing off, however narrow the terminal is."""

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl(
                    [(name, command.get_short_help_str(1_000)) for name, command in self.commands.items()]
                )

        def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Exit codes"):
                formatter.write_dl(_EXIT_CODES)
            formatter.write_paragraph()
            formatter.write_text(_ERRORS)

        def invoke(self, ctx: click.Context) -> Any:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                _interrupted(False, ())

    @click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(package_name="staged", message="%(prog)s %(version)s")
    def staged() -> None:
        """Make a set of files appear in a directory or a bucket, all at once or not at all.

        URL is a directory, such as /lake/flights, or the URL of another store.
        """

    @staged.command()
    @click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=Source(exists=True))
    @url
    @click.option(
        "--mode",
        required=True,
        type=click.Choice([*(mode.value for mode in Mode), "overwrite"]),
        metavar="MODE",
        help=f"What the commit does to the target: {', '.join(Mode)} or overwrite, which is full_drop.",
    )
    @click.option("--key", help="Names the work: a key that was committed before makes it do nothing.")
    @click.option(
        "--partition",
        "partitions",
        multiple=True,
        metavar="P",
        help="A directory to replace, with mode overwrite_partitions; repeatable. By default those that receive files.",
    )
    @click.option("--allow-empty", is_flag=True, help="Let a replacing mode remove everything, with nothing staged.")
    @click.option(
        "--durability",
        type=click.Choice(["full", "none"]),
        help="Whether what the decision rests on is synced; full by default.",
    )
    @click.option(
        "--lock-timeout",
        default="60s",
        show_default=True,
        metavar="DURATION",
        callback=duration,
        help="How long to wait for another writer's commit.",
    )
    @staging_option
    @json_option
    def put(
        sources: tuple[str, ...],
        url: str,
        mode: str,
        key: str | None,
        partitions: tuple[str, ...],
        allow_empty: bool,
        durability: str | None,
        lock_timeout: timedelta,
        staging: str | None,
        as_json: bool,
    ) -> None:
        """Load files and directories into a store, all or nothing.

        A file is put under its name; the files of a directory keep their paths relative to it.
        """
        seconds = lock_timeout.total_seconds()
        load = _Load(
            sources, _At(url, staging), Mode.parse(mode), key, partitions or None, allow_empty, durability, seconds
        )
        opened: list[Transaction] = []
        receipt = _run(lambda: _put(load, opened), as_json, opened)
        _show(receipt, lambda: receipt_table(receipt), as_json)

    @staged.command()
    @url
    @staging_option
    @json_option
    def status(url: str, staging: str | None, as_json: bool) -> None:
        """Show the state of a target; changes nothing.

        Every transaction that has not ended is listed.
        """
        found = _run(lambda: _status(_At(url, staging)), as_json)
        _show(found, lambda: status_table(found), as_json)

    @staged.command()
    @url
    @click.argument("id")
    @staging_option
    @json_option
    def outcome(url: str, id: str, staging: str | None, as_json: bool) -> None:
        """Show how a transaction ended, or stands.

        This changes nothing. The exit code is 0 where that is known, whatever it is, and 3 where the store has no trace
        of it.
        """
        found = _run(lambda: _outcome(_At(url, staging), id), as_json)
        _show(found, lambda: _outcome_table(found), as_json)
        sys.exit(_UNKNOWN if found.state == "unknown" else 0)

    @staged.command()
    @url
    @click.option(
        "--resolve",
        type=click.Choice(["keep", "replace"]),
        help="Where a foreign thing blocks a decided commit: keep that thing, or replace it.",
    )
    @click.option("--recursive", is_flag=True, help="Recover every target at or below a local directory.")
    @staging_option
    @json_option
    def recover(url: str, resolve: str | None, recursive: bool, staging: str | None, as_json: bool) -> None:
        """Finish or undo what a dead process left.

        What it decided is completed, what it left undecided is rolled back. Live transactions, and those that were
        prepared for others to resume, are left alone.

        With --recursive, one target that fails does not keep the others from it; the exit code is the first failure's.
        """
        chosen = cast("Resolve | None", resolve)
        if not recursive:
            done, is_new = _run(lambda: _recover(_At(url, staging), chosen), as_json)
            _show(done, lambda: _recovered_table(done, is_new=is_new), as_json)
            sys.exit(_damage(done, as_json))
        try:
            root = urls.local_path(url)
        except StagedError:
            raise click.UsageError("--recursive goes with a local directory, and URL is none.") from None
        if staging is not None:
            raise click.UsageError(
                "--recursive finds control areas beside their targets; --staging names one elsewhere."
            )
        if not os.path.isdir(root):
            raise click.UsageError(f"There is no such directory: {root!r}.")
        results = _run(lambda: _recover_all(root, chosen), as_json)
        recovered = [(target, result) for target, result in results if isinstance(result, Recovered)]
        with _output(as_json):
            if as_json:
                objects = [{"target": target, **msgspec.to_builtins(result)} for target, result in recovered]
                print(msgspec.json.encode({"targets": objects}).decode())
            else:
                for number, (target, result) in enumerate(recovered):
                    _console().print(*[""] * (number > 0), _recovered_table(result, target), sep="\n")
                if not results:
                    print(f"There is no target at or below {root}.")
        codes = [
            _damage(result, as_json, where) if isinstance(result, Recovered) else _report(result, as_json, where)
            for where, result in results
        ]
        sys.exit(next(filter(None, codes), 0))

    @staged.command()
    @url
    @click.option(
        "--older-than",
        default="7d",
        show_default=True,
        metavar="DURATION",
        callback=duration,
        help="The age at which something is old: 0, 30s, 15m, 12h, 7d.",
    )
    @staging_option
    @json_option
    def gc(url: str, older_than: timedelta, staging: str | None, as_json: bool) -> None:
        """Recover, then collect what is old.

        That is: abandoned and prepared transactions, outcomes, and trees put aside.
        """
        done, is_new = _run(lambda: _gc(_At(url, staging), older_than), as_json)
        _show(done, lambda: _recovered_table(done, is_new=is_new), as_json)
        sys.exit(_damage(done, as_json))

    @staged.command()
    @click.argument("directory", default="./lake", type=click.Path(file_okay=False))
    @json_option
    def demo(directory: str, as_json: bool) -> None:
        """Put the promises to the test on real data.

        The flights of 2013 are loaded into DIRECTORY (./lake by default), corrected while readers count, broken off and
        killed. DIRECTORY must be absent, empty, or an earlier demo's. The exit code is 0 where every promise held.
        """
        try:
            from staged import demo as show

            lines = _run(lambda: show.run(directory, _console(stderr=as_json)), as_json)
        except ModuleNotFoundError as missing:
            print(f"The demo needs {missing.name}: pip install 'staged[demo]'", file=sys.stderr)
            sys.exit(_ERROR)
        held = all(line.true for line in lines)
        _show({"ok": held, "lines": lines}, lambda: show.table(lines), as_json)
        sys.exit(0 if held else _ERROR)

    return staged
