"""Rotary position embedding (RoPE) of the decoder: base, rotated share of a head, scaling beyond the trained length.

ModelConfig inherits these settings. Names are Megatron's where Megatron has one: flags of Megatron-LM, and the `yarn_*`
attributes that megatron-core's GPTModel reads from its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """At most one scaling: linear (position interpolation), Llama 3.1's, or YaRN (arXiv:2309.00071)."""

    position_embedding_type: str = "rope"
    """`rope`, or `yarn`: with the settings yarn_*."""
    rotary_base: float = 1e6
    """Base of the rotary embedding (rope_theta)."""
    rotary_percent: float = 1.0
    """Share of each head that the rotary embedding turns, from its beginning (GLM-4: 0.5)."""
    rotary_interleaved: bool = False
    """It turns pairs of neighbours, rather than of the first half and the second (GLM-4)."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Linear scaling: position ids are divided by it. None: no linear scaling."""
    rope_scaling_factor: float | None = None
    """`factor` of Llama 3.1's rope_scaling (8 in Llama 3.1, 32 in Llama 3.2). None: no such scaling."""
    rope_scaling_low_freq_factor: float = 1.0
    """Llama 3.1's scaling divides the frequencies that turn less often than this in the original length ..."""
    rope_scaling_high_freq_factor: float = 4.0
    """... and keeps those that turn more often than this; it interpolates between them."""
    rope_scaling_original_max_position_embeddings: int = 8192
    """Original length of Llama 3.1's scaling."""
    yarn_rotary_scaling_factor: float | None = None
    """YaRN: `factor`, by which slow frequencies are divided."""
    yarn_original_max_position_embeddings: int | None = None
    """YaRN: length in tokens that the weights were trained with before."""
    yarn_beta_fast: float = 32.0
    """YaRN keeps the frequencies that turn more often than this in the original length ..."""
    yarn_beta_slow: float = 1.0
    """... and divides those that turn less often than this; it interpolates between them."""
    yarn_mscale: float | None = None
    """YaRN: with yarn_mscale_all_dim, numerator of the attention factor: (0.1 mscale ln factor + 1) / (...)."""
    yarn_mscale_all_dim: float | None = None
    """YaRN: its denominator, of the same form. None for both: the attention factor is 0.1 ln factor + 1."""
    yarn_attention_factor: float | None = None
    """YaRN: factor of cosines and sines, instead of the one that follows from factor and mscale (not Megatron's)."""
    yarn_correction_range_round_to_int: bool = True
    """YaRN: round the bounds of the interpolated range to whole dimensions (`truncate`)."""

    @property
    def rope_type(self) -> str:
        """As transformers calls the scaling: default, linear, llama3 or yarn."""
        if self.position_embedding_type == "yarn":
            return "yarn"
        if self.rope_scaling_factor is not None:
            return "llama3"
        return "default" if self.rotary_seq_len_interpolation_factor is None else "linear"

    def check_rotary(self) -> None:
        """Check the settings above.

        Raises:
            ConfigError: names the setting and its value.
        """
        factors = ("rotary_seq_len_interpolation_factor", "rope_scaling_factor", "yarn_rotary_scaling_factor")
        at_least(1, "model", self, *factors)
        at_least(
            1, "model", self, "rope_scaling_original_max_position_embeddings", "yarn_original_max_position_embeddings"
        )
        positive("model", self, "rotary_base", "rope_scaling_low_freq_factor", "yarn_beta_fast", "yarn_beta_slow")
        positive("model", self, "yarn_mscale", "yarn_mscale_all_dim", "yarn_attention_factor")
        if self.position_embedding_type not in ("rope", "yarn"):
            raise ConfigError(f"model.position_embedding_type={self.position_embedding_type!r}: choose rope or yarn.")
        given = [name for name in factors if getattr(self, name) is not None]
        if len(given) > 1:
            said = " and ".join(f"{name}={getattr(self, name)}" for name in given)
            raise ConfigError(f"model: {said} are two scalings of one rotary embedding. Keep one.")
        if self.rope_scaling_high_freq_factor <= self.rope_scaling_low_freq_factor:
            raise ConfigError(
                f"model.rope_scaling_high_freq_factor={self.rope_scaling_high_freq_factor} must be above "
                f"rope_scaling_low_freq_factor={self.rope_scaling_low_freq_factor}."
            )
        self._check_yarn()

    def _check_yarn(self) -> None:
        needed = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings")
        if self.position_embedding_type != "yarn":
            for field in RotaryConfig.__dataclass_fields__.values():
                if field.name.startswith("yarn_") and getattr(self, field.name) != field.default:
                    raise ConfigError(
                        f"model.{field.name}={getattr(self, field.name)} takes model.position_embedding_type=yarn, "
                        f"which is {self.position_embedding_type}."
                    )
            return
        for name in needed:
            if getattr(self, name) is None:
                raise ConfigError(f"model.position_embedding_type=yarn takes model.{name}, which is not set.")
        if self.rotary_base <= 1:
            raise ConfigError(f"model.rotary_base={self.rotary_base} must be above 1 with YaRN.")
        if not 1e-6 <= self.yarn_beta_slow <= self.yarn_beta_fast <= 1e6:
            raise ConfigError(
                f"model.yarn_beta_fast={self.yarn_beta_fast} must be at least yarn_beta_slow={self.yarn_beta_slow}, "
                "both from 1e-6 to 1e6."
            )
        if (self.yarn_mscale is None) != (self.yarn_mscale_all_dim is None):
            raise ConfigError(
                f"model.yarn_mscale={self.yarn_mscale} and yarn_mscale_all_dim={self.yarn_mscale_all_dim} act together "
                "only: set both or none."
            )
