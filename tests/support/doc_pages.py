"""Pages of the docs whose Python examples run as they stand, one after the other, as one program."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_examples(page_name: str, model: str, peers: list[str]) -> dict[str, object]:
    """Runs all examples but the first, which names a model and peers that readers have. Returns the program's names."""
    page = DOCS / page_name
    names, *examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert names.startswith("MODEL = ")
    world: dict[str, object] = {"MODEL": model, "PEERS": peers}
    for example in examples:
        exec(compile(example, str(page), "exec"), world)
    return world
