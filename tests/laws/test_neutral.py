"""Law 5: without memories and in one chunk it is the plain decoder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from comet_pl import CometCache, CometConfig, CometForCausalLM
from tests.support.models import (
    FAMILIES,
    backbone,
    text,
)

EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64

# ---- law 5: neutral


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_memories_it_is_the_plain_decoder(family, attention, tmp_path):
    config = backbone(family)
    plain = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in (
        plain.parameters()
    ):  # norms and biases too: their start values would hide where they belong
        torch.nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.3)
    plain.save_pretrained(tmp_path)
    comet = {"chunk_size": 64, "global_size": 0, "compression_stride": None}
    model = CometForCausalLM.from_pretrained(
        tmp_path, comet=comet, dtype=torch.float64, attn_implementation=attention
    ).eval()
    ids = text(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, **EXACT)
    model(ids, labels=ids).loss.backward()
    torch.nn.functional.cross_entropy(
        plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ).backward()  # theirs is float32
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **EXACT, msg=name)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 128,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_kinds_pass_through(kind):
    """Neutral, and still split exactly with memories on."""
    rope = ROPES[kind] | {"rope_theta": 100.0}
    plain = (
        AutoModelForCausalLM.from_config(backbone("llama", rope_parameters=dict(rope)))
        .double()
        .eval()
    )
    neutral = {"chunk_size": 64, "global_size": 0, "compression_stride": None}
    model = CometForCausalLM(CometConfig(backbone_config=plain.config, **neutral)).double().eval()
    model.load_state_dict(plain.state_dict())
    ids = text(1, 60)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, **EXACT)
        plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
        if kind not in ("dynamic", "longrope"):  # those leave short texts alone
            assert not torch.allclose(type(plain)(plain.config).double()(ids).logits, expected)
    memories = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
    model = (
        CometForCausalLM(
            CometConfig(backbone_config=backbone("llama", rope_parameters=dict(rope)), **memories)
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        whole, cache, pieces = model(ids).logits, CometCache(), []
        for k in range(60):
            pieces.append(model(ids[:, k : k + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_length_is_refused_where_chunks_reach_that_length(kind):
    rope = ROPES[kind] | {"rope_theta": 100.0, "original_max_position_embeddings": 128}
    decoder = backbone("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=rf"{kind}.*beyond 128 positions.*takes 13\d"):
        CometForCausalLM(
            CometConfig(
                backbone_config=decoder, chunk_size=126, global_size=2, compression_stride=None
            )
        )
    model = CometForCausalLM(
        CometConfig(backbone_config=decoder, chunk_size=20, global_size=2, compression_stride=None)
    )
    with pytest.raises(ValueError, match="beyond 128 positions"):
        model(text(1, 140), chunk_sizes=[140])


def test_half_precision_leaves_rope_exact(tmp_path):
    plain = AutoModelForCausalLM.from_config(
        backbone("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    )
    plain.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    comet = {"chunk_size": 512, "global_size": 0, "compression_stride": None}
    model = CometForCausalLM.from_pretrained(
        tmp_path, comet=comet, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    cast = (
        CometForCausalLM.from_pretrained(tmp_path, comet=comet, dtype=torch.float32)
        .to(torch.bfloat16)
        .eval()
    )
    for one in (model, cast):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
        assert one.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        ids = text(1, 400)
        torch.testing.assert_close(
            model(ids).logits, plain(ids).logits, atol=2e-2, rtol=2e-2
        )  # bf16: two kernels
