from .naive import mixture_conv_naive as mixture_conv  # noqa: F401
