"""The options of settings that several methods share."""

from ..options import Option

KERNEL_NUM = Option(int, None, "kernels per layer; null: the method's default", low=1, high=64)
REDUCTION = Option(float, None, "hidden width of the attention relative to its input width", above=0, high=1)
ATTENTION_FUNCTION = Option(
    str, None, "attention function; null: the method's default (KW: caf; ODConv, DY-Conv: softmax)",
    choices=("softmax", "caf"),
)  # fmt: skip
ATTENTIONS_OPTION = Option(
    str, None, "ODConv, KR, KW*: attentions along these dimensions of the kernels", nargs="*",
    choices=("spatial", "channel", "filter", "kernel"),
)  # fmt: skip
ATTENTION_SHARING = Option(
    bool, None, "ODConv, KR: the kernels share spatial, channel and filter attentions (ODConv, Table 12)"
)
