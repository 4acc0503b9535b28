# Mask R-CNN on MobileNetV2 (1.0x), ODConv (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 37.2 (AP50 59.4, AP75 39.9), mask AP 34.5.  Parameters: 30.50 M,
# 10.23 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/mobilenetv2_100/od4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
