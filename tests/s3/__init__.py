"""Servers of others that answer as S3 does, on loopback, and a proxy before them that counts, delays and fails.

    with S3Server("ministack") as server, S3Proxy(server.url, plan="lost@PutObject:0") as proxy:
        server.client(proxy.url).put_object(Bucket=server.bucket(), Key="k", Body=b"")

What each server does as S3 does is in `HONOURS`, and tests/test_s3_servers.py holds them to it.
"""

from .faults import FAULTS, Fault, Plan
from .proxy import Record, S3Proxy
from .servers import HONOURS, SERVERS, S3Server, client_of, honours

__all__ = ["FAULTS", "HONOURS", "SERVERS", "Fault", "Plan", "Record", "S3Proxy", "S3Server", "client_of", "honours"]
