"""The strict encoding of records: what was written is read back, and nothing else is."""

# ruff: noqa: RUF001

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from staged import records
from staged.errors import DamagedRecord, InvalidInput, StagedError
from staged.model import (
    Entry,
    Head,
    HeadState,
    Ledger,
    LedgerEntry,
    Listed,
    Manifest,
    Mode,
    Outcome,
    PlanHeader,
    PlanPart,
    Receipt,
    Ref,
    Trees,
    TxRecord,
    TxState,
)
from staged.records import MAX_META, HandlesPart, ManifestPart, check_key, check_meta, decode, digest_of, encode, is_id

Figure = Callable[[str, str], None]

ID, ID2 = "0123456789abcdef01234567", "f" * 24
REF = Ref(f"log/{ID}-manifest-0", 2, "d" * 64)
RECEIPT = Receipt(ID, Mode.APPEND, "committed", 2, None, 9, 1, "key", 0, 0.5, 0.25)
MANIFEST = Manifest(REF, 2, 3, 9)
HEADER = PlanHeader(ID, Mode.FULL_DROP, 7, "key", ID2, MANIFEST, 1, Trees("1:2", None), 1)
SAMPLES: dict[str, object] = {
    "head": Head(7, HeadState.COMMITTED, ID, "host:1:owner", REF, replace(REF, key="ledger-6"), ID2),
    "ledger": Ledger(
        (LedgerEntry(1, ID, "0a1b2c3d"), LedgerEntry(2, ID2, "0a1b2c3d", "clé")),
        {"mark": [1, 2.5, None, {"a": "b"}]},
        0,
    ),
    "transaction": TxRecord(
        ID, "owner", Mode.APPEND, TxState.PREPARED, True, 6, meta={"a": 1}, partitions=("p=0",), deletes=("x/y", "z")
    ),
    "plan": PlanPart(HEADER, {"a/b": "7:8"}, (Listed("old one", 1, "3:4"), Listed("d", 0, "", True))),
    "manifest": ManifestPart((Entry("a/b", 4, "7:8", "0"), Entry("ü", 5, "9:1", "1", 3))),
    "handles": HandlesPart(("0", "1")),
    "outcome": Outcome(ID, "committed", RECEIPT, ID2, 7),
}


def forge(kind: str, text: bytes, version: bytes = b"1") -> bytes:
    """A record whose digest is right, whatever it holds."""
    return b"staged %s %s %s\n%s\n" % (version, kind.encode(), hashlib.sha256(text).hexdigest().encode(), text)


def _text(kind: str) -> bytes:
    """The JSON of a sample."""
    return encode(SAMPLES[kind]).partition(b"\n")[2][:-1]


def _accepted(kind: str, bodies: Iterator[bytes]) -> tuple[int, list[bytes]]:
    """How many bodies there were, and those that were not refused as damaged."""
    count, accepted = 0, []
    for body in bodies:
        count += 1
        try:
            decode(type(SAMPLES[kind]), body, "the key")
        except DamagedRecord as error:
            assert "the key" in str(error)
        else:
            accepted.append(body)
    return count, accepted


# ------------------------------------------------------------------------------------------------------------ round trips

IDS = st.text("0123456789abcdef", min_size=24, max_size=24)
PARTS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6).map(lambda part: f"-{part}")
PATHS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# Fields that a record may not fill at will, by name.
NAMED: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("id", "previous"), IDS),
    **dict.fromkeys(("path", "handle"), PATHS),
    **dict.fromkeys(("deletes", "partitions", "handles"), st.lists(PATHS, max_size=3).map(tuple)),
    "replaces": st.dictionaries(PATHS, st.text(), max_size=3),
}


