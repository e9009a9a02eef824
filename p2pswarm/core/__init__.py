"""The nouns: ids, spans, announcements, errors, clock. No I/O, no torch, no libp2p."""
