"""Run language models too large for one machine over a swarm of ordinary ones.

Where to start reading: `p2pswarm.client.swarm` (use a swarm from a trio program), `p2pswarm.models.auto` (use it from
blocking code, as a transformers model), `docs/architecture.md` (what is where, and why).
"""