@functools.cache
def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        named = {"transaction": IDS | st.none() if hint is Head else IDS, **NAMED}
        if hint is Ref:
            named |= {"key": PATHS, "count": st.integers(1, 10**6)}
        made = {field.name: named.get(field.name, anything(hints[field.name])) for field in fields(hint)}
        return st.builds(hint, **made)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(anything, inner))
    if origin is tuple:
        return st.lists(anything(inner[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(), JSON if inner[1] is object else anything(inner[1]), max_size=3)
    plain = {
        str: st.text(max_size=10),
        int: st.integers(0, 2**63),
        float: st.floats(0, 1e12),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[hint]


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_record_is_read_back_as_it_was_written(kind: str) -> None:
    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(anything(type(SAMPLES[kind])))
    def check(value: object) -> None:
        body = encode(value)
        assert decode(type(value), body, "key") == value
        assert encode(decode(type(value), body, "key")) == body
        assert body.startswith(f"staged 1 {kind} ".encode())
        assert body.count(b"\n") == 2

    check()
    assert decode(type(SAMPLES[kind]), encode(SAMPLES[kind]), "key") == SAMPLES[kind]


def test_there_is_a_sample_of_every_kind_of_record() -> None:
    assert {type(value): kind for kind, value in SAMPLES.items()} == records._KINDS


def test_the_written_form_of_version_1_stays_as_it_is() -> None:
    # Other processes, and older releases, read it: whoever changes it raises VERSION and reads both.
    whole = hashlib.sha256(b"".join(encode(SAMPLES[kind]) for kind in sorted(SAMPLES)))
    assert whole.hexdigest() == "63e4a32e3fe3530e7498a33f6a6c1913315ea955a9e6dce369381a25e88c8d3e"


def test_a_listed_name_that_is_not_utf8_is_recorded_or_refused_by_an_error_of_ours() -> None:
    # os.listdir gives such names with lone surrogates; a foreign file may have one.
    part = PlanPart(remove=(Listed("p/\udcff", 1, "1:2"),))
    try:
        body = encode(part)
    except StagedError:
        return
    assert decode(PlanPart, body, "key") == part


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_flipped_bit_every_truncation_and_every_lost_or_doubled_byte_is_refused(
    kind: str, figure: Figure
) -> None:
    body = encode(SAMPLES[kind])

    def damaged() -> Iterator[bytes]:
        for at in range(len(body)):
            for bit in range(8):
                yield body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :]
            yield body[:at]
            yield body[:at] + body[at + 1 :]
            yield body[: at + 1] + body[at:]
        yield body + b"\n"
        yield body + body
        yield b"\xef\xbb\xbf" + body
        yield b" " + body

    # A lost or doubled byte among equal ones gives the same bytes wherever it happens; never the whole body.
    count, accepted = _accepted(kind, (bad for bad in damaged() if bad != body))
    figure(f"damage to a record of kind {kind}", f"{count:,} flips, cuts and doublings, {len(accepted)} accepted")
    assert [bad.partition(b"\n")[0] for bad in accepted] == []


@pytest.mark.parametrize(
    "version", ["0", "00", "01", "2", "10", "+1", "-1", "1.0", "1_0", " 1", "", "x", "²", "١", "9" * 20, "9" * 5_000]
)
def test_any_version_but_this_one_is_refused(version: str) -> None:
    body = forge("head", _text("head"), version.encode())
    with pytest.raises(DamagedRecord):
        decode(Head, body, "head")


def test_a_newer_version_says_to_upgrade() -> None:
    with pytest.raises(DamagedRecord, match=r"has version 2; this is version 1\. Upgrade"):
        decode(Head, forge("head", b"whatever it holds", b"2"), "head")


def test_a_record_of_another_kind_is_refused() -> None:
    for kind, value in SAMPLES.items():
        for other, wanted in SAMPLES.items():
            if kind != other:
                with pytest.raises(DamagedRecord, match="another kind"):
                    decode(type(wanted), encode(value), "key")
                with pytest.raises(DamagedRecord):
                    decode(type(wanted), forge(other, _text(kind)), "key")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object within a value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _rewritten(text: bytes) -> Iterator[bytes]:
    """The same JSON in other forms, and with fields too many or too few."""
    dump = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    value = json.loads(text)
    assert dump(value).encode() == text
    yield dump(value, indent=1).encode()
    yield dump(value, separators=(", ", ": ")).encode()
    yield from (text + b" ", b" " + text, text + b"\n", text + text, b"[" + text + b"]", b"", b"null", b"{}", b"[]")
    yield b'{"unknown":1,' + text[1:]
    name = next(iter(value))
    yield b"{" + dump(name).encode() + b":" + dump(value[name]).encode() + b"," + text[1:]
    for number in range(sum(1 for _ in _objects(value))):
        for change in ("unknown", "reversed", "doubled"):
            copy = json.loads(text)
            at = list(_objects(copy))[number]
            before = dict(at)
            at.clear()
            if change == "unknown":
                at.update(before, unknown=1)
            elif change == "reversed":
                at.update(reversed(before.items()))
            else:
                at.update(before, DOUBLED=next(iter(before.values()), 0))
            again = dump(copy)
            if change == "doubled" and before:
                again = again.replace('"DOUBLED"', dump(next(iter(before))))
            yield again.encode()
    for field in value:
        yield dump({name: inner for name, inner in value.items() if name != field}).encode()
        for wrong in (None, True, -1, 1.5, "x", [], {}, [None], 2**200):
            if dump(wrong) != dump(value[field]):
                yield dump({**value, field: wrong}).encode()


@pytest.mark.parametrize("kind", SAMPLES)
def test_with_a_right_digest_only_the_one_written_form_is_accepted(kind: str) -> None:
    changed = {text for text in _rewritten(_text(kind)) if text != _text(kind)}
    assert len(changed) > 15
    for text in changed:
        body = forge(kind, text)
        try:
            value = decode(type(SAMPLES[kind]), body, "key")
        except DamagedRecord:
            continue
        # Another valid value, then, in its own one form; never the sample again, nor one with unknown fields.
        assert encode(value) == body
        assert value != SAMPLES[kind]
        assert b"unknown" not in text or kind in ("ledger", "transaction", "plan")


@pytest.mark.parametrize("text", ['{"unknown":1,%s', '{%s,"unknown":1}', '{"epoch":7,%s', "{%s }"])
def test_unknown_doubled_and_oddly_written_fields_are_refused(text: str) -> None:
    inner = _text("head").decode()
    whole = text.replace("%s", inner[1:-1] if text.endswith("}") else inner[1:])
    with pytest.raises(DamagedRecord):
        decode(Head, forge("head", whole.encode()), "head")


@pytest.mark.parametrize("depth", [500, 1_000, 10_000, 1_000_000])
def test_deep_nesting_is_refused_without_exhausting_the_stack(depth: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        for tail in (b"", b"1" + closing * depth):
            deep = opening * depth + tail
            bodies = (
                forge("ledger", deep),
                forge("ledger", b'{"commits":[],"meta":{"a":' + deep + b'},"floor":0}'),
                forge("head", b'{"epoch":' + deep + b"}"),
            )
            for kind, body in zip(("ledger", "ledger", "head"), bodies, strict=True):
                try:
                    decode(type(SAMPLES[kind]), body, "key")
                except DamagedRecord:
                    continue
                assert depth < 1_000, "only what the stack bears is accepted"
                assert tail


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"a\xf5", b"\x00", b"\\ud800"])
def test_text_that_is_not_utf8_or_not_json_is_refused_although_its_digest_is_right(text: bytes) -> None:
    body = forge("ledger", b'{"commits":[],"meta":{"a":"' + text + b'"},"floor":0}')
    with pytest.raises(DamagedRecord):
        decode(Ledger, body, "key")


def test_random_bytes_raise_nothing_but_damaged_record(figure: Figure) -> None:
    count = 0

    @st.composite
    def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
        kind = draw(st.sampled_from(sorted(SAMPLES)))
        whole = draw(st.booleans())
        text = encode(SAMPLES[kind]) if whole else _text(kind)
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        noise = draw(st.one_of(st.binary(max_size=8), st.text(max_size=8).map(str.encode), st.sampled_from(SNIPPETS)))
        mixed = text[:start] + noise + text[end:]
        return kind, draw(st.one_of(st.binary(max_size=40), st.just(mixed))) if whole else forge(kind, mixed)

    @settings(max_examples=1_200, deadline=None, derandomize=True, database=None)
    @given(bodies())
    def check(case: tuple[str, bytes]) -> None:
        nonlocal count
        kind, body = case
        count += 1
        try:
            value = decode(type(SAMPLES[kind]), body, "key")
        except DamagedRecord:
            return
        assert encode(value) == body

    check()
    figure("random records", f"{count:,} decoded or refused")


SNIPPETS = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"{}",
    b"[]",
    b'"',
    b"\\ud800",
    b'"a":1,',
    b",",
    b"\xff",
]


