"""python -m comet_pl.export --memory-only: on a copy of the decoder it is the trained model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from comet_pl import CometForCausalLM
from comet_pl.chat.open_model import load
from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import load_trained
from comet_pl.experiment.memory_only import memory_of
from comet_pl.export import main
from comet_pl.model.memory_weights import FACTS, WEIGHTS
from tests.commands.test_export import KEYS
from tests.support.models import FAMILIES, MEMORY, backbone, text
from tests.support.tiny_runs import ROOT, TINY
from train import main as train

PLUG_IN = ["model.layout=trailing", "model.sink=learned", "model.slot_scale=0.6"]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids, chunk_sizes=[ids.shape[1] // 2, -(-ids.shape[1] // 2)]).logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with a plain decoder and a tokenizer, by whether its head is tied."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def get(tied):
        if tied not in made:
            start = [f"run.root={root}", *TINY, *KEYS, "trainer.max_steps=1"]
            train([*start, f"backbone.tie_word_embeddings={str(tied).lower()}"])
            model, tokenizer, _ = load_trained(root / "passkey" / "run", [])
            shutil.rmtree(root / "passkey")
            config = model.config.backbone_config
            config.vocab_size = model.config.first_new_id
            torch.manual_seed(7)
            made[tied] = root / str(tied)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[tied])
            tokenizer.save_pretrained(made[tied])
        return made[tied]

    return get


@pytest.mark.parametrize(
    ("parameters", "tied"),
    [
        ("memory+lora", False),
        pytest.param("memory", True, marks=pytest.mark.slow),
        pytest.param("memory+lora", True, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_a_copy_of_its_decoder(bases, parameters, tied, tmp_path):
    base, run = bases(tied), tmp_path / "passkey" / "run"
    keys = [*TINY, *KEYS, *PLUG_IN, f"backbone.path={base}", f"train.parameters={parameters}"]
    train([f"run.root={tmp_path}", *keys])
    main([str(run), str(tmp_path / "memory"), "--memory-only"])
    assert {file.name for file in (tmp_path / "memory").iterdir()} == {
        FACTS,
        WEIGHTS,
        "sha256.json",
    }
    copy = shutil.copytree(base, tmp_path / "copy")
    model = CometForCausalLM.from_pretrained(copy, memory=tmp_path / "memory")
    trained, _, _ = load_trained(run, [])
    ids = text(2, 60)
    assert torch.equal(logits(model, ids), logits(trained, ids))
    for found, *_ in (load_trained(tmp_path / "memory", []), load(str(tmp_path / "memory"), {})):
        assert torch.equal(logits(found, ids), logits(trained, ids)), "it knows its decoder"
    small = sum(file.stat().st_size for file in (tmp_path / "memory").iterdir())
    assert small < (copy / "model.safetensors").stat().st_size or parameters != "memory"
    half = CometForCausalLM.from_pretrained(
        copy, memory=tmp_path / "memory", dtype=torch.bfloat16, comet={"chunk_size": 5}
    )
    assert half.dtype == torch.bfloat16 and half.config.chunk_size == 5
    with pytest.raises(UserError, match="is there already"):
        main([str(run), str(tmp_path / "memory"), "--memory-only"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_decoder(family, tied, tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(backbone(family, tie_word_embeddings=tied))
    plain.save_pretrained(tmp_path / "plain")
    comet = MEMORY | {"sink": "learned", "slot_scale": 0.5, "gate_bias": 1.0}
    model = CometForCausalLM.from_decoder(plain, comet)
    with torch.no_grad():
        for _, parameter in model.memory_parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "whole")
    whole = CometForCausalLM.from_pretrained(tmp_path / "whole")
    memory_of(whole, None).save_pretrained(tmp_path / "memory")
    again = CometForCausalLM.from_pretrained(tmp_path / "plain", memory=tmp_path / "memory")
    ids = text(1, 30)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.fingerprint == model.fingerprint


# ---- mistakes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A decoder's folder and a memory's."""
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(backbone("llama")).save_pretrained(root / "plain")
    model = CometForCausalLM.from_pretrained(root / "plain", comet=MEMORY)
    memory_of(model, str(root / "plain")).save_pretrained(root / "memory")
    return root


def test_another_decoder_is_refused(small, tmp_path):
    torch.manual_seed(1)
    for config, difference in [
        (backbone("llama"), r"lm_head.weight differs from that decoder's"),
        (backbone("qwen2"), r"\(llama, embedding \[40, 16\]\), but this one is qwen2"),
        (backbone("llama", vocab_size=41), r"but this one is llama, embedding \[41, 16\]"),
        (backbone("llama", layers=1), r"but model\.layers\.1\.\S+ differs"),
    ]:
        other = AutoModelForCausalLM.from_config(config)
        if "layers" in difference:
            known = AutoModelForCausalLM.from_pretrained(small / "plain").state_dict()
            other.load_state_dict({name: known[name] for name in other.state_dict()})
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=rf"memory: made for {small / 'plain'}.*{difference}"):
            CometForCausalLM.from_pretrained(tmp_path / "other", memory=small / "memory")


