"""Model types that cannot be cut into spans, and why: the one place where a model type is known by its name.

Here stands only what `architecture.py` cannot see in a config or in the shape of a model.
"""

from collections.abc import Mapping

REFUSALS: Mapping[str, str] = {}
