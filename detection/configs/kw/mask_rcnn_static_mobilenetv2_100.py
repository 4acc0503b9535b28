# Mask R-CNN on MobileNetV2 (1.0x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 33.8 (AP50 55.2, AP75 35.8), mask AP 31.7.  Parameters: 22.50 M,
# 2.22 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/mobilenetv2_100/mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
