# Mask R-CNN on MobileNetV2 (1.0x), CondConv (8x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 34.4 (AP50 55.4, AP75 36.6); 34.19 M parameters,
# 12.63 M of them in the backbone; 175.67G multiply-adds.
# Here: 32.90 M and 12.63 M; the paper's total has a static classifier of the backbone in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(
    backbone=dict(config="configs/mobilenetv2_100/cond8x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True)
)
