"""Reaching nodes behind routers: finding out who is, relays, and ways around them. Start at `nat/reachability.py`."""
