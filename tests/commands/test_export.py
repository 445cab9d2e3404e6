"""python -m comet_pl.export: a folder of plain weights that computes what the checkpoint computed; whole, or not at all."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.checkpoints import read_checkpoint
from comet_pl import CometConfig, CometForCausalLM
from comet_pl.build import load_checkpoint
from comet_pl.config.load import from_dict
from comet_pl.config.schema import PARAMETERS
from comet_pl.errors import UserError
from comet_pl.export import main
from comet_pl.training.trainable import add_adapters
from tests.support.tiny_runs import ROOT, TINY

train = runpy.run_path(str(ROOT / "train.py"))["main"]
KEYS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "data.train_length=64",
    "data.length_schedule=null",
    "data.batch_size=2",
    "train.lr=1e-2",
    "train.warmup_steps=0",
    "eval.after_fit=false",
    "run.name=run",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, by what was trained and whether the head is tied."""
    made: dict[tuple[str, bool], Path] = {}

    def get(parameters, tied=True):
        if (parameters, tied) not in made:
            root = tmp_path_factory.mktemp("runs")
            keys = [
                *TINY,
                *KEYS,
                f"train.parameters={parameters}",
                f"backbone.tie_word_embeddings={str(tied).lower()}",
            ]
            train([f"run.root={root}", *keys])
            made[parameters, tied] = root / "passkey" / "run"
        return made[parameters, tied]

    return get


def as_trained(run):
    """The checkpoint's model with its adapters beside the weights, as in training."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    content = checkpoint["comet"]
    model = CometForCausalLM(CometConfig.from_dict(json.loads(content["model"])))
    add_adapters(model, from_dict(content["config"]).train)
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    )
    return model.eval()


def logits(model, ids=None):
    ids = torch.arange(90).view(2, 45) % 250 + 4 if ids is None else ids
    with torch.no_grad():
        return model(ids).logits.float()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_the_folder_computes_what_the_checkpoint_computed(trained, parameters, tied, tmp_path):
    run = trained(parameters, tied)
    main([str(run), str(tmp_path / "deep" / "folder")])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    expected = logits(as_trained(run))
    model = CometForCausalLM.from_pretrained(tmp_path / "deep" / "folder")
    close(logits(model), expected)
    assert set(model.state_dict()) == set(CometForCausalLM(model.config).state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "folder")
    assert isinstance(auto, CometForCausalLM)
    assert all(
        torch.equal(value, auto.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_trained_model_is_plain(trained, parameters):
    """What eval.py and the notebook start from."""
    run = trained(parameters)
    model, _, config = load_checkpoint(run, [f"ckpt={run}"])
    assert config.train.parameters == parameters
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    close(logits(model), logits(as_trained(run)))


def test_what_was_trained_is_the_checkpoints_own(trained):
    """Not what eval.py's arguments say."""
    run = trained("memory+lora")
    model, _, _ = load_checkpoint(run, [f"ckpt={run}", "train.parameters=all"])
    close(logits(model), logits(as_trained(run)))


def test_a_trained_model_with_fewer_slots(trained):
    """Keys of eval.py that leave out rows which were trained."""
    run, plain = trained("memory"), trained("all")
    few = [load_checkpoint(one, ["ckpt=x", "model.global_size=1"])[0] for one in (run, plain)]
    assert [len(model.config.readout_token_ids) for model in few] == [1, 1]
    whole, _, _ = load_checkpoint(run, ["ckpt=x"])
    assert all(
        torch.equal(value, few[0].state_dict()[name]) for name, value in whole.state_dict().items()
    )


