# Mask R-CNN on MobileNetV2 (1.0x), DY-Conv (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 37.0 (AP50 58.6, AP75 40.3), mask AP 34.1.  Parameters: 31.40 M,
# 11.12 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/mobilenetv2_100/dy4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