def test_what_is_no_memory_is_refused(small, tmp_path):
    load = CometForCausalLM.from_pretrained
    with pytest.raises(ValueError, match=f"{tmp_path} is no folder that `comet_pl.export --memory"):
        load(small / "plain", memory=tmp_path)
    with pytest.raises(ValueError, match="the weights of a memory alone; give its decoder, and me"):
        load(small / "memory")
    with pytest.raises(ValueError, match="start: 3 given, but memory="):
        load(small / "plain", memory=small / "memory", start=3)
    with pytest.raises(ValueError, match=r"comet\['gate'\]: 'none' given"):
        load(small / "plain", memory=small / "memory", comet={"gate": "none"})
    load(small / "plain", comet=MEMORY).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="is a CoMeT with a memory of its own"):
        load(tmp_path / "whole", memory=small / "memory")


@pytest.mark.parametrize("file", [FACTS, WEIGHTS])
def test_damage_is_refused(small, file, tmp_path):
    folder = shutil.copytree(small / "memory", tmp_path / "memory")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: damaged"):
        CometForCausalLM.from_pretrained(small / "plain", memory=folder)
    (folder / "sha256.json").unlink()
    (folder / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"memory: {folder} cannot be read"):
        CometForCausalLM.from_pretrained(small / "plain", memory=folder)


def test_a_memory_whose_decoder_is_not_there(small, tmp_path):
    folder = tmp_path / "memory"
    model = CometForCausalLM.from_pretrained(small / "plain", memory=small / "memory")
    memory_of(model, None).save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"^ckpt: .* a memory alone that does not say where its dec"
    ):
        load_trained(folder, [])
    with pytest.raises(UserError, match=r"^MODEL: .* a memory alone that does not say where its"):
        load(str(folder), {})
    memory_of(model, str(tmp_path / "gone")).save_pretrained(folder)
    with pytest.raises(UserError, match=f"its decoder: no such folder: {tmp_path / 'gone'}$"):
        load_trained(folder, [])


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({"lora": {"model.layers.0.mlp.up_proj": 2.0}}, "lora_A.model.layers.0.mlp.up_proj"),
        ({"shape": None}, "shape"),
        ([1], "an object of comet, decoder, lora, model_type, shape in memory.json"),
    ],
)
def test_what_a_folder_lacks_is_named(small, facts, missing, tmp_path):
    folder = shutil.copytree(small / "memory", tmp_path / "memory")
    (folder / "sha256.json").unlink()
    if isinstance(facts, dict):
        whole = json.loads((folder / FACTS).read_text()) | facts
        facts = {key: value for key, value in whole.items() if value is not None or key != "shape"}
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"^memory: {folder} lacks {missing}$"):
        CometForCausalLM.from_pretrained(small / "plain", memory=folder)


def test_a_changed_decoder_is_not_left_out(tmp_path):
    train([f"run.root={tmp_path}", *TINY, *KEYS])
    argv = [str(tmp_path / "passkey" / "run"), str(tmp_path / "memory"), "--memory-only"]
    with pytest.raises(UserError, match=r"--memory-only: .* trained with train.parameters=all"):
        main(argv)
    with pytest.raises(UserError, match="--dtype: given with --memory-only"):
        main([*argv, "--dtype", "float16"])
    assert not (tmp_path / "memory").exists()


@pytest.mark.slow
def test_smollm2s_memory_is_small(tmp_path):
    folder = ROOT / "models" / "smollm2_135m"
    if not folder.is_dir():
        pytest.skip("no models/smollm2_135m; `make smollm2` makes it")
    sizes = {"chunk_size": 256, "global_size": 16, "temporary_capacity": 64}
    start = {"layout": "trailing", "sink": "learned", "slot_scale": 0.6}
    model = CometForCausalLM.from_pretrained(folder, comet=sizes | start, start=37)
    with torch.no_grad():
        for _, parameter in model.memory_parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    memory_of(model, None).save_pretrained(tmp_path / "memory")
    assert sum(file.stat().st_size for file in (tmp_path / "memory").iterdir()) < 8e6
    again = CometForCausalLM.from_pretrained(folder, memory=tmp_path / "memory")
    ids = torch.randint(0, 40_000, (1, 600))
    assert torch.equal(logits(again, ids), logits(model, ids))
    names = load_file(tmp_path / "memory" / WEIGHTS)
    assert names["rows.embed_tokens"].shape == (17, 576)
    assert json.loads((tmp_path / "memory" / FACTS).read_text())["model_type"] == "llama"
