"""The weights of a trained memory, without those of its decoder."""

from comet_pl.model.configuration_comet import KEYS, CometConfig
from comet_pl.model.memory import is_memory
from comet_pl.model.memory_weights import MemoryWeights, ends, samples
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.training.trainable import is_adapter, merge_adapters


def memory_of(model: CometForCausalLM, decoder: str | None) -> MemoryWeights:
    """Those of a model with peft's adapters or without; they are merged afterwards.

    Args:
        decoder: where it was loaded from.

    Raises:
        ValueError: its new tokens do not stand right behind the text's.
    """
    config: CometConfig = model.config
    first, rows = config.first_new_id, config.vocab_size
    ids = [config.compression_token_id] * (config.compression_stride is not None)
    if [*ids, *config.readout_token_ids] != list(range(first, rows)):
        raise ValueError("its new tokens do not stand right behind the text's")
    decoders = (
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters()
        if not is_memory(name) and not is_adapter(name)
    )
    tensors = {f"decoder.{name}": t for name, t in samples(decoders, first)}
    factors = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            factors[name] = float(module.scaling["default"])
            tensors[f"lora_A.{name}"] = module.lora_A["default"].weight
            tensors[f"lora_B.{name}"] = module.lora_B["default"].weight
    merge_adapters(model)
    tensors |= dict(model.memory_parameters())
    tensors |= {f"rows.{part}": weight[first:] for part, weight in ends(model)}
    facts = {
        "comet": {key: getattr(config, key) for key in KEYS},
        "lora": factors,
        "decoder": decoder,
        "model_type": config.backbone_config.model_type,
        "shape": [first, config.backbone_config.hidden_size],
    }
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    return MemoryWeights(copies, facts)
