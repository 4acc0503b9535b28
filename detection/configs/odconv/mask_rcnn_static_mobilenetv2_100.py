# Mask R-CNN on MobileNetV2 (1.0x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 32.2 (AP50 52.1, AP75 34.2); 23.78 M parameters,
# 2.22 M of them in the backbone; 175.66G multiply-adds.
# Here: 22.50 M and 2.22 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
