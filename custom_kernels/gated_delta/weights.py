"""What a GatedDeltaNet layer holds besides its projections, and its sizes."""

from dataclasses import dataclass

import mlx.core as mx

from ...errors import FlashMoEError
from ..shapes import expect


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes: `keys` heads of `key_dim`, `values` heads of `value_dim`."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class MixerWeights:
    """What a GatedDeltaNet layer holds besides its projections.

    Attributes:
        heads: Hk, Hv, Dk, Dv.
        conv: `[2 Hk Dk + Hv Dv, taps, 1]` depthwise kernel over q, k and v.
        a_log: `[Hv]`.
        dt_bias: `[Hv]`.
        norm: `[Dv]`.
        norm_eps: of the output norm.
        qk_eps: of the q and k norm, added to the sum of squares.
    """

    heads: Heads
    conv: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array
    norm_eps: float
    qk_eps: float = 1e-6

    @property
    def channels(self) -> int:
        """What the convolution runs over: q, k and v of all heads."""
        heads = self.heads
        return 2 * heads.keys * heads.key_dim + heads.values * heads.value_dim

    @property
    def projected(self) -> int:
        """Columns of the projections side by side: qkv, z, b and a."""
        return self.channels + self.heads.values * (self.heads.value_dim + 2)

    def check(self) -> None:
        """Compare the weights with the heads, by which the kernels index them.

        Raises:
            FlashMoEError: they do not belong together.
        """
        heads = self.heads
        if heads.values % heads.keys:
            raise FlashMoEError(
                f"{heads.values} value heads are no multiple of {heads.keys} key heads."
            )
        expect("conv1d.weight", self.conv, (self.channels, self.conv.shape[1], 1))
        expect("A_log", self.a_log, (heads.values,))
        expect("dt_bias", self.dt_bias, (heads.values,))
        expect("norm.weight", self.norm, (heads.value_dim,))

    def check_cache(self, past: mx.array, state: mx.array, batch: int) -> None:
        """Compare a layer's cache with the weights and the rows of a batch.

        Raises:
            FlashMoEError: it is another model's, or of other rows.
        """
        heads, taps = self.heads, self.conv.shape[1]
        expect("a GatedDeltaNet layer's past inputs", past, (batch, taps - 1, self.channels))
        shape = batch, heads.values, heads.value_dim, heads.key_dim
        expect("a GatedDeltaNet layer's state", state, shape)
