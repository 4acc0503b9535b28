"""The initialisation of the papers' released networks: the setting `initialisation` "released".

timm initialises the last BatchNorm of every ResNet block with zeros, depth-wise kernels by the fan-out of one group,
and classifiers by its own rules. The released networks of KernelWarehouse and ODConv do none of this: they are derived
from torchvision's networks and are initialised as these are. Dynamic layers and ConvNeXt start as released anyway.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .anatomy import family_name

# families that the released code initialises in another way than timm does
DIFFERENT = ("ResNet", "MobileNetV2")


def start_as_released(model: nn.Module, keep_classifier: bool = False) -> None:
    """Draw the weights of a static ResNet or MobileNetV2 as the released code does; any other network keeps timm's.

    Convolutions are Kaiming-normal by a fan-out that ignores groups; BatchNorms have weights 1 and biases 0; the
    classifier is normal with standard deviation 0.01 and has biases 0.

    Args:
        model: changed in place.
        keep_classifier: leave the classifier of a ResNet unchanged. The released ResNets with warehouses leave theirs
            to PyTorch's initialisation.
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
