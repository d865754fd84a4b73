"""Serve until the standard input ends or the process is stopped; prints the address."""

from __future__ import annotations

import argparse
import sys

from .server import DfsServer

parser = argparse.ArgumentParser(prog="python -m tests.dfs", description=__doc__)
parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
parser.add_argument("--plan", default="", help="faults, such as 'loses@7 replays@rename:0+3'")
parser.add_argument("--onelake", metavar="WORKSPACE/ITEM", help="OneLake's rules, and an item")
given = parser.parse_args()

with DfsServer(port=given.port, plan=given.plan, onelake=given.onelake is not None) as server:
    if given.onelake is not None:
        server.add_item(*given.onelake.split("/"))
    print(server.url, flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