# --------------------------------------------------------------------------------------------------- hostile, well signed

LEADING_OUT = [
    "../x",
    "x/../../y",
    "..",
    ".",
    "",
    "/x",
    "/etc/passwd",
    "x//y",
    "x/",
    "_staged/t/head",
    "x/_staged/y",
    "x\0y",
]
NEVER_WRITTEN = [
    "..\\x",
    "C:/x",
    "C:x",
    "x\ny",
    "x.",
    "x ",
    "con",
    "nul.txt",
    "_STAGED/x",
    "＿staged/x",
    "x" * 256,
    "y/" * 501,
]


def _with_path(path: str) -> dict[str, object]:
    """Records that name this path where we would write."""
    record, plan = SAMPLES["transaction"], SAMPLES["plan"]
    assert isinstance(record, TxRecord) and isinstance(plan, PlanPart)
    return {
        "a manifest": ManifestPart((Entry("sound", 1, "i", "h"), Entry(path, 1, "i", "h"))),
        "a plan's replaces": replace(plan, replaces={"sound": "i", path: "i"}),
        "a delete": replace(record, deletes=("sound", path)),
        "a partition": replace(record, partitions=("sound", path)),
    }


def test_a_path_that_a_user_could_not_write_is_refused_in_every_record() -> None:
    accepted = []
    for path in LEADING_OUT + NEVER_WRITTEN:
        for place, value in _with_path(path).items():
            try:
                decode(type(value), encode(value), "key")
            except DamagedRecord:
                continue
            accepted.append((place, path))
    assert accepted == []
    for value in _with_path("a/sound-1").values():
        assert decode(type(value), encode(value), "key") == value


