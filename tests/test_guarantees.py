"""The table of guarantees in the README is what the drivers declare, and each "no" in it is refused when it is required."""

from __future__ import annotations

from pathlib import Path

import anyio
import azurite
import guarantees
import pytest

from staged import open_store
from staged.errors import Unsupported
from staged.model import Mode

needs_azurite = pytest.mark.skipif(bool(azurite.missing()), reason=azurite.missing())
STORES = [pytest.param(name, marks=needs_azurite if "Blob" in name else ()) for name in guarantees.STORES]


@needs_azurite
def test_the_table_of_the_readme_is_what_the_drivers_declare() -> None:
    assert guarantees.within(guarantees.README.read_text())[0] == anyio.run(guarantees.table), (
        "run: python tests/guarantees.py"
    )


@pytest.mark.anyio
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("guarantee", guarantees.GUARANTEES)
async def test_each_yes_may_be_required_and_each_no_is_refused_with_nothing_begun(
    store: str, guarantee: guarantees.Guarantee, tmp_path: Path
) -> None:
    rows = await guarantees.declared(store, str(tmp_path / "probed"))
    modes = {mode for row in rows for mode in row.modes}
    refused = {Mode.OVERWRITE_FILES, Mode.OVERWRITE_PARTITIONS} if "Open Mirroring" in store else set()
    assert modes == set(Mode) - refused
    async with open_store(guarantees.STORES[store](str(tmp_path / "target"))) as opened:
        for row in rows:
            for mode in row.modes:
                if guarantee in row.promised:
                    await (await opened.begin(mode, require=[guarantee])).rollback()
                    continue
                with pytest.raises(
                    Unsupported, match=rf"does not promise {guarantee} for mode '{mode}'.*Nothing was begun"
                ):
                    await opened.begin(mode, require=[guarantee])
        for mode in refused:
            with pytest.raises(Unsupported, match="keeps what was published"):
                await opened.begin(mode)
        assert (await opened.status()).transactions == ()
