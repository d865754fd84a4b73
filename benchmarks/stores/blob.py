"""Azure Blob Storage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

import objects
from bench import Bench
from objects import Opponent

from stores import Proxied


class Blob(Proxied):
    """Azurite, anew for each run: it keeps in memory for minutes what was deleted."""

    kind, unit = "Blob", "completions"
    by_hand = Opponent("with_azure", "completions")
    writers: Mapping[str, Opponent] = {
        "adlfs, a transaction that shows each file at once": Opponent("with_adlfs", needs=("adlfs",)),
        "azure-storage-blob, uploads, copies and deletions": Opponent("with_azure", "copies"),
        "azure-storage-blob, no transaction": Opponent("with_azure", "uploads"),
    }
    base = "azure-storage-blob, no transaction"
    overwriters: Mapping[str, Opponent] = {}
    removes = 1

    def __enter__(self) -> Self:
        from azurite import ACCOUNT, KEY

        key = KEY.named_key.key
        self.environment: Mapping[str, str] = {
            "AZURE_STORAGE_ACCOUNT": ACCOUNT,
            "AZURE_STORAGE_KEY": key,
            "NO_PROXY": "127.0.0.1",
        }
        self._stack = ExitStack()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def place(self) -> str:
        from azurite import ACCOUNT, AzuriteServer, BlobProxy

        server = self._stack.enter_context(AzuriteServer())
        self.proxy = self._stack.enter_context(BlobProxy(server.url))
        self.near, self.far = f"{server.url}/{ACCOUNT}", f"{self.proxy.url}/{ACCOUNT}"
        return server.container().container_name

    def drop(self, place: str) -> None:
        self._stack.close()

    def copies(self) -> int:
        return self.proxy.counts["CopyBlob"]

    def removals(self) -> int:
        removed = [record.key for record in self.proxy.log if record.operation == "DeleteBlob"]
        return sum("_staged" not in name.split("/") for name in removed)


def run(bench: Bench) -> None:
    from azurite import missing

    if why := missing():
        bench.note(f"Nothing was measured against Azure Blob Storage: {why}.")
        return
    objects.run(bench, Blob())
