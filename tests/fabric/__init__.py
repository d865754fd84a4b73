"""A replicator that mirrors a landing zone as Microsoft Fabric's Open Mirroring does, and tells what it saw.

    with DfsServer(onelake=True) as server:
        server.add_item("ws", "sales.MountedRelationalDatabase")
        replicator = Replicator(server.namespace, "ws", "sales.MountedRelationalDatabase")
        server.before = replicator.before_requests(every=3)
        ...  # a client writes
        server.call(replicator.poll)
        assert replicator.tables["dbo.orders"].rows == [{"id": 1}]
        assert replicator.violations() == []

What it does is documented on two pages of Microsoft's, named in brackets below, or assumed, where the code says so with
`# assumed`. [format] is "Open mirroring landing zone requirements and format"; [practices] is "Best practices for open
mirroring"; [status] is the REST reference's "Mirroring - Get Tables Mirroring Status".

- Tables are folders of `Files/LandingZone`, or of `Files/LandingZone/<schema>.schema` [format].
- Names that begin with an underscore are ignored, and `_scratchPad` is reserved for staging [practices].
- `_metadata.json` names `keyColumns`, which can be added at any time and then not be changed; without them there are
  inserts only. `fileDetectionStrategy` and `isUpsertDefaultRowMarker` are independent of one another [format].
- `_partnerEvents.json` lies in the landing zone, not in a table, and is recommended, not required [format]; it is not
  read here.
- Names have 20 digits, begin at 1 and are contiguous [format]; a missing index blocks the later ones [practices].
- LastUpdateTimeFileDetection takes what is there by the time of its last change, with no order among equal times; a
  path that was read is not read again [practices].
- `__rowMarker__` is the last column: 0 insert, with no look for duplicates; 1 update and 4 upsert insert what is not
  there; 2 delete is nothing where nothing is there. Without it all rows are inserts, or upserts by the metadata. Rows
  and files apply in their order [format].
- New columns are added, missing ones are null, and a column of another type stops the table [format]. Complex types
  are to be written as JSON text [format].
- A file of zero bytes, or one that is damaged, is replaced under its own name; later ones wait for it. A Parquet file
  without rows is fine [practices].
- Processed files move to `_ProcessedFiles` or `_FilesReadyToDelete` and are removed after seven days; the last file
  stays, so that a publisher can tell the next name [format].
- A table whose folder is deleted is dropped; a folder that was made anew, told by its ETag, is dropped and read from
  the beginning; deleting a folder may fail while it is in use [format].
- To restart a table: delete its folder, wait until the table disappears, make it again [practices].
- Statuses and metrics have the names of [status].

Only Parquet is played: no delimited text, no compression around a file, no partition folders.
"""

from .replicator import Replicator, Table
from .rows import Metadata, Rejected
from .sightings import Applied, Dropped, Failure, Finding, Seen, SeenFile

__all__ = [
    "Applied",
    "Dropped",
    "Failure",
    "Finding",
    "Metadata",
    "Rejected",
    "Replicator",
    "Seen",
    "SeenFile",
    "Table",
]
