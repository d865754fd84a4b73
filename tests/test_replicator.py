"""The replicator of the tests mirrors a landing zone as it is documented, and finds what a publisher did wrong."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dfs import DfsServer, Directory, File, Namespace
from dfs.errors import Refused
from fabric import Dropped, Finding, Replicator

ITEM = "sales.MountedRelationalDatabase"
ZONE = f"{ITEM}/Files/LandingZone"
KEYED = {"keyColumns": ["id"]}
BY_TIME = {"fileDetectionStrategy": "LastUpdateTimeFileDetection"}
MARKER = "__rowMarker__"

Json = dict[str, Any]


def parquet(*rows: Json, **columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)) if rows else pa.table(columns), sink)
    return sink.getvalue()


def nth(number: int) -> str:
    return f"{number:020}.parquet"


@dataclass
class World:
    """A landing zone on its own, and what a publisher does in it."""

    now: list[float] = field(default_factory=lambda: [1_000.0])
    namespace: Namespace = field(init=False)
    replicator: Replicator = field(init=False)

    def __post_init__(self) -> None:
        self.namespace = Namespace(lambda: self.now[0])
        self.namespace.create_filesystem("ws")
        self.restart()

    def restart(self, **options: Any) -> Replicator:
        self.replicator = Replicator(self.namespace, "ws", ITEM, **options)
        return self.replicator

    def table(self, name: str = "t", metadata: object = KEYED) -> None:
        self.put("_metadata.json", json.dumps(metadata).encode(), name)

    def put(self, name: str, data: bytes, table: str = "t") -> None:
        self.namespace.create("ws", f"{ZONE}/{table}/{name}", data)

    def publish(self, number: int, *rows: Json) -> None:
        self.put(nth(number), parquet(*rows))

    def delete(self, path: str = "t") -> None:
        self.namespace.delete("ws", f"{ZONE}/{path}", recursive=True)

    def poll(self, times: int = 1) -> None:
        for _ in range(times):
            self.replicator.poll()

    def rows(self, table: str = "t") -> list[Json]:
        return self.replicator.tables[table].rows

    def error(self, table: str = "t") -> str:
        return self.replicator.tables[table].error

    def paths(self) -> list[str]:
        """The data files of the table, wherever they are in it."""
        below = [path.removeprefix(f"{ZONE}/t/") for path in self.namespace.paths("ws", f"{ZONE}/t")]
        return [path.replace("0" * 19, "") for path in below if path.endswith(".parquet")]

    def found(self) -> list[str]:
        return [finding.kind for finding in self.replicator.violations()]

    def reported(self, name: str = "tables") -> Json:
        told: Json = json.loads(self.namespace.read("ws", f"{ITEM}/Files/Monitoring/{name}.json"))
        return told


@pytest.fixture
def world() -> World:
    return World()


# Where tables are


def test_tables_are_folders_and_those_of_schemas_have_its_name_in_front(world: World) -> None:
    for table in ("t", "dbo.schema/t", "dbo.schema/u"):
        world.put(nth(1), parquet({"id": table}), table)
    world.poll()
    assert {name: table.rows for name, table in world.replicator.tables.items()} == {
        "t": [{"id": "t"}],
        "dbo.t": [{"id": "dbo.schema/t"}],
        "dbo.u": [{"id": "dbo.schema/u"}],
    }


def test_names_that_begin_with_an_underscore_are_no_tables_and_no_data(world: World) -> None:
    world.table(metadata=KEYED | BY_TIME)
    world.put("_00000000000000000001.parquet", b"half")
    for folder in ("_scratchPad", "_tmp/t", "dbo.schema/_old"):
        world.put(nth(1), b"half", folder)
    world.namespace.create("ws", f"{ZONE}/_partnerEvents.json", b"{}")
    world.poll()
    assert list(world.replicator.tables) == ["t"]
    assert (world.rows(), world.found()) == ([], [])


# The metadata


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"keyColumns": "id"}', "no list of names"),
        (b'{"keyColumns": [1]}', "no list of names"),
        (b'{"fileDetectionStrategy": "ByLuck"}', "'ByLuck' is not known"),
        (b'{"isUpsertDefaultRowMarker": "true"}', "neither true nor false"),
    ],
)
def test_metadata_that_is_not_valid_stops_the_table_until_it_is(world: World, data: bytes, reason: str) -> None:
    world.put("_metadata.json", data)
    world.publish(1, {"id": 1})
    world.poll()
    assert reason in world.error()
    assert (world.rows(), world.found()) == ([], ["rejected"])
    world.table()
    world.poll()
    assert (world.rows(), world.error()) == ([{"id": 1}], "")


def test_keys_can_be_added_and_then_not_be_changed(world: World) -> None:
    world.table(metadata={})
    world.publish(1, {"id": 1, "n": 1})
    world.poll()
    world.table(metadata=KEYED)
    world.publish(2, {"id": 1, "n": 2, MARKER: 1})
    world.poll()
    assert (world.rows(), world.error()) == ([{"id": 1, "n": 2}], "")
    world.table(metadata={"keyColumns": ["n"]})
    world.publish(3, {"id": 3, "n": 3})
    world.poll()
    assert "keyColumns has changed" in world.error()
    assert world.reported()["tables"][0]["status"] == "Failed"
    assert len(world.rows()) == 1


# Which files are taken


def test_a_sequence_is_taken_from_1_and_waits_at_a_gap(world: World) -> None:
    world.table()
    world.publish(2, {"id": 2})
    world.poll()
    assert world.rows() == []
    assert world.replicator.violations() == [Finding("gap", 1, "t", nth(1))]
    world.publish(1, {"id": 1})
    world.publish(4, {"id": 4})
    world.poll()
    assert world.rows() == [{"id": 1}, {"id": 2}]
    assert world.replicator.violations() == [Finding("gap", 2, "t", nth(3))]
    world.publish(3, {"id": 3})
    world.poll()
    assert (len(world.rows()), world.found()) == (4, [])


@pytest.mark.parametrize("bad", [b"", b"PAR1 and no more"])
def test_a_bad_file_holds_the_sequence_up_until_it_is_replaced(world: World, bad: bytes) -> None:
    world.table()
    world.put(nth(1), bad)
    world.publish(2, {"id": 2})
    world.poll(2)
    assert (world.rows(), bool(world.error())) == ([], True)
    assert world.found() == (["zero bytes"] if not bad else []) + ["rejected"]
    world.publish(1, {"id": 1})
    world.poll()
    assert (world.rows(), world.error()) == ([{"id": 1}, {"id": 2}], "")
    assert not {"gap", "changed", "reused"} & set(world.found())


def test_other_names_are_not_looked_for_in_a_sequence(world: World) -> None:
    world.table()
    for name in ("1.parquet", nth(0), "0" * 19 + "1.csv", "data.parquet"):
        world.put(name, parquet({"id": 1}))
    world.poll()
    assert (world.rows(), world.found()) == ([], ["name"] * 4)


def test_by_time_files_are_taken_in_the_order_of_their_seconds_and_equal_ones_in_none(world: World) -> None:
    world.table(metadata=BY_TIME)
    for second, name in ((3.0, "a"), (1.0, "c"), (2.1, "b"), (2.2, "b2"), (2.3, "b1")):
        world.now[0] = second
        world.put(f"{name}.parquet", parquet({"id": name}))
    world.poll()
    assert [row["id"] for row in world.rows()] == ["c", "b2", "b1", "b", "a"]
    world.now[0] = 0.5
    world.put("late.parquet", parquet({"id": "late"}))
    world.poll()
    assert (world.rows()[-1], world.found()) == ({"id": "late"}, [])


def test_by_time_a_path_is_read_once_and_a_bad_one_holds_up_no_other(world: World) -> None:
    world.table(metadata=BY_TIME)
    world.put("a.parquet", parquet({"id": 1}))
    world.put("b.parquet", b"bad")
    world.poll()
    assert (world.rows(), world.error()[:9]) == ([{"id": 1}], "b.parquet")
    world.put("a.parquet", parquet({"id": 2}))
    world.put("b.parquet", parquet({"id": 3}))
    world.poll()
    assert world.rows() == [{"id": 1}, {"id": 3}]
    assert world.found() == ["rejected", "reused"]


# What rows do


@pytest.mark.parametrize(
    ("marker", "after"),
    [
        (0, {"a": ["old", "new"], "b": ["new"]}),
        (1, {"a": ["new"], "b": ["new"]}),
        (2, {}),
        (4, {"a": ["new"], "b": ["new"]}),
    ],
)
def test_each_marker_does_what_is_documented_to_what_is_there_and_to_what_is_not(
    world: World, marker: int, after: dict[str, list[str]]
) -> None:
    world.table()
    world.publish(1, {"id": "a", "v": "old"})
    world.publish(2, *({"id": name, "v": "new", MARKER: marker} for name in "ab"))
    world.poll()
    left: dict[str, list[str]] = {}
    for row in world.rows():
        left.setdefault(row["id"], []).append(row["v"])
    assert left == after


def test_rows_apply_in_their_order(world: World) -> None:
    world.table()
    steps = [("E1", "Redmond", 0), ("E1", "Bellevue", 1), ("E1", None, 2), ("E2", "Bellevue", 0), ("E2", "Kent", 4)]
    world.publish(1, *({"id": name, "at": place, MARKER: marker} for name, place, marker in steps))
    world.poll()
    assert world.rows() == [{"id": "E2", "at": "Kent"}]


def test_duplicates_go_together(world: World) -> None:
    world.table()
    world.publish(1, {"id": 1, "v": 1}, {"id": 1, "v": 2}, {"id": 2, "v": 1}, {"id": 2, "v": 2})
    world.publish(2, {"id": 1, "v": 3, MARKER: 1}, {"id": 2, "v": None, MARKER: 2})
    world.poll()
    assert world.rows() == [{"id": 1, "v": 3}]


@pytest.mark.parametrize(("upserts", "count"), [(False, 2), (True, 1)])
def test_rows_without_a_marker_are_inserts_or_upserts_as_the_metadata_says(
    world: World, upserts: bool, count: int
) -> None:
    world.table(metadata=KEYED | {"isUpsertDefaultRowMarker": upserts})
    for number in (1, 2):
        world.publish(number, {"id": 1, "v": number})
    world.poll()
    assert (len(world.rows()), world.rows()[-1]["v"]) == (count, 2)


@pytest.mark.parametrize(
    ("metadata", "columns", "reason"),
    [
        (KEYED, {"id": [1], MARKER: [3]}, f"{MARKER} is 3"),
        (KEYED, {"id": [1], MARKER: [None]}, f"{MARKER} is None"),
        (KEYED, {"id": [1], MARKER: ["0"]}, f"{MARKER} is '0'"),
        (KEYED, {"id": [1], MARKER: [1.0]}, f"{MARKER} is 1.0"),
        (KEYED, {MARKER: [0], "id": [1]}, "not the last column"),
        (KEYED, {"name": ["x"]}, "the key column 'id' is missing"),
        ({}, {"id": [1], MARKER: [1]}, "no keyColumns"),
        ({"isUpsertDefaultRowMarker": True}, {"id": [1]}, "no keyColumns"),
        (KEYED, {"id": [1], "list": [[1]]}, "complex type"),
        (KEYED, {"id": ["text"]}, "'id' was int64 and is string"),
    ],
)
def test_a_file_that_breaks_a_rule_stops_the_table_and_is_not_applied_in_part(
    world: World, metadata: Json, columns: dict[str, list[Any]], reason: str
) -> None:
    world.table(metadata=metadata | {"isUpsertDefaultRowMarker": False})
    world.publish(1, {"id": 0})
    world.poll()
    world.table(metadata=metadata)
    world.put(nth(2), parquet(**columns))
    world.publish(3, {"id": 9})
    world.poll(2)
    assert reason in world.error()
    assert [(one.poll, one.name) for one in world.replicator.record.failures] == [(2, nth(2))]
    assert (world.rows(), world.found()) == ([{"id": 0}], ["rejected"])
    assert reason in world.replicator.violations()[0].more


def test_columns_are_added_and_missing_ones_are_null(world: World) -> None:
    world.publish(1, {"id": 1, "old": "x"})
    world.publish(2, {"id": 2, "new": "y"})
    world.poll()
    assert world.rows() == [{"id": 1, "old": "x", "new": None}, {"id": 2, "old": None, "new": "y"}]


def test_a_file_without_rows_is_fine(world: World) -> None:
    world.table()
    world.put(nth(1), parquet(id=pa.array([], pa.int64())))
    world.publish(2, {"id": 2})
    world.poll()
    assert (world.rows(), world.found()) == ([{"id": 2}], [])


# What becomes of files


def test_processed_files_move_twice_and_are_removed_and_the_last_one_stays(world: World) -> None:
    world.table()
    world.publish(1, {"id": 1})
    world.poll(9)
    assert world.paths() == ["1.parquet"]
    world.publish(2, {"id": 2})
    went = []
    for _ in range(6):
        world.poll()
        went.append(world.paths())
    assert went == [
        ["2.parquet", "_ProcessedFiles/1.parquet"],
        ["2.parquet", "_ProcessedFiles/1.parquet"],
        ["2.parquet", "_FilesReadyToDelete/1.parquet"],
        ["2.parquet", "_FilesReadyToDelete/1.parquet"],
        ["2.parquet"],
        ["2.parquet"],
    ]
    assert (len(world.rows()), world.found()) == (2, [])


def test_the_last_file_can_be_made_to_go_as_well(world: World) -> None:
    world.restart(last_stays=False, ready_after=1, removed_after=2)
    world.publish(1, {"id": 1})
    went = []
    for _ in range(3):
        world.poll()
        went.append(world.paths())
    assert went == [["_ProcessedFiles/1.parquet"], ["_FilesReadyToDelete/1.parquet"], []]


# What becomes of tables


def test_a_folder_that_was_made_anew_is_read_from_the_beginning(world: World) -> None:
    world.table()
    world.publish(1, {"id": "old"})
    world.poll()
    before = world.replicator.tables["t"].folder
    world.delete()
    world.table(metadata={"keyColumns": ["key"]})
    world.publish(1, {"key": 1})
    world.poll()
    assert (world.rows(), world.error()) == ([{"key": 1}], "")
    assert world.replicator.record.drops == [Dropped(2, "t", before, "replaced")]
    assert world.replicator.violations() == [Finding("dropped", 2, "t", more="replaced")]
    assert world.replicator.violations(dropped=["t"]) == []


def test_a_folder_is_told_by_its_etag_not_by_what_is_in_it(world: World) -> None:
    world.table()
    world.publish(1, {"id": 1})
    world.poll()
    world.namespace.rename(("ws", f"{ZONE}/t"), ("ws", f"{ZONE}/_t"))
    world.namespace.rename(("ws", f"{ZONE}/_t"), ("ws", f"{ZONE}/t"))
    world.poll()
    assert world.replicator.record.drops == []
    world.namespace.create("ws", f"{ZONE}/t", directory=True)
    world.poll()
    assert [drop.why for drop in world.replicator.record.drops] == ["replaced"]


@pytest.mark.parametrize("delay", [0, 2])
def test_a_table_is_dropped_after_its_folder_and_only_then_no_longer_listed(world: World, delay: int) -> None:
    world.restart(drop_after=delay)
    world.table()
    world.publish(1, {"id": 1})
    world.poll()
    world.delete()
    for _ in range(delay):
        world.poll()
        assert [table["sourceTableName"] for table in world.reported()["tables"]] == ["t"]
        assert world.rows() == [{"id": 1}]
    world.poll()
    assert world.reported() == {"tables": []}
    assert [(drop.poll, drop.why) for drop in world.replicator.record.drops] == [(delay + 2, "gone")]


def test_polls_that_miss_a_folder_count_anew_once_it_is_back(world: World) -> None:
    world.restart(drop_after=1)
    world.table()
    world.poll()
    for _ in range(3):
        world.namespace.rename(("ws", f"{ZONE}/t"), ("ws", f"{ZONE}/_t"))
        world.poll()
        world.namespace.rename(("ws", f"{ZONE}/_t"), ("ws", f"{ZONE}/t"))
        world.poll()
    assert world.replicator.record.drops == []


def test_a_folder_in_use_is_neither_deleted_nor_renamed_nor_what_is_above_it(world: World) -> None:
    world.restart(busy=2)
    folder = f"{ZONE}/dbo.schema/t"
    world.put(nth(1), parquet({"id": 1}), "dbo.schema/t")
    refused = []
    for _ in range(3):
        world.poll()
        for act in (
            lambda: world.namespace.delete("ws", folder, recursive=True),
            lambda: world.namespace.delete("ws", f"{ZONE}/dbo.schema", recursive=True),
            lambda: world.namespace.rename(("ws", folder), ("ws", f"{ZONE}/_t")),
        ):
            if world.replicator.polls > 2:
                continue
            with pytest.raises(Refused, match="LeaseAlreadyPresent"):
                act()
            refused.append(world.replicator.polls)
        world.put(f"_{world.replicator.polls}", b"", "dbo.schema/t")
        world.namespace.delete("ws", f"{folder}/_{world.replicator.polls}")
    assert refused == [1, 1, 1, 2, 2, 2]
    world.namespace.delete("ws", folder, recursive=True)


def test_what_it_reports(world: World) -> None:
    world.table("dbo.schema/t")
    data = parquet({"id": 1}, {"id": 2})
    world.put(nth(1), data, "dbo.schema/t")
    world.put(nth(1), b"bad")
    world.poll()
    bad, good = sorted(world.reported()["tables"], key=lambda entry: str(entry["sourceSchemaName"]))
    assert good == {
        "sourceSchemaName": "dbo",
        "sourceTableName": "t",
        "status": "Replicating",
        "metrics": {"processedBytes": len(data), "processedRows": 2, "lastSyncTimeUtc": "1970-01-01T00:16:40Z"},
    }
    assert (bad["sourceSchemaName"], bad["sourceTableName"], bad["status"]) == ("", "t", "Failed")
    assert "no Parquet file" in bad["error"]["message"]
    assert world.reported("replicator") == {"status": "Running"}


# What it saw


def test_it_records_every_folder_at_every_poll(world: World) -> None:
    world.put("_upload", b"12")
    world.poll()
    world.table()
    world.poll()
    first, second = world.replicator.record.seen
    etag = world.namespace.find("ws", f"{ZONE}/t").etag
    assert (first.poll, first.table, first.folder, first.metadata) == (1, "t", etag, False)
    assert [(file.name, file.size) for file in first.files] == [("_upload", 2)]
    assert (second.poll, second.metadata, len(second.files)) == (2, True, 2)


def replaced(world: World) -> None:
    world.publish(2, {"id": 5})


def overwritten(world: World) -> None:
    world.publish(1, {"id": 1})
    world.poll()
    world.publish(2, {"id": 5})


def published_again(world: World) -> None:
    world.publish(1, {"id": 1})
    world.poll(2)
    world.publish(1, {"id": 1})


def put_back(world: World) -> None:
    world.publish(1, {"id": 1})
    world.poll(2)
    world.namespace.rename(("ws", f"{ZONE}/t/_ProcessedFiles/{nth(1)}"), ("ws", f"{ZONE}/t/{nth(1)}"))


def emptied(world: World) -> None:
    world.put(nth(7), b"")
    world.poll()
    world.delete(f"t/{nth(7)}")


@pytest.mark.parametrize(
    ("act", "kinds"),
    [
        (replaced, ["changed", "gap"]),
        (overwritten, ["reused"]),
        (published_again, ["reused"]),
        (put_back, ["reused"]),
        (emptied, ["zero bytes", "gap"]),
    ],
)
def test_it_finds_what_a_publisher_may_not_do(world: World, act: Callable[[World], None], kinds: list[str]) -> None:
    world.table()
    world.publish(2, {"id": 2})
    world.poll()
    act(world)
    world.poll(2)
    assert world.found() == kinds


def test_data_before_metadata_is_found_once_and_taken_all_the_same(world: World) -> None:
    world.publish(1, {"id": 1})
    world.poll(2)
    world.table()
    world.poll()
    assert world.replicator.violations() == [Finding("no metadata", 1, "t")]
    assert world.rows() == [{"id": 1}]


# Beside a server


@pytest.fixture
def server() -> Iterator[DfsServer]:
    with DfsServer(onelake=True) as server:
        server.add_item("ws", ITEM)
        yield server


def ask(server: DfsServer, method: str, path: str, query: str = "", body: bytes = b"", source: str = "") -> int:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    headers = {"x-ms-rename-source": f"/ws/{ZONE}/{source}"} if source else {}
    try:
        connection.request(method, f"/ws/{ZONE}/{path}?{query}", body, headers | {"Content-Length": str(len(body))})
        return connection.getresponse().status
    finally:
        connection.close()


def upload(server: DfsServer, path: str, data: bytes) -> None:
    assert ask(server, "PUT", path, "resource=file") == 201
    assert ask(server, "PATCH", path, "action=append&position=0", data) == 202
    assert ask(server, "PATCH", path, f"action=flush&position={len(data)}") == 200


def publish(server: DfsServer, count: int) -> None:
    """Write a table as it is to be written: metadata first, and files that are renamed into place."""
    metadata = json.dumps(KEYED).encode()
    upload(server, "_scratchPad/_metadata.json", metadata)
    assert ask(server, "PUT", "t", "resource=directory") == 201
    assert ask(server, "PUT", "t/_metadata.json", source="_scratchPad/_metadata.json") == 201
    for number in range(1, count + 1):
        upload(server, f"t/_{nth(number)}", parquet({"id": number}))
        assert ask(server, "PUT", f"t/{nth(number)}", source=f"t/_{nth(number)}") == 201


@pytest.mark.parametrize("every", [1, 2, 7])
def test_it_polls_before_requests_as_they_are_counted(server: DfsServer, every: int) -> None:
    replicator = Replicator(server.namespace, "ws", ITEM)
    server.before = replicator.before_requests(every=every, first=3)
    publish(server, 5)
    asked = server.counts.total()
    assert replicator.polls == len(range(3, asked, every)) > 0
    server.call(replicator.poll)
    assert [row["id"] for row in replicator.tables["t"].rows] == [1, 2, 3, 4, 5]
    assert replicator.violations() == []


def test_a_poll_between_any_two_requests_sees_a_file_that_is_written_in_place(server: DfsServer) -> None:
    replicator = Replicator(server.namespace, "ws", ITEM)
    server.before = replicator.before_requests(every=1)
    upload(server, f"t/{nth(1)}", parquet({"id": 1}))
    server.call(replicator.poll)
    assert [finding.kind for finding in replicator.violations()] == ["no metadata", "zero bytes", "rejected"]
    assert replicator.tables["t"].rows == [{"id": 1}]


def test_it_polls_by_itself_while_others_write(server: DfsServer) -> None:
    replicator = Replicator(server.namespace, "ws", ITEM, ready_after=1, removed_after=2)
    with replicator.beside(server, seconds=0.001):
        publish(server, 20)
    server.call(replicator.poll)
    assert replicator.polls > 5
    assert [row["id"] for row in replicator.tables["t"].rows] == list(range(1, 21))
    assert replicator.violations() == []


def test_its_own_mistakes_are_heard(server: DfsServer) -> None:
    replicator = Replicator(server.namespace, "ws", ITEM)
    server.namespace.delete("ws", ZONE, recursive=True)
    with pytest.raises(AssertionError, match="is no directory"), replicator.beside(server, seconds=0.001):
        while not replicator.polls:
            ask(server, "HEAD", "t")


def test_what_is_in_use_is_refused_over_the_wire(server: DfsServer) -> None:
    replicator = Replicator(server.namespace, "ws", ITEM, busy=1)
    publish(server, 1)
    server.call(replicator.poll)
    assert ask(server, "DELETE", "t", "recursive=true") == 409
    assert ask(server, "PUT", "_old", source="t") == 409
    server.call(replicator.poll)
    assert ask(server, "PUT", "_old", source="t") == 201
    server.call(replicator.poll)
    assert [drop.why for drop in replicator.record.drops] == ["gone"]
    assert isinstance(server.namespace.get("ws", f"{ZONE}/_old"), Directory)
    assert isinstance(server.namespace.get("ws", f"{ITEM}/Files/Monitoring/tables.json"), File)
