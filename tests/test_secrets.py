"""A credential that a URL or an option carries is shown nowhere: not by us, and not by what we keep or print."""

from __future__ import annotations

import copy
import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from staged import StagedError
from staged import store as store_module
from staged.cli import commands
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.errors import InvalidInput, StorageError, Unsupported
from staged.store import Store, open_store
from staged.testing.faults import FaultDriver, Moment

Figure = Callable[[str, str], None]

SECRETS = {
    "password": "hunter2-9f3c",
    "signature": "c2lnbmF0dXJl9f3c",
    "token": "eyJhbGciOi9f3c",
    "account key": "YWNjb3VudGtleQ9f3c",
}
URL = f"vault://user:{SECRETS['password']}@host/lake/target?sv=2026&sig={SECRETS['signature']}"
OPTIONS = {"credential": SECRETS["token"], "account_key": SECRETS["account key"]}


class VaultDriver(MemoryDriver):
    """A store with credentials in its URL and its options, as a cloud's driver has."""

    storages: ClassVar[dict[str, MemoryStorage]] = {}

    def __init__(self, url: str, *, credential: str | None = None, account_key: str | None = None) -> None:
        where, _, self._query = url.rpartition("@")[2].partition("?")
        self._user, self._credential, self._account_key = url.partition("@")[0], credential, account_key
        super().__init__(where, storage=self.storages.setdefault(where, MemoryStorage()))
        self.url = f"vault://{where}"

    def child(self, path: str) -> VaultDriver:
        whole = f"{self._user}@{self.url.removeprefix('vault://')}/{path}?{self._query}"
        return VaultDriver(whole, credential=self._credential, account_key=self._account_key)


class Seen:
    """Everything that was shown somewhere, and where."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def add(self, where: str, *things: object) -> None:
        for thing in things:
            text = thing.decode(errors="replace") if isinstance(thing, bytes) else thing
            self.texts.append((where, text if isinstance(text, str) else f"{text!r} {text!s}"))

    def error(self, where: str, error: BaseException) -> None:
        self.add(where, error, "".join(traceback.format_exception(error)), *getattr(error, "__notes__", ()))
        self.add(
            where, error.args, vars(error), traceback.TracebackException.from_exception(error, compact=True).__dict__
        )
        with suppress(Exception):
            self.add(where, pickle.dumps(error))

    def leaks(self) -> list[tuple[str, str]]:
        return [(where, name) for where, text in self.texts for name, secret in SECRETS.items() if secret in text]


@pytest.fixture(autouse=True)
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The driver is registered under its scheme, as those of the package are."""
    monkeypatch.setattr(store_module, "_DRIVERS", ((r"vault://", __name__, "VaultDriver", ""),))
    yield
    VaultDriver.storages.clear()


def attributes(thing: object) -> Iterator[object]:
    """What a debugger, or a log of an object, would show of it."""
    yield thing
    yield from (
        getattr(thing, name) for name in dir(thing) if not name.startswith("_") and not callable(getattr(thing, name))
    )


