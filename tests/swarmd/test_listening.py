"""Where a node listens."""

import pytest

from p2pswarm.core.errors import ConfigError
from swarmd import listen
from swarmd.listen import listen_addresses


def test_without_a_host_every_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "has_ipv6", lambda: True)
    assert listen_addresses(None, 4001) == ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")
    monkeypatch.setattr(listen, "has_ipv6", lambda: False)
    assert listen_addresses(None, 0) == ("/ip4/0.0.0.0/tcp/0",)


def test_a_host_is_an_ip_address() -> None:
    assert listen_addresses("127.0.0.1", 0) == ("/ip4/127.0.0.1/tcp/0",)
    assert listen_addresses("[::1]", 7) == ("/ip6/::1/tcp/7",)
    with pytest.raises(ConfigError, match=r"wanted an IP address to listen on .*got 'localhost'"):
        listen_addresses("localhost", 0)