def test_the_tokenizer_comes_along(trained, tmp_path):
    run = trained("memory")
    main([str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "folder")])
    _, expected, _ = load_checkpoint(run, [f"ckpt={run}"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "The pass key is 12345. <|end|>"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the pass key?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(
        chat, tokenize=False
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        expected.eos_token_id,
        expected.pad_token_id,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_another_type(trained, tmp_path, dtype):
    run, folder = trained("memory+lora"), tmp_path / "folder"
    main([str(run), str(folder), "--dtype", dtype])
    model = CometForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    expected = logits(as_trained(run))
    assert float((logits(model) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    main([str(folder), str(tmp_path / "again")])  # a folder, too, is something to export
    again = CometForCausalLM.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_an_exported_folder_can_be_trained_on(trained, tmp_path):
    """In float32, also where the folder holds bfloat16: an optimizer's small steps would be lost."""
    main([str(trained("memory+lora")), str(tmp_path / "folder"), "--dtype", "bfloat16"])
    model = [key for key in TINY if not key.startswith("backbone.")]
    keys = [
        *model,
        *KEYS,
        "train.parameters=lora",
        f"backbone.path={tmp_path / 'folder'}",
        f"run.root={tmp_path / 'runs'}",
    ]
    train(keys)
    weights = read_checkpoint(tmp_path / "runs" / "passkey" / "run" / "checkpoints" / "last.ckpt")[
        "state_dict"
    ]
    assert {value.dtype for name, value in weights.items() if name.startswith("model.")} == {
        torch.float32
    }


# ---- mistakes


def refused(match, *argv):
    with pytest.raises(UserError, match=match) as caught:
        main([str(argument) for argument in argv])
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path):
    run, target = trained("memory"), tmp_path / "target"
    refused(r"^ckpt: .*nowhere does not exist$", tmp_path / "nowhere", target)
    refused(r"FOLDER; --help lists the options$", run)
    refused(
        r"--dtype: invalid choice: 'int8' \(choose from .*float32.*\); --help",
        run,
        target,
        "--dtype",
        "int8",
    )
    refused(r"unrecognized arguments: --dt bfloat16; --help", run, target, "--dt", "bfloat16")
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    refused(
        r"half\.ckpt: (not a readable checkpoint|cannot be read)", tmp_path / "half.ckpt", target
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.ckpt"]
    refused(r"^.*half\.ckpt/x: cannot be written: ", run, tmp_path / "half.ckpt" / "x")
    target.mkdir()
    refused(r"target: is there already; remove it first, or give another folder$", run, target)
    assert list(target.iterdir()) == []


def test_a_damaged_folder_is_one_line(trained, tmp_path):
    main([str(trained("memory")), str(tmp_path / "folder")])
    file = tmp_path / "folder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(r"^ckpt: .*folder cannot be loaded: ", tmp_path / "folder", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_command_itself(tmp_path):
    argv = [
        sys.executable,
        "-m",
        "comet_pl.export",
        str(tmp_path / "nowhere"),
        str(tmp_path / "target"),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: ckpt: {tmp_path / 'nowhere'} does not exist\n",
    )


# ---- a real model


@pytest.mark.slow
def test_smollm2_with_lora_trained_and_exported(tmp_path):
    folder = ROOT / "models" / "smollm2_135m"
    if not folder.is_dir():
        pytest.skip("no models/smollm2_135m; `make smollm2` makes it")
    model = [
        "model.chunk_size=32",
        "model.global_size=4",
        "model.compression_stride=8",
        "model.temporary_capacity=8",
    ]
    train(
        [
            f"run.root={tmp_path}",
            *KEYS,
            *model,
            f"backbone.path={folder}",
            "train.parameters=memory+lora",
            "train.lr=1e-4",
        ]
    )
    run = tmp_path / "passkey" / "run"
    main([str(run), str(tmp_path / "folder")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # Real text: on nonsense, 30 layers in float32 are 4e-5 away from float64, whichever way the weights are.
    sentence = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        * 3
    )
    ids = AutoTokenizer.from_pretrained(tmp_path / "folder")(sentence, return_tensors="pt")[
        "input_ids"
    ]
    close(logits(loaded, ids), logits(as_trained(run), ids))
    plain, rows = AutoModelForCausalLM.from_pretrained(folder), loaded.config.first_new_id
    assert torch.equal(loaded.model.embed_tokens.weight[:rows], plain.model.embed_tokens.weight)
    assert not torch.equal(
        loaded.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight
    )


def test_a_plain_decoder_is_refused_instead_of_given_a_random_memory(tmp_path):
    from tests.support.models import backbone

    AutoModelForCausalLM.from_config(backbone()).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        UserError,
        match=r"ckpt: .*plain is a plain decoder, and a memory plugged in now would be random; train it first",
    ):
        main([str(tmp_path / "plain"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
