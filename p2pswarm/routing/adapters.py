"""Which adapter a user means by its name: servers announce `name@fingerprint`, people say `name`. Pure."""

from collections import Counter
from collections.abc import Iterable

from p2pswarm.core.errors import AdapterNotFound, ConfigError
from p2pswarm.core.server_info import ServerInfo


def find_adapter(name: str, servers: Iterable[ServerInfo]) -> str:
    """The id of the only announced adapter of that name or id.

    Raises `AdapterNotFound`, or `ConfigError` where different ones go by the name.
    """
    announced = Counter(adapter for server in servers for adapter in server.adapters)
    if name in announced:
        return name
    found = [adapter for adapter in announced if adapter.rpartition("@")[0] == name]
    if len(found) > 1:
        numbers = ", ".join(f"{adapter} ({announced[adapter]} servers)" for adapter in sorted(found))
        raise ConfigError(f"the adapter {name} may be any of {numbers}: give the whole id")
    if not found:
        others = f"announced are {', '.join(sorted(announced))}" if announced else "none is announced"
        raise AdapterNotFound(f"no server announces the adapter {name}; {others}")
    return found[0]
