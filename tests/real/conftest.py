"""The fixture `tiny_servers`."""

from tiny_servers import tiny_servers

__all__ = ["tiny_servers"]
