"""CometForCausalLM: embed, visit the cells, head.

Legend: B rows, N columns of input_ids, W own tokens of a chunk, d width, V vocabulary rows (new
ones included).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from comet_pl.model import pretrained
from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.cell import Cell, Decoder, check_backbone, check_positions
from comet_pl.model.chunk_batch import Chunk, Rope
from comet_pl.model.chunk_layout import ChunkPlan
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.model.cuda_graphs import graphs_of
from comet_pl.model.digests import forget_digests
from comet_pl.model.forward_plan import check_prompt, plan_forward, row_plans
from comet_pl.model.hugging_face import TextOnly, register
from comet_pl.model.identity import Fingerprint, digest
from comet_pl.model.loss import loss_and_logits
from comet_pl.model.memory import GateProjection, GlobalMemory, Memory, is_memory
from comet_pl.model.observer import Observer
from comet_pl.model.recomputation import RecomputedLayer
from comet_pl.model.start import plug_in
from comet_pl.model.transfer import moved
from comet_pl.model.traversal import TRAVERSALS, LocalTransport

# Of all cells together: each length of text, and each way to close a chunk, makes some.
COMPILED_GRAPHS = 64


class CometForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with collaborative memory: text of any length at constant memory, linear time."""

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
        if decoder is None:
            self.model = Decoder(AutoModel.from_config(backbone), config)
            self.lm_head = nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=False)
        else:
            self.model = Decoder(decoder.model, config)
            self.lm_head = decoder.lm_head
        self.traversal = "chunk_major"
        self.transport: Any = LocalTransport  # a pipeline puts its own here
        self.gradient_checkpointing = False  # recompute each cell's activations when needed
        self.cuda_graphs = False  # on a GPU, without gradients: see cuda_graphs.py
        self.observer: Observer | None = None
        self._fingerprint = Fingerprint()
        self._own_ids: dict[Any, Tensor] = {}  # on the device that asked last
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
        if isinstance(module, Cell) and module.sink is not None:
            init.normal_(module.sink, std=self.config.backbone_config.initializer_range)
        if isinstance(module, Memory) and module.factor is not None:
            init.constant_(module.factor, module.start_factor)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        comet: dict[str, Any] | None = None,
        start: int | None = None,
        memory: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> CometForCausalLM:
        """Loads a CoMeT folder (ours or the authors'), or plugs memory into a plain decoder.

        Args:
            path: folder or hub id.
            comet: CometConfig keys; they override those of a CoMeT folder.
            start: see from_decoder; a CoMeT folder has its rows already.
            memory: folder of `comet_pl.export --memory-only`, for a copy of its decoder.
            kwargs: as in Hugging Face's from_pretrained.

        Raises:
            ValueError: an impossible or unknown memory key; a decoder that is not supported; a file
                that is not what was saved; weights that are missing, unknown or not finite.
        """
        kind = pretrained.kind(path, kwargs, memory)
        if kind == "authors":
            return pretrained.load_authors(cls, path, comet or {}, **kwargs)
        if kind == "comet":
            config = kwargs.pop("config", None) or CometConfig.from_pretrained(path)
            config.override(comet or {})
            load: partial[Any] = partial(super().from_pretrained, path, *args, config=config)
            return pretrained.load_whole(load, path, kwargs, comet or {})
        kwargs.setdefault("trust_remote_code", False)  # without it Hugging Face asks on stdin
        plain: partial[Any] = partial(AutoModelForCausalLM.from_pretrained, path, *args)
        decoder = pretrained.load_whole(plain, path, kwargs)
        return pretrained.around(cls, decoder, comet or {}, start, memory)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Hugging Face's; digests of what the folder held before are removed."""
        forget_digests(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_decoder(
        cls, decoder: PreTrainedModel, comet: dict[str, Any], start: int | None = None
    ) -> CometForCausalLM:
        """Plugs fresh memory modules into a loaded decoder, which is used up.

        Args:
            comet: CometConfig keys.
            start: a text token whose row the rows of new tokens begin as; None: as Hugging Face's
                mean resizing makes them.
        """
        return plug_in(cls, decoder, comet, start)

    # ---- forward

    @can_return_tuple
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
        loss_only: bool = False,
        plans: Sequence[ChunkPlan] | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Reads N more columns of B texts.

        Args:
            input_ids: (B, N) text tokens. A model on a GPU need not wait for it where these, the
                mask and labels are on the CPU.
            attention_mask: (B, N) or, with a cache, (B, all columns so far); 0 = padding.
            labels: (B, N) unshifted targets, -100 ignored. shift_labels, by name: (B, N) targets of
                each column itself (not both). teacher, by name: a loss.Teacher of these.
            chunk_sizes: text tokens of each chunk, one list or one a row; an open chunk closes
                first, all listed chunks close. None: text continues the open chunk, and chunks of
                config.chunk_size roll over.
            past_key_values: what was read before. Without gradients it is updated in place; with
                gradients a new one is returned.
            use_cache: return the cache (default: if one is given, or in eval mode).
            logits_to_keep: n: logits of the last n columns; 0: of all; None: of all, or beside a
                loss of none in train mode or with config.keys_to_ignore_at_inference = ["logits"].
            num_items_in_batch: divides the summed loss (default: this call's targets).
            strides: (B,) compression stride of each row, kept in the cache.
            resets: a bool for each listed chunk; True empties the row's memory before it.
            loss_only: with labels, no logits by default, and no graph if there is no target.
            plans: one a row, instead of chunk_sizes, strides and resets.
            others: what libraries around a decoder pass along as None or False.

        Returns:
            .loss, .logits (B, n, V) (undefined at padding), .past_key_values

        Raises:
            ValueError: arguments that contradict each other; the message names the argument, what
                was given and what is allowed.
        """
        plans, row_strides = row_plans(input_ids, chunk_sizes, resets, strides, plans)
        # A parameter of this name would be a label to Hugging Face's Trainer.
        shift_labels, teacher = others.pop("shift_labels", None), others.pop("teacher", None)
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: given, but a CoMeT's forward has no such argument")
        if use_cache is None:
            use_cache = past_key_values is not None or not self.training
        quiet = loss_only or self.training or "logits" in self.config.keys_to_ignore_at_inference
        plan = plan_forward(
            self.config,
            input_ids,
            attention_mask=attention_mask,
            plans=plans,
            strides=row_strides,
            labels=labels,
            shift_labels=shift_labels,
            logits_to_keep=logits_to_keep,
            logits_beside_loss=not quiet,
            cache=past_key_values,
            use_cache=use_cache,
        )
        in_place = use_cache and not torch.is_grad_enabled()
        cache = past_key_values if past_key_values is not None else CometCache()
        device = self.lm_head.weight.device
        cache = cache.for_call(self, plan.clocks, in_place, device)
        facts = plan.facts(in_place, device, self.rope)
        input_ids = moved(input_ids, device)
        ids = torch.cat([input_ids, self.own_ids(input_ids)], 1)
        graphs = graphs_of(self, cache, in_place)
        replayed: set[int] = set()
        cells, transport = self.model.layers, self.transport(cache.memories)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        draws = recompute and any(isinstance(m, nn.Dropout) and m.p for m in self.modules())
        layers: dict[int, RecomputedLayer] = {}
        chunks: dict[int, Chunk] = {}
        hidden: dict[int, Tensor] = {}
        memory: dict[int, LayerMemory] = {}
        outputs = []
        for t, i in TRAVERSALS[self.traversal](plan.chunks, len(cells)):
            if i == 0 and graphs is not None and (known := graphs.read(plan, t, input_ids)):
                outputs.append(known)
                replayed.add(t)
            elif i == 0:
                chunks[t] = plan.chunk(t, facts)
                hidden[t] = self.model.embed_tokens(ids.gather(1, chunks[t].tokens.source))
            if t == 0:
                memory[i] = transport.receive(i)
                if recompute:
                    layers[i] = RecomputedLayer(cells[i], memory[i], draws)
            if t in replayed:
                pass
            elif recompute:
                hidden[t] = layers[i].visit(hidden[t], chunks[t])
            else:
                hidden[t], memory[i] = cells[i](hidden[t], memory[i], chunks[t])
            if self.observer is not None and chunks[t].gated:
                self.show_gate(i, chunks[t])
            if t == plan.chunks - 1:
                if recompute and use_cache:
                    memory[i] = layers.pop(i).after()
                transport.send(i, memory.pop(i))
            if i == len(cells) - 1 and t not in replayed:
                tokens, last = chunks.pop(t).tokens, hidden.pop(t)
                if len(tokens.target):
                    last = last.flatten(0, 1)
                    last = last if tokens.wanted is None else last[tokens.wanted]
                    outputs.append((last, tokens.target))
        cache.rows, cache.columns = plan.clocks_after, cache.columns + input_ids.shape[1]
        learning = () if loss_only else self.parameters()
        given = num_items_in_batch, self.observer, learning, teacher
        loss, logits = loss_and_logits(plan, outputs, self.model.norm, self.lm_head, *given)
        return CausalLMOutputWithPast(loss, logits, cache if use_cache else None)

    def own_ids(self, like: Tensor) -> Tensor:
        """(B, 1 + m) ids of the compression token and the readout tokens, for B rows of ids."""
        kind = like.device, like.dtype
        if kind not in self._own_ids:
            new = [self.config.compression_token_id or 0, *self.config.readout_token_ids]
            self._own_ids = {kind: like.new_tensor(new)}
        return self._own_ids[kind].expand(len(like), -1)

    def rope(self, positions: Tensor, columns: int) -> Rope:
        """Cosines and sines of positions (B, W) in a chunk of L key columns; the sines' first half
        is negative.

        Raises:
            ValueError: RoPE would change its frequencies for so many columns.
        """
        check_positions(self.config.backbone_config, columns)
        cos, sin = self.model.rotary_emb(self.model.embed_tokens.weight, positions)
        a, b = sin.chunk(2, -1)
        return cos, torch.cat([-a, b], -1)

    def show_gate(self, layer: int, chunk: Chunk) -> None:
        """Shows the observer the gate values of a layer's last chunk.

        Not in the cell, which activation checkpointing runs twice and torch.compile traces.
        """
        gate = self.model.layers[layer].global_memory
        if self.observer is None or self.observer.gate is None or gate is None or gate.gate is None:
            return
        values = gate.last_gate
        if len(chunk.gated) < len(values):
            values = values[torch.tensor(chunk.gated, device=values.device)]
        self.observer.gate(layer, chunk.read, values)

    # ---- identity, parameters

    def _get_name(self) -> str:
        return CometForCausalLM.__name__  # of subclasses too: Trainer knows no other

    @property
    def fingerprint(self) -> str:
        """Of the configuration: what a cache must have been made with."""
        return self._fingerprint.of(self.config)

    def weight_digest(self) -> str:
        """Of the weights: a few values of every parameter."""
        return digest(self.named_parameters())

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the memory modules: gates, norms and adapters."""
        return ((name, parameter) for name, parameter in self.named_parameters() if is_memory(name))

    @property
    def memory_dtype(self) -> torch.dtype:
        """Of the memory modules, and so of T; a frozen decoder may have less precision."""
        cell = self.model.layers[0]
        memory = cell.global_memory or cell.temporary_memory
        return self.dtype if memory is None else memory.norm.weight.dtype

    @property
    def gates(self) -> list[GlobalMemory]:
        """The global memory of each layer, if they have gates; else none."""
        memories = [cell.global_memory for cell in self.model.layers]
        return [memory for memory in memories if memory is not None and memory.gate is not None]

    def compile_cells(self, **options: Any) -> None:
        """Runs each cell as torch.compile's code; names of modules and weights stay.

        A first call of each kind compiles. Torch's limit of graphs becomes COMPILED_GRAPHS, at
        least, for the whole process. Beyond it, and where torch cannot trace, cells run as before.

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
            ValueError: a prompt, or a row of it, without a token that the cache has not seen yet.
        """
        if is_first_iteration:
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            check_prompt(input_ids, next_sequence_length, mask, cache)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs.pop("tokenizer", None)  # of stop_strings
        if not is_first_iteration and kwargs.get("use_cache"):
            # A generated token is never padding; to look would make the host wait for the device.
            inputs.pop("attention_mask", None)
        return inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Hugging Face's; compression and readout tokens are suppressed whatever is configured."""
        others = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        return LogitsProcessorList([TextOnly(self.config.first_new_id), *others])

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: the rows behind the text's are compression and readout tokens."""
        raise ValueError(
            "resize_token_embeddings: resize the plain decoder, before a memory is plugged in; its "
            "new rows stand behind the text's"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves it to forward, which makes a CometCache


register(CometConfig, CometForCausalLM)
