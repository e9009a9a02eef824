import torch

from simulations.architectures.run import DIFFERS, EXACT, PART, REFUSED, Finding, table, try_type, with_fate_of_parts


def test_types_are_tried_refused_or_sent_to_their_language_model() -> None:
    torch.set_num_threads(1)

    assert try_type("gpt2").status == EXACT
    assert try_type("mamba").status == REFUSED
    assert try_type("moshi").note.startswith("transformers forgets")
    assert try_type("gemma3") == Finding("gemma3", PART, "gemma3_text")


def test_a_model_is_refused_with_its_language_model() -> None:
    findings = with_fate_of_parts(
        [
            Finding("whole", PART, "good"),
            Finding("half", PART, "bad"),
            Finding("good", EXACT, "0"),
            Finding("bad", REFUSED, "no"),
        ]
    )

    assert findings[0] == Finding("whole", PART, "good")
    assert findings[1] == Finding("half", REFUSED, "its language model, bad, is refused")


def test_the_table_counts_and_lists_every_type() -> None:
    page = table([Finding("good", EXACT, "1e-07"), Finding("bad", DIFFERS, "a | b")])

    assert "| exact | 1 |" in page
    assert "| `good` | 1e-07 |" in page
    assert "| `bad` | a \\| b |" in page
