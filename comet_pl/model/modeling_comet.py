"""CometForCausalLM: embed, walk the cells, head.

Legend: B rows, N columns of input_ids, W own tokens of a step, d width, V vocabulary rows (new ones included).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from comet_pl.model import pretrained as formats
from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.cell import Decoder, check_backbone, check_positions
from comet_pl.model.chunk_batch import Step
from comet_pl.model.configuration_comet import CometConfig, check_keys
from comet_pl.model.forward_plan import Call, check_prompt
from comet_pl.model.loss import cross_entropies, summed_cross_entropy
from comet_pl.model.memory import GateProjection, GlobalMemory
from comet_pl.model.traversal import WALKS, LocalSeam

COMPILED_GRAPHS = (
    64  # of all cells together: each length of text, and each way to close a chunk, makes some
)


class CometForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with collaborative memory: reads text of any length at constant memory and linear time."""

    config: CometConfig
    config_class = CometConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["Cell"]
    _supports_sdpa = True
    _is_stateful = True  # what was read cannot be unread: no assisted decoding

    def __init__(self, config: CometConfig, decoder: PreTrainedModel | None = None):
        """From scratch; or around a loaded `decoder`, whose modules are taken over as they are."""
        check_backbone(config.backbone_config)
        check_positions(config.backbone_config, config.positions())
        super().__init__(config)
        backbone = config.backbone_config
        self.model = Decoder(
            AutoModel.from_config(backbone) if decoder is None else decoder.model, config
        )
        self.lm_head = (
            nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=False)
            if decoder is None
            else decoder.lm_head
        )
        self.walk = "chunk_major"
        self.seam = LocalSeam  # a Strategy swaps it
        self.gradient_checkpointing = (
            False  # recompute each cell's activations in the backward pass
        )
        self.records_gates = False
        self.gated: list[
            tuple[list[int], list[int]]
        ] = []  # of the last forward, if it was recorded: each step's (gated, read)
        self.records_losses = False
        self.token_losses: tuple[Tensor, Tensor] | None = None
        self._fingerprint = (
            "",
            "",
        )  # (the configuration in words, its fingerprint) of the last call
        if decoder is not None:
            weight = decoder.lm_head.weight
            for name, parameter in self.named_parameters():
                parameter._is_hf_initialized = not is_memory(name)  # type: ignore[attr-defined]
            self.to(device=weight.device, dtype=weight.dtype)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection) and module.start_bias is not None:
            init.constant_(module.bias, module.start_bias)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        comet: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> CometForCausalLM:
        """Loads a CoMeT folder (ours or the authors'; `comet` then overrides), or plugs fresh memory modules into a plain decoder.

        Args:
            path: folder or hub id. comet: CometConfig keys. Others: as in Hugging Face's from_pretrained.

        Raises:
            ValueError: an impossible or unknown memory key; a decoder that is not supported.
        """
        kind = formats.kind(path, kwargs)
        if kind == "comet":
            config = kwargs.pop("config", None) or CometConfig.from_pretrained(path)
            config.override(comet or {})
            model = super().from_pretrained(path, *args, config=config, **kwargs)
        elif kind == "authors":
            model = formats.load_authors(cls, path, comet or {}, **kwargs)
        else:
            decoder = AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)
            model = cls.from_decoder(decoder, comet or {})
        return model

    @classmethod
    def from_decoder(cls, decoder: PreTrainedModel, comet: dict[str, Any]) -> CometForCausalLM:
        """Plugs fresh memory modules into a loaded decoder, which is used up; new token rows by mean resizing."""
        check_keys(comet)
        check_backbone(decoder.config)
        config = CometConfig(backbone_config=decoder.config, **comet)
        if config.vocab_size > decoder.config.vocab_size:
            decoder.resize_token_embeddings(config.vocab_size, mean_resizing=True)
        implementation = decoder.config._attn_implementation
        model = cls(config, decoder)
        model.config._attn_implementation = implementation
        if decoder.generation_config is not None:
            model.generation_config = decoder.generation_config
        return model.train(decoder.training)

    # ---- forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        chunk_sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
        past_key_values: CometCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        strides: Sequence[int] | Tensor | None = None,
        resets: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Reads N more columns of B texts.

        Args:
            input_ids: (B, N) text tokens. attention_mask: (B, N) or, with a cache, (B, all columns so far); 0 = padding.
            labels: (B, N) unshifted targets, -100 ignored. shift_labels, by name: (B, N) targets of each column itself (not both).
            chunk_sizes: text tokens of each chunk, one list or one a row; an open chunk is closed first, all listed chunks close.
                None: text continues the open chunk, and chunks of config.chunk_size roll over.
            past_key_values: what was read before. Without gradients it is updated in place; with gradients a new one is returned.
            use_cache: return the cache (default: if one is given, or in eval mode).
            logits_to_keep: n: logits of the last n columns; 0: of all; None: of all, or of none if there are labels.
            num_items_in_batch: divides the summed loss (default: this call's targets).
            strides: (B,) compression stride of each row, kept in the cache. resets: a bool for each listed chunk; True empties the row's
                memory before it.
            others: what libraries around a decoder pass along as None or False, such as inputs_embeds.

        Returns:
            .loss, .logits (B, n, V) (zeros' logits at padding: undefined), .past_key_values

        Raises:
            ValueError: arguments that contradict each other; the message names the argument, what was given and what is allowed.
        """
        shift_labels = others.pop(
            "shift_labels", None
        )  # a parameter of this name would be a label to Hugging Face's Trainer
        if strange := [
            name for name, value in others.items() if value is not None and value is not False
        ]:
            raise ValueError(f"{strange[0]}: given, but a CoMeT's forward has no such argument")
        if use_cache is None:
            use_cache = past_key_values is not None or not self.training
        call = Call.prepare(
            self.config,
            input_ids,
            attention_mask,
            labels,
            shift_labels,
            chunk_sizes,
            strides,
            resets,
            logits_to_keep,
            past_key_values,
            use_cache,
        )
        cache = past_key_values if past_key_values is not None else CometCache()
        in_place = use_cache and not torch.is_grad_enabled()
        if not in_place:
            cache = cache.functional_copy()
        cache.begin(self.config, len(input_ids), self.fingerprint, self.lm_head.weight)
        made_with = (
            cache.weights
            if cache.model is None or cache.model is self
            else cache.model.weight_digest()
        )
        if made_with is not None and made_with != self.weight_digest():
            raise ValueError("past_key_values: this cache was made by a model with other weights")
        if in_place:
            cache.rows = call.clocks  # their strides decide the buffers' sizes
            cache.reserve(self.config, self.dtype, input_ids.device)
        cache.weights, cache.model = None, self
        if self.records_gates:
            self.record_gates()

        outputs = list(self._walk(call, input_ids, cache.memories, in_place))
        cache.rows, cache.columns = call.clocks_after, cache.columns + input_ids.shape[1]
        loss, logits = self._head(call, outputs, input_ids, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache else None
        )

    def _walk(
        self, call: Call, input_ids: Tensor, memories: list[LayerMemory], in_place: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Visits the cells; yields the wanted outputs (k, d) of each step with their flat places (k,) in (B, N)."""
        new_ids = [self.config.compression_token_id or 0, *self.config.readout_token_ids]
        ids = torch.cat([input_ids, input_ids.new_tensor(new_ids).expand(len(input_ids), -1)], 1)
        cells, seam = self.model.layers, self.seam(memories)
        hidden: dict[int, Tensor] = {}
        steps: dict[int, Step] = {}
        memory: dict[int, LayerMemory] = {}
        for t, i in WALKS[self.walk](call.steps, len(cells)):
            if t not in steps:
                steps[t] = self._rope(call.step(t, in_place, input_ids.device))
                if self.records_gates and steps[t].closes and steps[t].has_state:
                    self.gated.append((steps[t].gated, steps[t].read))
                hidden[t] = self.model.embed_tokens(ids.gather(1, steps[t].source))
            before = seam.receive(i) if t == 0 else memory[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden[t], memory[i] = checkpoint(
                    cells[i], hidden[t], before, steps[t], use_reentrant=False
                )
            else:
                hidden[t], memory[i] = cells[i](hidden[t], before, steps[t])
            if self.records_gates and steps[t].closes and steps[t].has_state:
                cells[
                    i
                ].global_memory.collect()  # not in the cell, which may run again in the backward pass
            if t == call.steps - 1:
                seam.send(i, memory.pop(i))
            if i == len(cells) - 1:
                step, out = steps.pop(t), hidden.pop(t)
                if step.selected is not None and step.target is not None:
                    yield out.flatten(0, 1)[step.selected], step.target

    def _rope(self, step: Step) -> Step:
        check_positions(self.config.backbone_config, step.columns)
        like = self.model.embed_tokens.weight
        step.rope = self.model.rotary_emb(like, step.positions)
        if step.slot_positions is not None:
            step.slot_rope = self.model.rotary_emb(like, step.slot_positions)
        return step

    def _head(
        self,
        call: Call,
        outputs: list[tuple[Tensor, Tensor]],
        input_ids: Tensor,
        num_items: int | Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss over labelled positions and logits of the kept columns, from the outputs that were kept of the walk."""
        width = self.config.backbone_config.hidden_size
        like = self.lm_head.weight
        hidden = torch.cat([h for h, _ in outputs]) if outputs else like.new_zeros(0, width)
        places = torch.cat([p for _, p in outputs]) if outputs else input_ids.new_zeros(0)
        hidden = self.model.norm(hidden)
        loss = logits = None
        if call.targets is not None:
            targets = call.targets.to(input_ids.device).flatten()[places]
            labelled = targets != -100
            count = call.labelled if num_items is None else num_items
            loss = torch.zeros((), dtype=torch.float32, device=input_ids.device)
            if self.records_losses and not torch.is_grad_enabled():
                losses = cross_entropies(hidden[labelled], targets[labelled], self.lm_head)
                self.token_losses = places[labelled], losses
                loss = losses.sum() / count if call.labelled else loss
            elif call.labelled:
                loss = (
                    summed_cross_entropy(hidden[labelled], targets[labelled], self.lm_head) / count
                )
        if call.keep is not None:
            rows, columns = input_ids.shape
            kept = places % columns >= columns - call.keep
            place = (
                places[kept] // columns * call.keep + places[kept] % columns - (columns - call.keep)
            )
            dense = hidden.new_zeros(rows * call.keep, width).index_copy(0, place, hidden[kept])
            logits = self.lm_head(dense.unflatten(0, (rows, call.keep)))
        return loss, logits

    # ---- identity, parameters, instruments

    @property
    def fingerprint(self) -> str:
        """Of the configuration: what a cache must have been made with. Looked up where nothing changed since the last call: to_dict's
        deep copy takes longer than a small layer on one token."""
        keys = (
            "global_size",
            "compression_stride",
            "temporary_capacity",
            "chunk_size",
            "adapter_rank",
            "shared_adapter",
            "gate",
        )
        settings = [getattr(self.config, key) for key in keys]
        now = repr((vars(self.config.backbone_config), settings))
        if self._fingerprint[0] == now:
            return self._fingerprint[1]
        runtime = ("_", "transformers", "dtype", "torch", "use_cache", "output_", "return_dict")
        backbone = {
            k: v
            for k, v in self.config.backbone_config.to_dict().items()
            if not k.startswith(runtime)
        }
        facts = json.dumps([backbone, settings], sort_keys=True, default=str)
        self._fingerprint = now, hashlib.sha256(facts.encode()).hexdigest()[:16]
        return self._fingerprint[1]

    @torch.no_grad()
    def weight_digest(self) -> str:
        """Of the weights: a few values of every parameter."""
        digest = hashlib.sha256()
        for name, parameter in self.named_parameters():
            digest.update(name.encode())
            digest.update(
                parameter.detach()
                .flatten()[:: max(1, parameter.numel() // 16)]
                .float()
                .cpu()
                .numpy()
                .tobytes()
            )
        return digest.hexdigest()[:16]

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the memory modules: gates, norms and adapters."""
        return ((name, parameter) for name, parameter in self.named_parameters() if is_memory(name))

    @property
    def gates(self) -> list[GlobalMemory]:
        """The global memory of each layer, if they have gates; else none."""
        memories = [cell.global_memory for cell in self.model.layers]
        return [memory for memory in memories if memory is not None and memory.gate is not None]

    def record_gates(self, on: bool = True) -> None:
        """Whether each forward keeps its gate values for `gate_values()`; those of the last one are forgotten."""
        self.records_gates, self.gated = on, []
        for memory in self.gates:
            memory.gate_values = [] if on else None

    def gate_values(self) -> list[tuple[list[int], list[Tensor]]]:
        """For each step of the last forward with gates: of its n rows that a gate updated, how many text tokens they had read before the
        chunk; and for each layer g (n, m, 1 or d), detached. Rows that rest, or that have no state yet, are left out."""
        found = []
        for t, (gated, read) in enumerate(self.gated):
            rows = torch.tensor(gated, dtype=torch.long, device=self.lm_head.weight.device)
            found.append(
                (read, [memory.gate_values[t][rows] for memory in self.gates if memory.gate_values])
            )
        return found

    def record_losses(self, on: bool = True) -> None:
        """Whether each forward with labels and without gradients keeps every target's loss in `token_losses`: flat places (k,) in (B, N)
        of the columns that have a target, and its cross-entropy (k,), in any order."""
        self.records_losses, self.token_losses = on, None

    def compile_cells(self, **options: Any) -> None:
        """Each cell runs as torch.compile's code from now on; names of modules and weights stay. Code is made at a first call of each kind.

        Torch's limit of graphs a function becomes at least COMPILED_GRAPHS, for the whole process. Beyond it, and where torch cannot trace,
        cells run as before.

        Args:
            options: of torch.compile.
        """
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_GRAPHS)
        for cell in self.model.layers:
            cell.compile(**options)

    # ---- generation: Hugging Face's

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hugging Face's, after a look at the prompt.

        Raises:
            ValueError: a prompt, or a row of it, without a token that the cache has not read yet.
        """
        if is_first_iteration:
            check_prompt(
                input_ids,
                next_sequence_length,
                kwargs.get("attention_mask"),
                kwargs.get("past_key_values"),
            )
        more = {
            "next_sequence_length": next_sequence_length,
            "is_first_iteration": is_first_iteration,
            **kwargs,
        }
        inputs = super().prepare_inputs_for_generation(input_ids, **more)  # type: ignore[misc, arg-type]
        inputs.pop("tokenizer", None)  # of stop_strings
        return inputs

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's, and compression and readout tokens are never said, whatever is configured."""
        settings, others = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        settings.suppress_tokens = (
            sorted({*(settings.suppress_tokens or []), *self.config.new_token_ids}) or None
        )
        return settings, others

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: the rows behind the text's are compression and readout tokens."""
        raise ValueError(
            "resize_token_embeddings: resize the plain decoder, before a memory is plugged in; its new rows stand behind the text's"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves it to forward, which makes a CometCache


def is_memory(name: str) -> bool:
    """Whether a parameter of this name belongs to the memory modules."""
    parts = name.split(".")
    return (
        "global_memory" in parts
        or "temporary_memory" in parts
        or (len(parts) > 3 and parts[3] == "adapter")
    )


AutoModelForCausalLM.register(CometConfig, CometForCausalLM)
