"""Serve until the standard input ends or the process is stopped; prints the address."""

from __future__ import annotations

import argparse
import sys

from .server import GcsServer

parser = argparse.ArgumentParser(prog="python -m gcs", description=__doc__)
parser.add_argument("buckets", nargs="+", help="their names")
parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
parser.add_argument("--plan", default="", help="faults, such as 'loses@7 replays@move:0+3'")
given = parser.parse_args()

with GcsServer(port=given.port, plan=given.plan) as server:
    for name in given.buckets:
        server.store.create_bucket(name)
    print(server.url, flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
