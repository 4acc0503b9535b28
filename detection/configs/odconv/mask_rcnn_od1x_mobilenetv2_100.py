# Mask R-CNN on MobileNetV2 (1.0x), ODConv (1x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 35.0 (AP50 56.1, AP75 37.3); 25.22 M parameters,
# 3.66 M of them in the backbone; 176.08G multiply-adds.
# Here: 23.93 M and 3.66 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/od1x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
