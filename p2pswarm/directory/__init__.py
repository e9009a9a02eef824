"""Who serves what: announcements, the announcer of a server, a client's live view. Start at
`directory/directory.py`."""
