"""Build this rank's model chunks from a StageConfig, with initial weights that do not depend on the parallel layout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vita import device, kernels, seed
from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.config.pipeline import PipelineSplit, pipeline_split
from megatron_vita.kernels import choose_implementation
from megatron_vita.models.layer_specs import decoder_spec
from megatron_vita.models.projector import Projector
from megatron_vita.models.vision.tower import VisionTower, no_init
from megatron_vita.models.vita import VitaModel, checkpoint_name
from megatron_vita.parallel.groups import Groups


def build_model(
    stage: StageConfig, groups: Groups, *, dtype: torch.dtype | None = None, fresh: bool = True
) -> list[VitaModel]:
    """Build this rank's model chunks, one per virtual pipeline stage; called on every rank, without communication.

    The chunks are on the rank's device; frozen parts have requires_grad False. The first chunk of the first pipeline
    rank holds vision tower, projector and embedding; the last chunk of the last one final norm and output layer.

    Args:
        stage: the merged settings of the training stage.
        groups: coordinates and process groups of this rank, alive.
        dtype: of the parameters; by default bfloat16 with train.bf16, else float32.
        fresh: initialise the weights. False leaves them uninitialised, for callers that load weights right after
            (initialising a 14B model takes minutes).

    Raises:
        ConfigError: model.transformer_impl=te without Transformer Engine, or the layers do not fit the pipeline.
    """
    dtype = dtype or (torch.bfloat16 if stage.train.bf16 else torch.float32)
    device.seed_all(stage.train.seed, tp_rank=groups.tp_rank)
    implementation = choose_implementation(stage.model.transformer_impl)
    config = decoder_config(stage, dtype, implementation)
    split = pipeline_split(stage.parallel, stage.model.num_layers)
    # megatron-core reads it from its global state, in the pipeline layout and to choose the schedule.
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
    """Model chunk `number` (its virtual pipeline stage) of this rank, weights uninitialised."""
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
        tower_tp = model.vision.tensor_parallel and groups.tp_size > 1
        collection = groups.split_tower_collection if tower_tp else groups.tower_collection
        vision_model = VisionTower(
            model.vision, dtype=config.params_dtype, implementation=implementation, collection=collection
        )
        vision_projection = Projector(model, config.params_dtype)
        # Replicas encode different tiles, so each has a partial gradient. A tensor-parallel tower encodes the tiles of
        # all its ranks: its parameters, split or replicated, get the full gradient.
        for parameter in (*(() if tower_tp else vision_model.parameters()), *vision_projection.parameters()):
            parameter.partial_over_tp = True
            # Replicated, whatever the linear layers' constructors set: gradient norm and clipping count it once.
            parameter.tensor_model_parallel = False
    return VitaModel(
        model=model,
        groups=groups,
        vision_model=vision_model,
        vision_projection=vision_projection,
        language_model=language_model,
    )


def decoder_config(stage: StageConfig, dtype: torch.dtype, implementation: str) -> TransformerConfig:
    """megatron-core's TransformerConfig of the decoder, shared by all chunks of a rank.

    Args:
        stage: the merged settings of the training stage.
        dtype: of parameters and pipeline communication.
        implementation: `local` or `te`, from `choose_implementation`.

    Raises:
        ConfigError: the layers do not fit the pipeline.
    """
    model, parallel = stage.model, stage.parallel
    split = pipeline_split(parallel, model.num_layers)
    interleaved = split.virtual > 1
    chosen = kernels.of_program()
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
        rotary_interleaved=model.rotary_interleaved,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=split.virtual if interleaved else None,
        pipeline_model_parallel_layout=split.stages() if split.ranks > 1 else None,
        # Megatron's defaults: the interleaved schedule overlaps p2p communication, which excludes batched p2p.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Otherwise every exchange ends with torch.cuda.synchronize(), against a race in batch_isend_irecv that PyTorch
        # mended in 1.13 (its pull request 82450).
        batch_p2p_sync=False,
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
        # On the CPU megatron-core allocates every weight in full, in float32, and cuts its shard out of it.
        use_cpu_initialization=False,
        # `initialise` below sets the weights. Not perform_initialization=False: megatron-core then would not set the
        # tensor_model_parallel attributes either, and the gradient norm would count one shard of a split weight only.
        init_method=no_init,
        output_layer_init_method=no_init,
        embedding_init_method=no_init,
        # SwiGLU: megatron-core's fusion needs torch.compile, which takes half a minute on CPU. There
        # use_te_activation_func makes the MLP build its `activation_func` submodule, our SwiGLU (despite the name
        # without Transformer Engine).
        bias_activation_fusion=chosen.compiled_swiglu,
        gradient_accumulation_fusion=chosen.accumulating_gemm,
        use_te_activation_func=not chosen.compiled_swiglu and implementation == "local",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def initialise(model: VitaModel, run_seed: int) -> None:
    """Initialise all parameters of a chunk, in place: each is drawn in full from a seed derived from its name, then
    sharded.

    A weight therefore depends neither on the layout nor on the rank nor on the other parameters.

    Args:
        model: one chunk.
        run_seed: train.seed.
    """
    settings = model.model
    with torch.no_grad():
        for local, parameter in model.named_parameters():
            _fill(parameter, global_name(local, model), settings, run_seed, model.groups)


def global_name(name: str, model: VitaModel) -> str:
    """Map a chunk's parameter name to its name in checkpoints: global layer number, Transformer Engine's norm names."""
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
        full = torch.empty(_full_shape(parameter, name, settings, groups))
        full.normal_(0.0, std, generator=seed.generator(run_seed, "weights", name))
        parameter.copy_(local_shard(full, parameter, name, settings, groups))


def _full_shape(parameter: nn.Parameter, name: str, settings: ModelConfig, groups: Groups) -> list[int]:
    """Shape of a parameter in checkpoints: before tensor-parallel split and vocabulary padding."""
    shape = list(parameter.shape)
    if _is_vocabulary(name):
        shape[0] = settings.vocab_size
    elif getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= groups.tp_size  # type: ignore[attr-defined]
    return shape


def local_shard(
    full: torch.Tensor, parameter: nn.Parameter, name: str, settings: ModelConfig, groups: Groups
) -> torch.Tensor:
    """This tensor rank's shard of a full weight or gradient.

    Args:
        full: as in checkpoints: vocabulary unpadded, the decoder's `linear_fc1` as [gate; up].
        parameter: the local parameter; its attributes tensor_model_parallel and partition_dim say how it is split.
        name: the parameter's name in checkpoints.
        settings: the model.
        groups: coordinates of this rank.

    Returns:
        the shape of `parameter`.
    """
    if _is_vocabulary(name):
        shard = full[groups.tp_rank * parameter.shape[0] :][: parameter.shape[0]]
        return F.pad(shard, (0, 0, 0, parameter.shape[0] - len(shard)))
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    if name.startswith("language_model.") and ".mlp.linear_fc1." in name:
        gate, up = (half.chunk(groups.tp_size)[groups.tp_rank] for half in full.chunk(2))
        return torch.cat([gate, up])
    return full.chunk(groups.tp_size, dim=parameter.partition_dim)[groups.tp_rank]  # type: ignore[attr-defined]


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def _freeze(model: VitaModel, stage: StageConfig) -> None:
    frozen = (
        (model.vision_model, stage.train.freeze_vision_model),
        (model.vision_projection, stage.train.freeze_vision_projection),
        (model.language_model, stage.train.freeze_language_model),
    )
    for module, freeze in frozen:
        if module is not None and freeze:
            module.requires_grad_(False)
