"""One of several processes that write to one target of a cloud store at once; a line of JSON for each commit.

python tests/cloud_races.py STORE URL NAME COMMITS
"""

from __future__ import annotations

import json
import sys

import anyio
from cloud_kills import driver_of

from staged import StagedError, open_store


async def race(store: str, url: str, name: str, commits: int) -> None:
    async with open_store(driver_of(store, url)) as opened:
        for number in range(commits):
            # Every other adds a name of its own; all replace one that is everybody's.
            mode = "append" if number % 2 else "overwrite_files"
            tx = await opened.begin(mode)
            await tx.write(f"{name}/{number}", f"{name}-{number}".encode())
            if mode == "overwrite_files":
                await tx.write("everybody's", tx.id.encode())
            try:
                await tx.commit()
                said = "committed"
            except StagedError as error:
                said = error.outcome
            print(json.dumps({"id": tx.id, "file": f"{name}/{number}", "mode": mode, "said": said}), flush=True)


if __name__ == "__main__":
    anyio.run(race, sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
