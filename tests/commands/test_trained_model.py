"""A trained model back from a checkpoint or a folder, and what is refused."""

import os

import pytest
import torch

from comet_pl import CometForCausalLM
from comet_pl.build import load_checkpoint
from comet_pl.errors import UserError

# ---- a trained model back


def test_a_trained_model_comes_back_whole(trained):
    last = trained / "checkpoints" / "last.ckpt"
    model, tokenizer, config = load_checkpoint(trained, [f"ckpt={trained}"])
    assert isinstance(model, CometForCausalLM)
    assert not model.training
    weights = torch.load(last, weights_only=True)["state_dict"]
    assert all(
        torch.equal(weights[f"model.{name}"], value) for name, value in model.state_dict().items()
    )
    assert (config.model.chunk_size, config.data.train_length) == (16, 64)
    ids = tokenizer(" The pass key is 12345", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == " The pass key is 12345"
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == list("12345")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.chat_template


def test_keys_over_a_trained_model(trained):
    model, _, config = load_checkpoint(
        trained / "checkpoints" / "best.ckpt", ["ckpt=x", "model.chunk_size=8", "eval.depths=3"]
    )
    assert (model.config.chunk_size, config.eval.depths) == (8, 3)
    with pytest.raises(
        UserError, match=r"adapter_rank.*: 2 given, but this checkpoint's weights were made with 8"
    ):
        load_checkpoint(trained, ["ckpt=x", "model.adapter_rank=2"])


def test_a_saved_model_folder_loads_too(trained, tmp_path):
    model, tokenizer, _ = load_checkpoint(trained, ["ckpt=x"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same, _ = load_checkpoint(tmp_path, [f"ckpt={tmp_path}", "model.chunk_size=8"])
    assert again.config.chunk_size == 8
    assert same("key 7")["input_ids"] == tokenizer("key 7")["input_ids"]
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "foreign", "other"])
def test_other_files_are_refused_in_one_line(trained, tmp_path, content):
    file = tmp_path / "x.ckpt"
    if content == "foreign":
        torch.save({"state_dict": {}}, file)
    elif content == "other":
        checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
        checkpoint["state_dict"].popitem()
        torch.save(checkpoint, file)
    else:
        whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    match = {"foreign": "not one that train.py wrote", "other": "do not fit"}.get(
        content, "not a readable checkpoint"
    )
    with pytest.raises(UserError, match=match):
        load_checkpoint(file, ["ckpt=x"])
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "y.ckpt", ["ckpt=y"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_read(tmp_path):
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"")
    file.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(file, ["ckpt=x"])
