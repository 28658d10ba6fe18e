"""From settings to this rank's part of the model, with fresh weights that no layout changes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vita import device, seed
from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.models.layer_specs import choose_implementation, decoder_spec
from megatron_vita.models.projector import Projector
from megatron_vita.models.vision.intern_vit import InternViT
from megatron_vita.models.vita import VitaModel, checkpoint_name
from megatron_vita.parallel.groups import Groups


def build_model(stage: StageConfig, groups: Groups, *, dtype: torch.dtype | None = None) -> list[VitaModel]:
    """This rank's model chunks (one: there are no virtual stages yet), on the device, with frozen parts frozen.

    Args:
        stage: the merged settings of the stage.
        groups: this rank's place; the process groups must be alive.
        dtype: of the parameters; by default bfloat16 with train.bf16, else float32.

    Raises:
        ConfigError: model.transformer_impl asks for what is not installed.
    """
    dtype = dtype or (torch.bfloat16 if stage.train.bf16 else torch.float32)
    device.seed_all(stage.train.seed, tp_rank=groups.tp_rank)
    model = stage.model
    implementation = choose_implementation(model.transformer_impl)
    config = decoder_config(stage, dtype)
    language_model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(implementation, model.num_layers // groups.pp_size),
        vocab_size=model.padded_vocab_size(groups.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.first_stage,
        post_process=groups.last_stage,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="none",  # the rotary table is gathered by position, see models/rotary.py
        pg_collection=groups.collection,
    )
    vision_model = vision_projection = None
    if model.vision is not None and groups.first_stage:
        vision_model = InternViT(
            model.vision, dtype=dtype, implementation=implementation, collection=groups.tower_collection
        )
        vision_projection = Projector(model, dtype)
        for parameter in (*vision_model.parameters(), *vision_projection.parameters()):
            parameter.partial_over_tp = True  # type: ignore[attr-defined]
            # Replicated, whatever the linears' constructors marked: norms and clipping count it once.
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    whole = VitaModel(
        model=model,
        groups=groups,
        vision_model=vision_model,
        vision_projection=vision_projection,
        language_model=language_model,
    )
    initialise(whole, stage.train.seed)
    _freeze(whole, stage)
    return [whole.to(device.torch_device())]


def decoder_config(stage: StageConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's settings for the decoder."""
    model, parallel = stage.model, stage.parallel
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
        perform_initialization=False,  # `initialise` below draws by name
        bias_activation_fusion=device.has_accelerator(),  # on CPU the fusion is a compilation of half a minute
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def initialise(model: VitaModel, run_seed: int) -> None:
    """Fresh weights: every parameter is drawn whole, from a seed of its own name, then cut to this rank's part.

    So a weight does not depend on the layout, on the rank, or on which other parameters exist.
    """
    settings = model.model
    layers = {layer: layer.layer_number - 1 for layer in model.language_model.decoder.layers}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = checkpoint_name(_global_name(f"{prefix}.{leaf}", model, layers))
                _fill(parameter, name, settings, run_seed, model.groups)


def _global_name(name: str, model: VitaModel, layers: dict[nn.Module, int]) -> str:
    """A parameter's name with its layer counted over all pipeline stages."""
    prefix = "language_model.decoder.layers."
    if name.startswith(prefix):
        index, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{layers[model.language_model.decoder.layers[int(index)]]}.{rest}"
    if name == "language_model.output_layer.weight" and model.share_embeddings_and_output_weights:
        return "language_model.embedding.word_embeddings.weight"
    return name


def _fill(parameter: nn.Parameter, name: str, settings: ModelConfig, run_seed: int, groups: Groups) -> None:
    part, leaf = name.split(".")[0], name.rsplit(".", 1)[-1]
    if leaf in ("ls1", "ls2"):
        parameter.fill_(settings.vision.layer_scale_init)  # type: ignore[union-attr]
    elif leaf.endswith("bias"):
        parameter.zero_()
    elif "norm" in name.rsplit(".", 2)[-2] or leaf == "layer_norm_weight":
        parameter.fill_(1.0)
    else:
        parameter.copy_(_draw(parameter, name, part, settings, run_seed, groups))


def _draw(
    parameter: nn.Parameter, name: str, part: str, settings: ModelConfig, run_seed: int, groups: Groups
) -> torch.Tensor:
    """This rank's part of a normally distributed matrix."""
    vision = settings.vision
    std = vision.init_method_std if part == "vision_model" and vision is not None else settings.init_method_std
    if part == "language_model" and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2.0 * settings.num_layers)  # residual branches add up over the layers
    axis = getattr(parameter, "partition_dim", 0) if getattr(parameter, "tensor_model_parallel", False) else None
    shape = list(parameter.shape)
    vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
    if vocabulary:
        shape[0] = settings.vocab_size  # not the padded size, which depends on the layout
    elif axis is not None:
        shape[axis] *= groups.tp_size
    whole = torch.empty(shape).normal_(0.0, std, generator=seed.generator(run_seed, "weights", name))
    if vocabulary:
        padding = settings.padded_vocab_size(groups.tp_size) - settings.vocab_size
        whole = F.pad(whole, (0, 0, 0, padding))
    if axis is None:
        return whole
    if part == "language_model" and name.endswith("mlp.linear_fc1.weight"):
        gate, up = (half.chunk(groups.tp_size)[groups.tp_rank] for half in whole.chunk(2))
        return torch.cat([gate, up])
    return whole.chunk(groups.tp_size, dim=axis)[groups.tp_rank]


def _freeze(model: VitaModel, stage: StageConfig) -> None:
    frozen = (
        (model.vision_model, stage.train.freeze_vision_model),
        (model.vision_projection, stage.train.freeze_vision_projection),
        (model.language_model, stage.train.freeze_language_model),
    )
    for part, keep in frozen:
        if part is not None and keep:
            part.requires_grad_(False)
