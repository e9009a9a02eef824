"""`[HOST:]PORT` of the command line: where an operator's tools may ask this server over HTTP."""

import ipaddress
from dataclasses import dataclass

from p2pswarm.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """An IP address to listen on, this machine's own unless said otherwise, and a port; 0: any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "HttpAddress":
        """Raises `ConfigError`."""
        host, _, port = text.rpartition(":")
        try:
            address = cls(str(ipaddress.ip_address(host.strip("[]"))) if host else LOOPBACK, int(port))
        except ValueError as error:
            raise ConfigError(f"wanted PORT or IP:PORT to listen on (9464, 0.0.0.0:9464), got {text!r}") from error
        if not 0 <= address.port <= MAX_PORT:
            raise ConfigError(f"wanted a TCP port from 0 (any free one) to {MAX_PORT}, got {text!r}")
        return address

    def url(self, port: int) -> str:
        """Of the page, once it is known on which port it is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}/metrics"