@pytest.mark.anyio
async def test_no_credential_is_shown_kept_or_sent(
    anyio_backend: str, logged: io.StringIO, figure: Figure, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = Seen()
    events: list[object] = []
    failing: list[str] = []
    fails: set[str] = set()

    async def gate(name: str, moment: Moment) -> None:
        if moment == "before" and name.partition(" ")[0] in fails:
            failing.append(name)
            raise StorageError(f"The store did not answer {name}.") from OSError(f"timeout at {driver.url}")

    store = open_store(URL, observers=[events.append], **OPTIONS)
    driver = store._driver
    seen.add("store", store, store.url, store.child("below"), *attributes(store))
    async with store:
        for mode in ("append", "overwrite_files", "overwrite_partitions", "full_drop"):
            async with store.staged_write(mode, meta={"watermark": 1}, key=mode) as tx:
                await tx.write(f"p=0/{mode}", b"ours")
                seen.add("transaction", *attributes(tx)) if tx.phase.name == "COMMITTED" else seen.add(
                    "transaction", tx
                )
                seen.add("plan", await tx.plan())
            seen.add("receipt", tx.receipt, tx)
            seen.add("outcome", await store.outcome(tx.id))
        prepared = await store.begin("append")
        await prepared.write("prepared", b"ours")
        await prepared.prepare()
        seen.add("status", await store.status(), await store.meta(), await store.capabilities())
    seen.add("events", *events)
    for number, call in enumerate(
        ("probe", "read", "cas", "stage", "seal", "list", "publish", "swap", "put_segment", "remove")
    ):
        fails.clear()
        fails.add(call)
        faulty = open_store(FaultDriver(driver, gate), observers=[lambda event: 1 / 0])
        for mode in ("append", "full_drop"):
            try:
                async with faulty.staged_write(mode, lock_timeout=0) as tx:
                    await tx.write(f"faulty-{number}-{mode}", b"ours")
            except StagedError as error:
                seen.error(f"a failing {call}", error)
        for ask in (faulty.recover, faulty.status, faulty.meta, faulty.gc):
            try:
                seen.add(f"{ask.__name__} over a failing {call}", await ask())
            except StagedError as error:
                seen.error(f"a failing {call}", error)
    fails.clear()
    store = open_store(URL, **OPTIONS)
    await store.recover(resolve="replace")
    seen.add("gc", await store.gc(older_than=timedelta(0)))
    for storage in VaultDriver.storages.values():
        seen.add("records", *storage.records, *(body for body, _, _ in storage.records.values()))
        seen.add("files", *storage.files, *(blob.data for blob in storage.files.values()))
    for name, dump in (("pickle", pickle.dumps), ("copy", copy.copy), ("deepcopy", copy.deepcopy)):
        for thing in (store, driver, prepared, store.child("below")):
            try:
                seen.add(name, dump(thing))
            except Exception as error:
                seen.error(name, error)
            else:
                assert name != "pickle" or thing is prepared, f"a {type(thing).__name__} was pickled"
    seen.add("logs", logged.getvalue())
    seen.add("output", *capfd.readouterr())
    figure(
        f"secrets, {anyio_backend}",
        f"{len(SECRETS)} canaries in {len(seen.texts):,} texts ({len(failing)} failing calls), {len(seen.leaks())} leaks",
    )
    assert len(failing) > 20
    assert logged.getvalue()
    assert not seen.leaks()


BAD_URLS = [
    URL.replace("vault", "vualt"),
    URL.replace("vault", "VUALT"),
    URL.replace("vault", "1vault"),
    URL.replace("vault", "va_ult"),
    URL.replace("vault://", "://"),
    URL.replace("vault", "https"),
    URL.replace("vault", "memory"),
    URL.replace("vault", "file"),
    f"user:{SECRETS['password']}@host://x",
]
BAD_OPTIONS: list[dict[str, object]] = [
    {"credential": SECRETS["token"], "acount_key": SECRETS["account key"]},
    {"credential": SECRETS["token"], SECRETS["signature"][:0] + "sas": SECRETS["signature"]},
]


def test_an_open_that_fails_shows_no_credential(figure: Figure, logged: io.StringIO, tmp_path: Path) -> None:
    seen = Seen()
    os.chdir(tmp_path)
    calls: list[tuple[str, Callable[[], Store]]] = [
        *((f"url {number}", lambda url=url: open_store(url)) for number, url in enumerate(BAD_URLS)),  # type: ignore[misc]
        *((f"options {number}", lambda options=options: open_store(URL, **options)) for number, options in enumerate(BAD_OPTIONS)),  # type: ignore[misc]
        ("options of no use", lambda: open_store(tmp_path, **OPTIONS)),
        ("a driver and options", lambda: open_store(VaultDriver("u@lake/x"), **OPTIONS)),
    ]  # fmt: skip
    for name, call in calls:
        with pytest.raises((InvalidInput, Unsupported)) as caught:
            call()
        seen.error(name, caught.value)
    seen.add("logs", logged.getvalue())
    figure("secrets in failing opens", f"{len(calls)} opens refused, {len(seen.leaks())} leaks")
    assert not seen.leaks()
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_is_the_same_in_capitals() -> None:
    assert open_store(URL.replace("vault", "VAULT"), **OPTIONS).url == "vault://host/lake/target"


@pytest.mark.parametrize("as_json", [False, True])
def test_no_command_shows_the_credential_in_its_url(
    as_json: bool, tmp_path: Path, figure: Figure, logged: io.StringIO
) -> None:
    seen = Seen()
    (tmp_path / "file").write_text("x")
    source, words = str(tmp_path / "file"), ["--json"] if as_json else []
    lines = [
        *(
            ["put", source, url, "--mode", mode]
            for url in (URL, *BAD_URLS)
            for mode in ("append", "append", "full_drop")
        ),
        ["put", source, URL, "--mode", "nonsense"],
        ["put", URL, source, "--mode", "append"],
        ["put", source, URL],
        *([verb, url] for verb in ("status", "recover", "gc") for url in (URL, *BAD_URLS)),
        *(["outcome", URL, id] for id in ("nonsense", "0" * 24)),
        ["recover", URL, "--recursive"],
        ["recover", URL, "--resolve", "nonsense"],
        ["gc", URL, "--older-than", "nonsense"],
    ]
    os.chdir(tmp_path)
    codes = []
    for line in lines:
        result = CliRunner().invoke(commands(), [*line, *words])
        codes.append(result.exit_code)
        seen.add(" ".join(line[:1]), result.output, result.stderr)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    seen.add("logs", logged.getvalue())
    figure(f"secrets in commands{', --json' * as_json}", f"{len(lines)} commands, {len(seen.leaks())} leaks")
    assert not seen.leaks()
    assert {0, 1, 2, 3} <= set(codes)