def test_a_removal_that_leads_out_of_the_target_or_into_a_control_area_is_refused() -> None:
    for path in LEADING_OUT:
        part = PlanPart(remove=(Listed("sound", 1, "i"), Listed(path, 1, "i")))
        with pytest.raises(DamagedRecord):
            decode(PlanPart, encode(part), "key")


def test_a_removal_of_what_others_named_as_they_liked_is_accepted() -> None:
    for path in ("a b ", "dots.", "..x", "C:x", "a\\b", "line\nbreak", "nul", "x" * 300, "_STAGED_"):
        part = PlanPart(remove=(Listed(path, 1, "i"),))
        assert decode(PlanPart, encode(part), "key") == part


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "log/../../../x", "", ".", "x\0y"])
def test_a_reference_that_leads_out_of_the_control_area_is_refused(key: str) -> None:
    # What a reference names is read, and a superseded ledger is deleted by its key.
    ref = Ref(key, 1, "d" * 64)
    head, record, plan = (
        SAMPLES["head"],
        SAMPLES["transaction"],
        PlanPart(replace(HEADER, manifest=replace(MANIFEST, entries=ref))),
    )
    assert isinstance(head, Head) and isinstance(record, TxRecord)
    for value in (
        replace(head, plan=ref),
        replace(head, ledger=ref),
        replace(record, manifest=replace(MANIFEST, entries=ref)),
        plan,
    ):
        with pytest.raises(DamagedRecord):
            decode(type(value), encode(value), "key")


