"""Takes away, one at a time, the checks that the promises rest on, and shows which test fails.

    python tests/mutants.py [WORD…]

Each mutant is a line of the package that is replaced by another in a copy of it. The tests named beside it run against that
copy until one fails. One that survives is a test that is missing or a line that is needless.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIFE = "tests/test_lifecycle.py"
MODES = "tests/test_modes.py"
KIT = "tests/test_conformance.py"
SYNCS = "tests/test_syncs.py"
LOCAL = "tests/test_local.py"
CALLS = "tests/test_system_calls.py"
RACES = "tests/test_concurrency.py"
WRITERS = "tests/test_writers.py"
CANCEL = "tests/test_cancellation.py"
PLACES = "tests/test_places.py"
STRANGERS = "tests/test_strangers.py"
S3 = "tests/test_s3.py"
GCS = "tests/test_gcs.py"
BLOB = "tests/test_azure_blob.py"
# The quickest first: the races that are spelled out, a sample of faults, many by seed, many writers.
EXPLORED = (LIFE, f"{KIT} -k TestMemory", "tests/test_exploration.py -k many_faults", WRITERS)


@dataclass(frozen=True)
class Mutant:
    """What is taken away, in which module, by which replacement, and the tests to ask, the quickest first."""

    what: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    # Lost answers
    Mutant(
        "a lost answer is settled by reading back",
        "control.py",
        "found is not None and found.body == body:",
        "False:",
        EXPLORED,
    ),
    Mutant(
        "a swap that is there but not durable is written again",
        "control.py",
        "if failed is None or not durable:",
        "if True:",
        (CALLS, SYNCS),
    ),
    Mutant(
        "segments are held against their digest",
        "control.py",
        "if digest_of(bodies) != ref.digest:",
        "if False:",
        ("tests/test_hostile_records.py", STRANGERS),
    ),
    Mutant(
        "an existing segment is compared",
        "control.py",
        "if found is None or found.body != body:",
        "if False:",
        (RACES, STRANGERS, "tests/test_hostile_records.py"),
    ),
    # Acquire
    Mutant(
        "the lock over a commit",
        "commit.py",
        'while (lock := await target.driver.lock("lock")) is None:',
        "while False:",
        EXPLORED,
    ),
    Mutant(
        "a silent holder is waited for, for a period",
        "commit.py",
        "if anyio.current_time() - silent_since >= target.store.period:",
        "if True:",
        EXPLORED,
    ),
    Mutant(
        "a sign of life starts the period anew",
        "commit.py",
        "                silent_since = anyio.current_time()\n",
        "                pass\n",
        EXPLORED,
    ),
    Mutant(
        "the owner stamps its record under the head",
        "commit.py",
        "return await swap(driver, record_key(record.id), stamped, found[1], durable=False) is not None",
        "return True",
        EXPLORED,
    ),
    Mutant(
        "a transaction that another resumed is refused",
        "commit.py",
        "if found[0].owner != record.owner:",
        "if False:",
        EXPLORED,
    ),
    Mutant(
        "its own outcome is looked up under the head",
        "commit.py",
        '(outcome := await read_outcome(driver, record.id)) is not None and outcome.state == "committed"',
        "False",
        EXPLORED,
    ),
    Mutant(
        "the key is looked up under the head",
        "commit.py",
        "if record.key is not None and any(commit.key == record.key for commit in ledger.commits):",
        "if False:",
        (LIFE, WRITERS),
    ),
    Mutant(
        "commits since the base are looked through",
        "commit.py",
        "        await _check_overlap(held, record, work, ledger)\n",
        "",
        (LIFE, MODES, WRITERS),
    ),
    # Decide
    Mutant(
        "an unknown decision is settled by moving the head away",
        "commit.py",
        "if await held.move(states.free(undecided)):",
        "if True:",
        EXPLORED,
    ),
    Mutant(
        "a decision read back is made durable",
        "commit.py",
        "if await held.move(states.renew(head), durable=True):\n                return",
        "if True:\n                return",
        (LIFE, SYNCS, CALLS),
    ),
    Mutant(
        "the decision is durable",
        "commit.py",
        "states.decide(undecided, plan, ledger), durable=True",
        "states.decide(undecided, plan, ledger), durable=False",
        (SYNCS,),
    ),
    Mutant(
        "the completion of another's decision makes it durable",
        "commit.py",
        "states.adopt(held.head, owner), durable=True",
        "states.adopt(held.head, owner), durable=False",
        (SYNCS,),
    ),
    Mutant(
        "whoever looks reads the head first",
        "commit.py",
        'if head.transaction == tx and head.state is HeadState.COMMITTED:\n        return Outcome(tx, "committing", epoch=head.epoch)',
        "if False:\n        pass",
        EXPLORED,
    ),
    # Publish, remove, finish
    Mutant(
        "what blocks is looked at again under the head",
        "commit.py",
        "        if stuck:\n            await held.check()\n",
        "        if stuck:\n",
        EXPLORED,
    ),
    Mutant(
        "what is kept out is discarded before the head is freed",
        "commit.py",
        "            await target.driver.discard(tx, [entry.handle for entry in foreign], whole=False)\n",
        "",
        (LOCAL, STRANGERS, *EXPLORED),
    ),
    Mutant(
        "the outcome is written before the head is freed",
        "commit.py",
        "await driver.put_segment(\n            outcome_key(tx)",
        "driver.put_segment.__doc__ and await driver.put_segment(\n            outcome_key('0' * 24)",
        (LIFE,),
    ),
    Mutant(
        "freeing the head is durable",
        "commit.py",
        "states.free(held.head), durable=True",
        "states.free(held.head), durable=False",
        (SYNCS,),
    ),
    # Recovery
    Mutant(
        "abort looks at the head",
        "recovery.py",
        "        if head.transaction == tx:\n",
        "        if False:\n",
        EXPLORED,
    ),
    Mutant(
        "abort refuses what is being completed",
        "recovery.py",
        "if head.transaction == tx and head.state is HeadState.COMMITTED:",
        "if False:",
        EXPLORED,
    ),
    Mutant(
        "abort looks at the outcome",
        "recovery.py",
        'if ended is not None and ended.state == "committed":',
        "if False:",
        EXPLORED,
    ),
    Mutant(
        "abort swaps the token that it read first",
        "recovery.py",
        "replace(record, state=TxState.ABORTED, nonce=states.new_id()),\n                token,",
        "replace(record, state=TxState.ABORTED, nonce=states.new_id()),\n                (await read_record(target.driver, tx) or found)[1],",
        EXPLORED,
    ),
    Mutant(
        "only its owner rolls a resumed transaction back",
        "recovery.py",
        "if own and record.owner != owner:",
        "if False:",
        EXPLORED,
    ),
    Mutant(
        "recover leaves the live alone",
        "recovery.py",
        'if lock is None and target.store.fence == "lock":',
        "if False:",
        (LIFE, RACES),
    ),
    Mutant(
        "recover leaves alone what a caller prepared",
        "recovery.py",
        "dead = lock is not None and (record.block or record.state is not TxState.PREPARED)",
        "dead = lock is not None",
        (KIT,),
    ),
    Mutant(
        "gc leaves alone what has a record",
        "recovery.py",
        "if await read_record(driver, tx) is not None:\n                continue",
        "pass",
        (RACES, LIFE, WRITERS),
    ),
    Mutant(
        "gc leaves alone what the head names",
        "recovery.py",
        "if not is_id(tx) or tx == head.transaction:",
        "if not is_id(tx):",
        (LIFE,),
    ),
    # Lifecycle and staging
    Mutant(
        "nothing is committed while a write is open",
        "lifecycle.py",
        "            self._check_staging()\n            self._check_written()\n            await self._or_roll_back(lambda: self._prepare(stop))",
        "            self._check_staging()\n            await self._or_roll_back(lambda: self._prepare(stop))",
        (LIFE, CALLS),
    ),
    Mutant(
        "a key of a commit that is not complete counts for nothing",
        "lifecycle.py",
        " and commit.transaction != completing",
        "",
        EXPLORED,
    ),
    Mutant(
        "what is staged is sealed",
        "lifecycle.py",
        "        await driver.seal(self.id, self._entries.values())\n        stop.check()\n",
        "",
        (SYNCS, CALLS, LOCAL),
    ),
    Mutant("a resumed transaction is sealed again", "lifecycle.py", "if not self._sealed:", "if False:", (LIFE, LOCAL)),
    Mutant(
        "case and Unicode twins are seen",
        "staging.py",
        "if there is not None and there.path != path:",
        "if False:",
        (LIFE,),
    ),
    Mutant(
        "a write that failed is not staged",
        "staging.py",
        "            self._broken = True\n",
        "            pass\n",
        (CANCEL, LIFE),
    ),
    Mutant(
        "commit and rollback are waited out",
        "_waitout.py",
        "        while not task.done():",
        "        while False:",
        (CANCEL,),
    ),
    # The local driver
    Mutant(
        "trees are swapped by identity: new",
        "drivers/local.py",
        "if target == trees.new:",
        "if False:",
        (KIT, "tests/test_kills.py"),
    ),
    Mutant(
        "trees are swapped by identity: old",
        "drivers/local.py",
        "elif target != trees.target:",
        "elif False:",
        (STRANGERS, KIT),
    ),
    Mutant(
        "a swap looks again for targets below",
        "drivers/local.py",
        'if nested_control(now, "") is not None:',
        "if False:",
        (LOCAL, RACES, STRANGERS),
    ),
    Mutant(
        "a plan refuses targets below",
        "drivers/local.py",
        'if (nested := nested_control(fd, "")) is not None:',
        "if False:",
        (KIT, LOCAL),
    ),
    Mutant(
        "the new tree takes after the target",
        "drivers/local.py",
        "            self._take_after_target(tree)\n",
        "",
        (LOCAL,),
    ),
    Mutant(
        "closed places are refused before the decision",
        "drivers/local.py",
        "            self._check_places(tree, directories)\n",
        "",
        (PLACES, LOCAL),
    ),
    Mutant(
        "a staged file that changed is refused",
        "drivers/local.py",
        "if (found.st_size, file_identity(found)) != (entry.size, entry.identity):",
        "if False:",
        (LOCAL,),
    ),
    Mutant(
        "staged files are synced",
        "drivers/local.py",
        "                self._sync_staged(tx, tree, recorded, directories)\n",
        "                pass\n",
        (SYNCS,),
    ),
    Mutant(
        "the exchange is synced",
        "drivers/local.py",
        "            self._sync(above)\n            self._sync(fd)\n",
        "",
        (SYNCS,),
    ),
    Mutant(
        "published directories are synced",
        "drivers/local.py",
        "            self._sync_directories(target, touched)\n        return [answers[entry.path] for entry in entries]\n\n    async def remove",
        "        return [answers[entry.path] for entry in entries]\n\n    async def remove",
        (SYNCS,),
    ),
    Mutant(
        "segments are synced before the decision",
        "drivers/_area.py",
        "                self._sync_segments()\n",
        "                pass\n",
        (SYNCS,),
    ),
    Mutant(
        "a record's data are synced",
        "drivers/_area.py",
        "            if durable and self._durable:\n                os.fdatasync(file)\n",
        "            if durable and self._durable:\n",
        (SYNCS,),
    ),
    Mutant(
        "after a sync that failed nothing is decided",
        "drivers/_area.py",
        "            if self._broken:",
        "            if False:",
        (CALLS,),
    ),
    Mutant(
        "a lock on a deleted file is none",
        "drivers/_area.py",
        "if lock is not None and os.fstat(file).st_nlink == 0:",
        "if False:",
        (RACES, CALLS, LIFE),
    ),
    Mutant(
        "a live process's temporary file is left alone",
        "drivers/_area.py",
        "        if lock is not None:\n            unlink(fd, name)\n            lock.release()\n",
        "        unlink(fd, name)\n        if lock is not None:\n            lock.release()\n",
        (PLACES,),
    ),
    Mutant(
        "work under a lock keeps it",
        "drivers/_posix.py",
        "if self._closed and self._users == 0 and not self._draining:",
        "if True:",
        (CANCEL, CALLS, RACES),
    ),
    Mutant(
        "work under a released lock does not start",
        "drivers/_posix.py",
        "            if self._closed:\n                raise StorageError",
        "            if False:\n                raise StorageError",
        (LOCAL, CANCEL, CALLS),
    ),
    Mutant(
        "a forked child drops its locks",
        "drivers/_posix.py",
        "os.register_at_fork(after_in_child=_drop_in_child)",
        "",
        (CALLS, LOCAL, RACES),
    ),
    Mutant(
        "no link is followed",
        "drivers/_posix.py",
        'os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC\n"""How a directory',
        'os.O_DIRECTORY | os.O_CLOEXEC\n"""How a directory',
        ("tests/test_paths.py", LOCAL),
    ),
    Mutant(
        "a torn record leaves an earlier one",
        "drivers/_slots.py",
        "_DURABLE if durable and found else _PASSING",
        "(0,)",
        (SYNCS,),
    ),
    # Object stores
    Mutant(
        "on an object store that a completion answered is no proof",
        "drivers/s3.py",
        "if name not in there or there[name].identity != uploads.told.get(_upload_of(names[name].handle))",
        "if False",
        (f"{S3} -k answers_200",),
    ),
    Mutant(
        "on an object store what is in the way of an unconditional completion is seen first",
        "drivers/s3.py",
        "[name for name, found in there.items() if found.identity != replaces.get(names[name].path)], tell",
        "[], tell",
        (f"{S3} -k 'TestMinistack and publish'",),
    ),
    Mutant(
        "on an object store what is there and was to be replaced is not taken for gone",
        "drivers/_objects.py",
        "if replaced is None or await self._objects.look(name) is not None:",
        "if replaced is None:",
        (f"{BLOB} -k lease",),
    ),
    Mutant(
        "on an object store a file that was to be replaced and is gone frees its name",
        "drivers/_objects.py",
        "if replaced is None or await self._objects.look(name) is not None:",
        "if True:",
        (f"{GCS} -k 'TestGcs and publish'",),
    ),
    Mutant(
        "on an object store a move names the generation that it replaces",
        "drivers/_gcs.py",
        '"if_generation_match": int(replaces or 0),',
        "",
        (f"{GCS} -k 'TestGcs and publish'",),
    ),
    Mutant(
        "on an object store blocks are looked for before the decision",
        "drivers/azure_blob.py",
        "        if gone:",
        "        if False:",
        (f"{BLOB} -k missed_before",),
    ),
    Mutant(
        "on an object store an empty file is written only while its block is there",
        "drivers/_container.py",
        "if not (await self._ask(blobs, name)).keys() >= set(blocks):",
        "if False:",
        (f"{BLOB} -k late_repeat",),
    ),
    Mutant(
        "on an object store nothing is removed for what is lost",
        "commit.py",
        "            if lost:\n                foreign",
        "            if False:\n                foreign",
        (f"{BLOB} -k said_to_be_lost",),
    ),
]


