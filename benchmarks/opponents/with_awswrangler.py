"""awswrangler: a dataset overwritten by a table cut into so many files, whose numbers are of the size asked for."""

from __future__ import annotations

import time

import awswrangler
import numpy
import pandas

from .job import Job, asked, tell


def main(job: Job) -> None:
    rows = max(1, job.size // 8)
    frame = pandas.DataFrame({"x": numpy.random.default_rng(1).random(rows * job.files)})

    def write(url: str) -> float:
        awswrangler.config.s3_endpoint_url = url
        began = time.perf_counter()
        awswrangler.s3.to_parquet(
            frame, f"s3://{job.place}/t/", dataset=True, mode="overwrite", max_rows_by_file=rows, compression=None
        )
        return time.perf_counter() - began

    write(job.near)
    tell(whole=write(job.far))


main(asked())
