# Mask R-CNN on MobileNetV2 (1.0x), DCD, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 34.3 (AP50 54.9, AP75 36.6); 26.00 M parameters,
# 4.44 M of them in the backbone; 176.09G multiply-adds.
# Here: 24.53 M and 4.26 M; the paper's total has the backbone's classifier in it,
# its backbone the dynamic part of that.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/dcd_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
