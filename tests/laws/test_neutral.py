"""Law 5: without memories and in one chunk it is the plain decoder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from comet_pl import CometCache, CometConfig, CometForCausalLM
from tests.support.models import EXACT, FAMILIES, MEMORY, NEUTRAL, backbone, text


def comet(decoder, **options):
    """In double precision."""
    return CometForCausalLM(CometConfig(decoder, **options)).double().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_memories_it_is_the_plain_decoder(family, attention, tmp_path):
    config = backbone(family)
    plain = AutoModelForCausalLM.from_config(config).double().eval()
    # Norms and biases too: their start values would hide where they belong.
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.3)
    plain.save_pretrained(tmp_path)
    options = {"comet": NEUTRAL, "dtype": torch.float64, "attn_implementation": attention}
    model = CometForCausalLM.from_pretrained(tmp_path, **options).eval()
    ids = text(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, **EXACT)
    model(ids, labels=ids).loss.backward()
    # Their own loss is float32.
    logits = plain(ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
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
    config = backbone("llama", rope_parameters=dict(rope))
    plain = AutoModelForCausalLM.from_config(config).double().eval()
    model = comet(plain.config, **NEUTRAL)
    model.load_state_dict(plain.state_dict())
    ids = text(1, 60)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, **EXACT)
        plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
        if kind not in ("dynamic", "longrope"):  # those leave short texts alone
            assert not torch.allclose(type(plain)(plain.config).double()(ids).logits, expected)
    model = comet(backbone("llama", rope_parameters=dict(rope)), **MEMORY)
    with torch.no_grad():
        whole, cache, pieces = model(ids).logits, CometCache(), []
        for k in range(60):
            pieces.append(model(ids[:, k : k + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_length_is_refused_where_chunks_reach_that_length(kind):
    rope = ROPES[kind] | {"rope_theta": 100.0, "original_max_position_embeddings": 128}
    decoder = backbone("llama", rope_parameters=rope)
    options = {"global_size": 2, "compression_stride": None}
    with pytest.raises(ValueError, match=rf"{kind}.*beyond 128 positions.*takes 13\d"):
        comet(decoder, chunk_size=126, **options)
    model = comet(decoder, chunk_size=20, **options)
    with pytest.raises(ValueError, match="beyond 128 positions"):
        model(text(1, 140), chunk_sizes=[140])


def test_half_precision_leaves_rope_exact(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    plain = AutoModelForCausalLM.from_config(backbone("llama", rope_parameters=rope))
    plain.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    options = {"comet": NEUTRAL | {"chunk_size": 512}, "attn_implementation": "sdpa"}
    model, cast = (
        CometForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    for one in (model, cast.to(torch.bfloat16)):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
        assert one.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = text(1, 400)
    with torch.no_grad():
        # bf16: two kernels
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=2e-2, rtol=2e-2)
