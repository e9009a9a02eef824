"""From the flags of the command line to the options of transformers' `generate`."""

from typing import Any

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""With what sampling would use at its neutral values, or transformers warns that it is not used."""


def sampling_options(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Nothing given: the model's own recommended settings. Temperature 0: greedy. Else sampling with what was given."""
    if temperature == 0:
        return dict(GREEDY)
    given = {"temperature": temperature, "top_p": top_p}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **options} if options else {}
