# Mask R-CNN on MobileNetV2 (1.0x), ODConv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 35.8 (AP50 57.0, AP75 38.1); 31.80 M parameters,
# 10.24 M of them in the backbone; 176.10G multiply-adds.
# Here: 30.50 M and 10.23 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/od4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
