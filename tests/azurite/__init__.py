"""Azurite, which answers as Azure Blob Storage does, on loopback, and a proxy before it that counts, delays and fails.

    with AzuriteServer() as server, BlobProxy(server.url, plan="lost@PutBlockList:0") as proxy:
        AzureBlobDriver(f"{proxy.url}/{ACCOUNT}/{server.container()}/lake", credential=KEY)

It is a package of node's: `npm ci --ignore-scripts` in this directory installs the version that package-lock.json names.
Other than the service it keeps blocks that are not committed over a Put Blob and a Delete Blob, takes empty blocks, tells
properties of blobs that were never committed, and answers 202 to the deletion of one.
"""

from .proxy import BlobProxy
from .server import ACCOUNT, KEY, AzuriteServer, missing

__all__ = ["ACCOUNT", "KEY", "AzuriteServer", "BlobProxy", "missing"]