def copy_with(mutant: Mutant, root: str) -> None:
    """The project in a directory, without that line."""
    for name in ("staged", "tests"):
        shutil.copytree(ROOT / name, f"{root}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copy(ROOT / "README.md", root)
    path = Path(root, "staged", mutant.module)
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.what}: {mutant.module} has {text.count(mutant.old)} such lines, not one: {mutant.old!r}"
        )
    path.write_text(text.replace(mutant.old, mutant.new))


def killer(mutant: Mutant) -> str | None:
    """The first test that fails without it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as root:
        copy_with(mutant, root)
        for tests in mutant.tests:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
            environment = {**os.environ, "PYTHONPATH": root}
            try:
                ran = subprocess.run(
                    command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False
                )
            except subprocess.TimeoutExpired:
                return f"{tests}, which does not end"
            if ran.returncode:
                found = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
                return found[1] if found else f"{tests}: {ran.stdout[-200:]}{ran.stderr[-200:]}"
    return None


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.what for word in words)]
    survived = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for mutant, by in zip(chosen, pool.map(killer, chosen), strict=True):
            survived += by is None
            print(f"{mutant.what}: {'NOBODY NOTICES' if by is None else by}", flush=True)
    print(f"{len(chosen)} taken away, {len(chosen) - survived} noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
