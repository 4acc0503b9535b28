"""How the networks start for which the papers' authors released code: the setting `initialisation` "released".

timm starts ResNets with zeros in the last BatchNorm of every block, depth-wise kernels by the fan-out of one group, and
classifiers by its own rules.  KernelWarehouse's and ODConv's released networks do none of this; theirs is the way of
torchvision, whose networks they began from.  Dynamic layers and ConvNeXt start as released anyway.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .anatomy import family_name

# families whose released code starts them in another way than timm does
DIFFERENT = ("ResNet", "MobileNetV2")


def start_as_released(model, keep_classifier=False):
    """Draw the weights of a static ResNet or MobileNetV2 as the released code does; any other network keeps timm's.

    Convolutions are Kaiming-normal by fan-out, groups not regarded; BatchNorms 1 and 0; the classifier is normal with
    standard deviation 0.01 and biases 0.
    keep_classifier: of ResNets, whose released networks with warehouses leave it to PyTorch.
    """
    family = family_name(model)
    if family not in DIFFERENT:
        return
    keep_classifier = keep_classifier and family == "ResNet"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and not keep_classifier:
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
