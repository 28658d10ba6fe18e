"""From settings to this rank's part of the model, with fresh weights that no layout changes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vita import device, seed
from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.config.pipeline import PipelineSplit, pipeline_split
from megatron_vita.models import fused
from megatron_vita.models.layer_specs import choose_implementation, decoder_spec
from megatron_vita.models.projector import Projector
from megatron_vita.models.vision.tower import VisionTower, undrawn
from megatron_vita.models.vita import VitaModel, checkpoint_name
from megatron_vita.parallel.groups import Groups


def build_model(
    stage: StageConfig, groups: Groups, *, dtype: torch.dtype | None = None, fresh: bool = True
) -> list[VitaModel]:
    """This rank's model chunks, one for each of its virtual pipeline stages, on the device, frozen parts frozen.

    The first chunk of the first rank holds tower, projector and embedding, the last of the last rank norm and head.

    Args:
        stage: the merged settings of the stage.
        groups: this rank's place; the process groups must be alive.
        dtype: of the parameters; by default bfloat16 with train.bf16, else float32.
        fresh: draw fresh weights. False leaves whatever the memory held: only where weights are loaded right after
            (drawing those of a 14B model takes minutes).

    Raises:
        ConfigError: model.transformer_impl asks for what is not installed, or the layers do not fit the pipeline.
    """
    dtype = dtype or (torch.bfloat16 if stage.train.bf16 else torch.float32)
    device.seed_all(stage.train.seed, tp_rank=groups.tp_rank)
    implementation = choose_implementation(stage.model.transformer_impl)
    config = decoder_config(stage, dtype, implementation)
    split = pipeline_split(stage.parallel, stage.model.num_layers)
    # megatron-core's layout and its choice of schedule ask for it globally.
    parallel_state.set_virtual_pipeline_model_parallel_world_size(split.virtual if split.virtual > 1 else None)
    chunks = [_chunk(stage, groups, config, split, number) for number in range(split.virtual)]
    for chunk in chunks:
        if fresh:
            initialise(chunk, stage.train.seed)
        _freeze(chunk, stage)
    return [chunk.to(device.torch_device()) for chunk in chunks]


def _chunk(
    stage: StageConfig, groups: Groups, config: TransformerConfig, split: PipelineSplit, number: int
) -> VitaModel:
    """One of the rank's model chunks, its weights not yet set."""
    model = stage.model
    implementation = choose_implementation(model.transformer_impl)
    first = groups.first_stage and number == 0
    layers = split.layers[number * split.ranks + groups.pp_rank]
    language_model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(implementation, layers, qk_layernorm=model.qk_layernorm),
        vocab_size=model.padded_vocab_size(groups.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=first,
        post_process=groups.last_stage and number == split.virtual - 1,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="none",  # the rotary table is gathered by position, see parallel/rotary.py
        pg_collection=groups.collection,
        vp_stage=number if split.virtual > 1 else None,
    )
    vision_model = vision_projection = None
    if model.vision is not None and first:
        together = model.vision.tensor_parallel and groups.tp_size > 1
        collection = groups.split_tower_collection if together else groups.tower_collection
        vision_model = VisionTower(
            model.vision, dtype=config.params_dtype, implementation=implementation, collection=collection
        )
        vision_projection = Projector(model, config.params_dtype)
        # Tiles are spread over the ranks that hold copies, so each copy has part of the gradient. A split tower sees
        # the tiles of all its ranks: what it splits and what it replicates has the whole gradient.
        for parameter in (*(() if together else vision_model.parameters()), *vision_projection.parameters()):
            parameter.partial_over_tp = True
            # Replicated, whatever the linears' constructors marked: norms and clipping count it once.
            parameter.tensor_model_parallel = False
    return VitaModel(
        model=model,
        groups=groups,
        vision_model=vision_model,
        vision_projection=vision_projection,
        language_model=language_model,
    )


