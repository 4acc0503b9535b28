# Faster R-CNN on MobileNetV2 (1.0x), ODConv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 35.1 (AP50 56.7, AP75 37.0); 29.14 M parameters,
# 10.24 M of them in the backbone; 123.02G multiply-adds.
# Here: 27.86 M and 10.23 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/od4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