@pytest.mark.parametrize("wrong", ["", "x", "../" + ID[3:], ID.upper(), ID[1:], ID + "0", ID + "\n", "٠" * 24])
def test_an_id_that_is_none_is_refused_in_every_record(wrong: str) -> None:
    assert not is_id(wrong)
    head, record = SAMPLES["head"], SAMPLES["transaction"]
    assert isinstance(head, Head) and isinstance(record, TxRecord)
    for value in (
        replace(head, transaction=wrong),
        replace(record, id=wrong),
        Ledger((LedgerEntry(1, ID, "0a"), LedgerEntry(2, wrong, "0a"))),
        PlanPart(replace(HEADER, transaction=wrong)),
        Outcome(wrong, "committed"),
    ):
        with pytest.raises(DamagedRecord):
            decode(type(value), encode(value), "key")


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(DamagedRecord, match="size -1"):
        decode(ManifestPart, encode(ManifestPart((Entry("a", -1, "i", "h"),))), "key")


# ---------------------------------------------------------------------------------------------------- keys, meta, digests


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(), max_size=300))
@example("\ud800")
def test_a_key_is_refused_by_value_error_or_can_be_recorded(key: str) -> None:
    try:
        check_key(key)
    except ValueError as error:
        assert type(error) is InvalidInput
        assert not 0 < len(key) <= 256 or not key.isprintable()
        return
    ledger = Ledger((LedgerEntry(1, ID, "0a", key),))
    assert decode(Ledger, encode(ledger), "key") == ledger


def test_a_key_has_1_to_256_characters_and_may_be_absent() -> None:
    for key in (None, "x", "x" * 256):
        check_key(key)
    for key in ("", "x" * 257):
        with pytest.raises(ValueError, match="1 to 256"):
            check_key(key)


ODD = [
    *[{1: 2}, {"a": (1,)}, {"a": {1}}, {"a": b"x"}, {"a": float("nan")}, {"a": float("inf")}, {"a": object()}],
    *[{"a": "\ud800"}, {"\ud800": 1}, {"a": 10**6000}, {"a": dataclasses}],
    {"a": "x" * MAX_META},
]


@pytest.mark.parametrize("meta", ODD, ids=lambda meta: repr(meta)[:16] if 10**6000 not in meta.values() else "10**6000")
def test_a_meta_that_json_cannot_carry_is_refused_by_value_error(meta: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        check_meta(meta)


def _deeper(frames: int, call: Callable[[], bool]) -> bool:
    """Call from further down the stack."""
    return _deeper(frames - 1, call) if frames else call()


def test_a_meta_of_any_depth_is_refused_by_value_error_or_can_be_read_by_whoever_calls() -> None:
    refused = 0
    meta: dict[str, object] = {}
    for _ in range(1_200):
        meta = {"a": meta}
        try:
            check_meta(meta)
        except ValueError:
            refused += 1
        else:
            body = encode(Ledger(meta=meta))
            assert _deeper(200, lambda body=body: encode(decode(Ledger, body, "key")) == body)  # type: ignore[misc]
    assert 0 < refused < 1_200


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(), JSON))
def test_a_meta_of_json_values_is_accepted_and_can_be_recorded(meta: dict[str, object]) -> None:
    check_meta(meta)
    assert decode(Ledger, encode(Ledger(meta=meta)), "key").meta == meta


def test_the_digest_of_segments_tells_their_order_their_cut_and_their_number() -> None:
    bodies = [[], [b""], [b"", b""], [b"ab"], [b"a", b"b"], [b"b", b"a"], [b"", b"ab"], [b"ab", b""]]
    assert len({digest_of(body) for body in bodies}) == len(bodies)
