"""Kademlia over our own streams: a key holds one signed, expiring record per server. Start at `dht/node.py`."""
