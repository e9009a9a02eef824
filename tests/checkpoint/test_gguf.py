import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.errors import CheckpointError, UnsupportedModelError
from p2pswarm.core.span import Span
from p2pswarm.testing.exactness import measure_exactness

NUM_BLOCKS = 4
HIDDEN = 64
HEADS = 4
KEY_VALUE_HEADS = 2
FEED_FORWARD = 96
WORDS = ["<unk>", "<s>", "</s>"] + [f"w{index}" for index in range(61)]


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """A tiny model in llama.cpp's layout, its matrices quantised to Q8_0, its vectors in float32."""
    random = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(NUM_BLOCKS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([2, 3, 3] + [1] * 61)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=numpy.float32) / columns**0.5
        quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, 1 + 0.1 * random.standard_normal(size, dtype=numpy.float32))

    head = HIDDEN // HEADS
    matrix("token_embd.weight", len(WORDS), HIDDEN)
    vector("output_norm.weight", HIDDEN)
    for index in range(NUM_BLOCKS):
        vector(f"blk.{index}.attn_norm.weight", HIDDEN)
        vector(f"blk.{index}.ffn_norm.weight", HIDDEN)
        matrix(f"blk.{index}.attn_q.weight", HEADS * head, HIDDEN)
        matrix(f"blk.{index}.attn_k.weight", KEY_VALUE_HEADS * head, HIDDEN)
        matrix(f"blk.{index}.attn_v.weight", KEY_VALUE_HEADS * head, HIDDEN)
        matrix(f"blk.{index}.attn_output.weight", HIDDEN, HEADS * head)
        matrix(f"blk.{index}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{index}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{index}.ffn_down.weight", HIDDEN, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def converted_groups(cache: Path) -> set[str]:
    return {path.stem for path in cache.glob("weights/gguf/*/*.safetensors")}


def test_tensors_equal_those_that_transformers_loads(file: Path) -> None:
    checkpoint = open_checkpoint(str(file))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config)
    expected = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]

    got = checkpoint.read(checkpoint.tensor_names)

    assert got.keys() == expected.keys()
    assert len(got) == 2 + 9 * NUM_BLOCKS
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_spans_of_a_gguf_model_give_the_local_model_s_answers(file: Path) -> None:
    assert measure_exactness(open_checkpoint(str(file)), [Span(0, 1), Span(1, 4)]).is_exact()


def test_only_the_span_s_blocks_are_converted_and_only_once(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_span(open_checkpoint(str(file)), Span(1, 3))
    assert converted_groups(own_cache) == {"blk.1", "blk.2"}

    def fail(*arguments: object) -> None:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr(gguf, "GGUFReader", fail)
    load_span(open_checkpoint(str(file)), Span(1, 3))


def test_several_servers_may_convert_at_once(file: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        checkpoints = list(threads.map(open_checkpoint, [str(file)] * 3))
        read = list(threads.map(lambda checkpoint: checkpoint.read(checkpoint.tensor_names), checkpoints))

    assert [sorted(tensors) for tensors in read] == [sorted(checkpoints[0].tensor_names)] * 3


def test_the_id_names_the_file_and_its_contents(file: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(file))

    assert checkpoint.model_id.startswith("tiny@")
    assert checkpoint.num_blocks == NUM_BLOCKS
    assert checkpoint.dtype == torch.float32


def test_the_tokenizer_comes_from_the_file(file: Path, own_cache: Path) -> None:
    tokenizer = open_checkpoint(str(file)).tokenizer()

    assert tokenizer.convert_tokens_to_ids("w7") == WORDS.index("w7")
    (folder,) = own_cache.glob("weights/gguf/*")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (folder / "tokenizer.json").exists()


def test_an_architecture_that_transformers_cannot_convert_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "other.gguf", architecture="wavtokenizer-dec")

    with pytest.raises(UnsupportedModelError, match="wavtokenizer"):
        open_checkpoint(str(file))


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")

    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        open_checkpoint(str(tmp_path / "fake.gguf"))
