"""The object stores that are measured, each over the server of its tests."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3 import S3Proxy


class Proxied:
    """A store behind the proxy of the tests."""

    proxy: S3Proxy

    def behave(self, delay: float, throttle: int) -> None:
        self.proxy.delay, self.proxy.throttle = delay, throttle
        self.proxy.clear()

    def requests(self) -> Counter[str]:
        return Counter(self.proxy.counts)

    def sent(self) -> int:
        return self.proxy.traffic["up"]
