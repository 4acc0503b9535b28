"""Networks of timm and torchvision, and some of other shapes: a U-Net, a detector, and for 1-d and 3-d input."""

import itertools

import timm
import torch
import torchvision
from torch import Tensor, nn

# name -> side of the image that it is tried with; the smallest that it takes without effort
TIMM = {
    **dict.fromkeys(
        """
        test_resnet test_efficientnet mobilenetv3_small_050 lcnet_050 tinynet_e regnetx_002 regnety_002 ghostnet_050
        fbnetc_100 mobilenetv2_140 efficientnet_lite0 efficientnet_b0 mnasnet_050 semnasnet_075 spnasnet_100
        hardcorenas_a mixnet_s rexnet_100 res2net50_14w_8s resnext50_32x4d seresnext26d_32x4d skresnet18 resnest14d
        ecaresnet26t dla34 densenet121 hrnet_w18_small vovnet39a darknet53 cspresnet50 repvgg_a0 mobileone_s0 selecsls42
        gernet_s nf_regnet_b0 convnext_atto convnextv2_atto edgenext_xx_small fastvit_t8
        efficientvit_b0 mobilevit_xxs poolformer_s12 inception_v3
        """.split(),
        96,
    ),
    **dict.fromkeys(
        """
        swin_tiny_patch4_window7_224 deit_tiny_patch16_224 convit_tiny pit_ti_224 levit_128s coat_tiny twins_svt_small
        mixer_s32_224 resmlp_12_224 efficientformerv2_s0
        """.split(),
        224,
    ),
    "maxxvit_rmlp_nano_rw_256": 256,
}
TORCHVISION = {
    **dict.fromkeys(("resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"), 96),
    **dict.fromkeys(("squeezenet1_1", "convnext_tiny", "regnet_y_400mf", "swin_t", "vit_b_16"), 224),
}


class Double(nn.Sequential):
    """Two convolutions with BatchNorm and ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        parts = [
            (nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
            for c in (c_in, c_out)
        ]
        super().__init__(*parts[0], *parts[1])


class UNet(nn.Module):
    """[B, 3, H, W] -> [B, 5, H, W], H and W multiples of 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(Double(a, b) for a, b in zip([3, *w[:-1]], w, strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, 2) for c in w[-2::-1])
        self.up = nn.ModuleList(Double(2 * c, c) for c in w[-2::-1])
        self.out = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, down in enumerate(self.down):
            x = down(nn.functional.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for enlarge, up, skip in zip(self.enlarge, self.up, kept[-2::-1], strict=True):
            x = up(torch.cat([enlarge(x), skip], 1))
        return self.out(x)


class Detector(nn.Module):
    """A pyramid whose levels share one head: [B, 3, H, W] -> [B, 9, boxes]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        steps = [3, width, 2 * width, 4 * width, 8 * width]
        self.backbone = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU(inplace=True))
            for a, b in itertools.pairwise(steps)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 64, 1) for c in steps[-3:])
        self.smooth = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))
        self.head = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(inplace=True), nn.Conv2d(64, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.backbone:
            x = stage(x)
            maps.append(x)
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps[-3:], strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + nn.functional.interpolate(maps[i + 1], maps[i].shape[2:])
        return torch.cat([self.head(smooth(x)).flatten(2) for smooth, x in zip(self.smooth, maps, strict=True)], 2)


def signal_net() -> nn.Module:
    """[B, 2, L] -> [B, 5], for time series."""
    layers, c = [nn.Conv1d(2, 32, 7, 2, 3)], 32
    for width in (32, 64, 128):
        layers += [nn.BatchNorm1d(c), nn.ReLU(inplace=True), nn.Conv1d(c, width, 5, 2, 2)]
        c = width
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(c, 5))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A network of this name, `timm:`, `torchvision:` or one of this file, and an input of two samples."""
    home, _, own = name.rpartition(":")
    if home == "timm":
        sizes = {"img_size": TIMM[own]} if own == "mixer" else {}
        return timm.create_model(own, num_classes=5, **sizes), torch.randn(2, 3, TIMM[own], TIMM[own])
    if home == "torchvision" and own in TORCHVISION:
        side = TORCHVISION[own]
        return torchvision.models.get_model(own, weights=None, num_classes=5), torch.randn(2, 3, side, side)
    return {
        "unet": lambda: (UNet(), torch.randn(2, 3, 48, 48)),
        "detector": lambda: (Detector(), torch.randn(2, 3, 64, 64)),
        "signal": lambda: (signal_net(), torch.randn(2, 2, 128)),
        "torchvision:r3d_18": lambda: (
            torchvision.models.video.r3d_18(num_classes=5),
            torch.randn(2, 3, 8, 32, 32),
        ),
    }[name]()


NETWORKS = [
    *(f"timm:{name}" for name in TIMM),
    *(f"torchvision:{name}" for name in TORCHVISION),
    "unet",
    "detector",
    "signal",
    "torchvision:r3d_18",
]