def decoder_config(stage: StageConfig, dtype: torch.dtype, implementation: str) -> TransformerConfig:
    """megatron-core's settings for the decoder; the same object for all chunks of a rank."""
    model, parallel = stage.model, stage.parallel
    split = pipeline_split(parallel, model.num_layers)
    interleaved = split.virtual > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=split.virtual if interleaved else None,
        pipeline_model_parallel_layout=split.stages() if split.ranks > 1 else None,
        # Megatron's own defaults: an interleaved pipeline exchanges while it computes, which rules batching out.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        cp_comm_type=parallel.cp_comm_type,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        calculate_per_token_loss=True,  # sums over the global batch, divided once by its labelled tokens
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        # `initialise` below draws by name. Not perform_initialization=False: then megatron-core would also not mark
        # which weights are split, and norms would count them once instead of once for each part.
        init_method=undrawn,
        output_layer_init_method=undrawn,
        embedding_init_method=undrawn,
        # SwiGLU: megatron-core's fusion is a torch.compile, half a minute of it on CPU; there our own module stands in
        # the socket that this switch opens (no Transformer Engine involved, whatever its name).
        bias_activation_fusion=device.has_accelerator(),
        gradient_accumulation_fusion=fused.accumulates_gradients(),
        use_te_activation_func=not device.has_accelerator() and implementation == "local",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def initialise(model: VitaModel, run_seed: int) -> None:
    """Fresh weights: every parameter is drawn whole, from a seed of its own name, then cut to this rank's part.

    So a weight does not depend on the layout, on the rank, or on which other parameters exist.
    """
    settings = model.model
    with torch.no_grad():
        for local, parameter in model.named_parameters():
            _fill(parameter, global_name(local, model), settings, run_seed, model.groups)


def global_name(name: str, model: VitaModel) -> str:
    """A parameter's name in checkpoints: its layer counted over all pipeline stages, Transformer Engine's names."""
    name = checkpoint_name(name)
    prefix = "language_model.decoder.layers."
    if name.startswith(prefix):
        index, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{model.language_model.decoder.layers[int(index)].layer_number - 1}.{rest}"
    if name == "language_model.output_layer.weight" and model.share_embeddings_and_output_weights:
        return "language_model.embedding.word_embeddings.weight"
    return name


def _fill(parameter: nn.Parameter, name: str, settings: ModelConfig, run_seed: int, groups: Groups) -> None:
    part, leaf = name.split(".")[0], name.rsplit(".", 1)[-1]
    tower = settings.vision if part == "vision_model" else None
    if tower is not None and leaf in ("ls1", "ls2"):
        parameter.fill_(tower.layer_scale_init)
    elif leaf.endswith("bias"):
        parameter.zero_()
    elif any(mark in name.rsplit(".", 2)[-2] for mark in ("norm", "ln_")) or leaf == "layer_norm_weight":
        parameter.fill_(1.0)
    else:
        std = settings.init_method_std
        if tower is not None:
            std = tower.init_method_std
        elif name.endswith("word_embeddings.weight") and settings.embedding_init_method_std is not None:
            std = settings.embedding_init_method_std
        elif part == "language_model" and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2.0 * settings.num_layers)  # residual branches add up over the layers
        whole = torch.empty(_whole_shape(parameter, name, settings, groups))
        whole.normal_(0.0, std, generator=seed.generator(run_seed, "weights", name))
        parameter.copy_(local_part(whole, parameter, name, settings, groups))


def _whole_shape(parameter: nn.Parameter, name: str, settings: ModelConfig, groups: Groups) -> list[int]:
    """Shape of a parameter before it is split over tensor ranks and its vocabulary padded."""
    shape = list(parameter.shape)
    if _is_vocabulary(name):
        shape[0] = settings.vocab_size
    elif getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= groups.tp_size  # type: ignore[attr-defined]
    return shape


def local_part(
    whole: torch.Tensor, parameter: nn.Parameter, name: str, settings: ModelConfig, groups: Groups
) -> torch.Tensor:
    """This tensor rank's part of a whole tensor that belongs to `parameter` (a weight, or its gradient).

    Args:
        whole: as in a checkpoint: the vocabulary unpadded, `linear_fc1` of the decoder as [gate; up].
        parameter: tells by megatron-core's marks whether and where it is split.
        name: the parameter's name in checkpoints.
        settings: the model.
        groups: this rank's place.
    """
    if _is_vocabulary(name):
        padding = settings.padded_vocab_size(groups.tp_size) - settings.vocab_size
        whole = F.pad(whole, (0, 0, 0, padding))
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if name.startswith("language_model.") and ".mlp.linear_fc1." in name:
        gate, up = (half.chunk(groups.tp_size)[groups.tp_rank] for half in whole.chunk(2))
        return torch.cat([gate, up])
    return whole.chunk(groups.tp_size, dim=parameter.partition_dim)[groups.tp_rank]  # type: ignore[attr-defined]


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def _freeze(model: VitaModel, stage: StageConfig) -> None:
    frozen = (
        (model.vision_model, stage.train.freeze_vision_model),
        (model.vision_projection, stage.train.freeze_vision_projection),
        (model.language_model, stage.train.freeze_language_model),
    )
    for part, keep in frozen:
        if part is not None and keep:
            part.requires_grad_(False)
