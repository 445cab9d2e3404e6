"""python -m comet_pl.export: plain weights that compute what the checkpoint computed."""

import json
import runpy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.build import load_checkpoint
from comet_pl.config.load import from_dict
from comet_pl.config.schema import PARAMETERS
from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import read_checkpoint
from comet_pl.export import main
from comet_pl.training.trainable import add_adapters
from tests.support.models import backbone
from tests.support.tiny_runs import ROOT, TINY
from train import main as train

KEYS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "monitor.gates=false",
    "data.train_length=64",
    "data.length_schedule=null",
    "data.batch_size=2",
    "train.lr=1e-2",
    "train.warmup_steps=0",
    "eval.after_fit=false",
    "run.name=run",
]
# whether the head is tied in the runs that quick tests share
QUICK = {"all": True, "memory": False, "memory+lora": False}
PAIRS = [
    pytest.param(name, tied, marks=[pytest.mark.slow] if QUICK.get(name) != tied else [])
    for name in PARAMETERS
    for tied in (True, False)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, by what was trained and whether the head is tied."""
    runs = {}

    def get(parameters, tied=None):
        tied = QUICK[parameters] if tied is None else tied
        if (parameters, tied) not in runs:
            root = tmp_path_factory.mktemp("runs")
            head = f"backbone.tie_word_embeddings={str(tied).lower()}"
            train([f"run.root={root}", *TINY, *KEYS, f"train.parameters={parameters}", head])
            runs[parameters, tied] = root / "passkey" / "run"
        return runs[parameters, tied]

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


def same_weights(model, other):
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("parameters", "tied"), PAIRS)
def test_the_folder_computes_what_the_checkpoint_computed(trained, parameters, tied, tmp_path):
    run, folder = trained(parameters, tied), tmp_path / "deep" / "folder"
    # a killed export has left a file of another model
    killed = folder.with_name(".folder.part") / "model-00009.safetensors"
    killed.parent.mkdir(parents=True)
    killed.touch()
    main([str(run), str(folder)])
    assert list((tmp_path / "deep").iterdir()) == [folder]
    assert not (folder / killed.name).exists()
    expected = logits(as_trained(run))
    model = CometForCausalLM.from_pretrained(folder)
    close(logits(model), expected)
    assert set(model.state_dict()) == set(CometForCausalLM(model.config).state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(auto, CometForCausalLM) and same_weights(model, auto)
    # what eval.py and the notebook start from is plain, too
    model, _, config = load_checkpoint(run, [f"ckpt={run}"])
    assert config.train.parameters == parameters
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    close(logits(model), expected)


def test_what_was_trained_is_the_checkpoints_own(trained):
    """Not what eval.py's arguments say."""
    run = trained("memory+lora")
    model, _, _ = load_checkpoint(run, [f"ckpt={run}", "train.parameters=all"])
    close(logits(model), logits(as_trained(run)))


@pytest.mark.parametrize("parameters", ["memory", "all"])
def test_a_trained_model_with_fewer_slots(trained, parameters):
    """A key of eval.py that leaves out rows which were trained."""
    run = trained(parameters)
    few, _, _ = load_checkpoint(run, ["ckpt=x", "model.global_size=1"])
    assert len(few.config.readout_token_ids) == 1
    whole, _, _ = load_checkpoint(run, ["ckpt=x"])
    assert same_weights(whole, few)


def test_the_tokenizer_comes_along(trained, tmp_path):
    run = trained("memory")
    main([str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "folder")])
    _, expected, _ = load_checkpoint(run, [f"ckpt={run}"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "The pass key is 12345. <|end|>"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the pass key?"}]
    rendered = [one.apply_chat_template(chat, tokenize=False) for one in (tokenizer, expected)]
    assert rendered[0] == rendered[1]
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer.pad_token_id == expected.pad_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_another_type(trained, tmp_path, dtype):
    run, folder = trained("memory+lora"), tmp_path / "folder"
    main([str(run), str(folder), "--dtype", dtype])
    model = CometForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    expected = logits(as_trained(run))
    assert float((logits(model) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    # a folder can be exported, too
    main([str(folder), str(tmp_path / "again")])
    assert same_weights(model, CometForCausalLM.from_pretrained(tmp_path / "again"))


def test_an_exported_folder_can_be_trained_on(trained, tmp_path):
    """In float32 even if the folder holds bfloat16: an optimizer's small steps would be lost."""
    main([str(trained("memory+lora")), str(tmp_path / "folder"), "--dtype", "bfloat16"])
    keys = [*TINY, *KEYS, f"run.root={tmp_path}", "train.parameters=lora"]
    keys = [key for key in keys if not key.startswith("backbone.")]
    train([*keys, f"backbone.path={tmp_path / 'folder'}"])
    checkpoint = read_checkpoint(tmp_path / "passkey" / "run" / "checkpoints" / "last.ckpt")
    weights = checkpoint["state_dict"].items()
    types = {value.dtype for name, value in weights if name.startswith("model.")}
    assert types == {torch.float32}


# -- mistakes


def refused(match, *argv):
    with pytest.raises(UserError, match=match) as caught:
        main([str(argument) for argument in argv])
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path):
    run, target, half = trained("memory"), tmp_path / "target", tmp_path / "half.ckpt"
    refused(r"^ckpt: .*nowhere does not exist$", tmp_path / "nowhere", target)
    refused(r"FOLDER; --help lists the options$", run)
    dtype = r"--dtype: invalid choice: 'int8' \(choose from .*float32.*\); --help"
    refused(dtype, run, target, "--dtype", "int8")
    refused(r"unrecognized arguments: --dt bfloat16; --help", run, target, "--dt", "bfloat16")
    content = (run / "checkpoints" / "last.ckpt").read_bytes()
    half.write_bytes(content[: len(content) // 2])
    refused(r"half\.ckpt: (not a readable checkpoint|cannot be read)", half, target)
    assert list(tmp_path.iterdir()) == [half]
    refused(r"^.*half\.ckpt/x: cannot be written: ", run, half / "x")
    target.mkdir()
    refused(r"target: is there already; remove it first, or give another folder$", run, target)
    assert list(target.iterdir()) == []


def test_a_damaged_folder_is_one_line(trained, tmp_path):
    main([str(trained("memory")), str(tmp_path / "folder")])
    file = tmp_path / "folder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(r"^ckpt: .*folder cannot be loaded: ", tmp_path / "folder", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_plain_decoder_is_refused_instead_of_given_a_random_memory(tmp_path):
    AutoModelForCausalLM.from_config(backbone()).save_pretrained(tmp_path / "plain")
    random = "a memory plugged in now would be random; train it first"
    refused(rf"ckpt: .*plain is a plain decoder, and {random}", tmp_path / "plain", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_itself(tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["export", str(nowhere), str(tmp_path / "target")])
    monkeypatch.delitem(sys.modules, "comet_pl.export")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("comet_pl.export", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: ckpt: {nowhere} does not exist\n"


# -- a real model


@pytest.mark.slow
def test_smollm2_with_lora_trained_and_exported(tmp_path):
    folder = ROOT / "models" / "smollm2_135m"
    if not folder.is_dir():
        pytest.skip("no models/smollm2_135m; `make smollm2` makes it")
    sizes = {"chunk_size": 32, "global_size": 4, "compression_stride": 8, "temporary_capacity": 8}
    keys = [*KEYS, *(f"model.{key}={value}" for key, value in sizes.items())]
    keys += [f"backbone.path={folder}", "train.parameters=memory+lora", "train.lr=1e-4"]
    train([f"run.root={tmp_path}", *keys])
    run = tmp_path / "passkey" / "run"
    main([str(run), str(tmp_path / "folder")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # Real text: on nonsense, 30 layers in float32 are 4e-5 away from float64 whatever the weights.
    text = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. " * 3
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    close(logits(loaded, ids), logits(as_trained(run), ids))
    plain, rows = AutoModelForCausalLM.from_pretrained(folder), loaded.config.first_new_id
    assert torch.equal(loaded.model.embed_tokens.weight[:rows], plain.model.embed_tokens.weight)
    trained, before = (model.model.layers[0].mlp.down_proj.weight for model in (loaded, plain))
    assert not torch.equal(trained, before)
