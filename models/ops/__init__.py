"""The operators of all dynamic convolutions: every sample has its own kernel, mixed from cells or given."""

from .convolution import conv, with_bias
from .mixture_conv import mixture_conv
from .naive import mixture_conv_naive
from .sample_conv import sample_conv

__all__ = ["conv", "mixture_conv", "mixture_conv_naive", "sample_conv", "with_bias"]
