"""Assets of Dagster as Parquet files: a materialization that fails leaves what was there, and a retry replaces it whole."""

import os

import polars
from dagster import ConfigurableIOManager, InputContext, OutputContext

import staged.sync


class LakeIOManager(ConfigurableIOManager):
    """Keeps each asset in a directory, and each of its partitions in one below that."""

    root: str

    def handle_output(self, context: OutputContext, obj: polars.DataFrame) -> None:
        """Replace the asset, or the partition of it that this run is for."""
        partition = context.partition_key if context.has_partition_key else None
        mode = "full_drop" if partition is None else "overwrite_partitions"
        with (
            staged.sync.open_store(os.path.join(self.root, *context.asset_key.path)) as store,
            store.staged_write(mode, meta={"run": context.run_id}) as tx,
        ):
            tx.write_table(obj, os.path.join(partition or "", f"{tx.id}.parquet"))
        context.add_output_metadata({"rows": tx.receipt.rows, "transaction": tx.id})

    def load_input(self, context: InputContext) -> polars.DataFrame:
        """The asset as it is now, or those partitions of it that this run is for."""
        with staged.pinned(os.path.join(self.root, *context.asset_key.path)) as directory:
            partitions = context.asset_partition_keys if context.has_asset_partitions else [""]
            return polars.read_parquet([os.path.join(directory, partition) for partition in partitions])
