# Faster R-CNN on MobileNetV2 (1.0x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 31.3 (AP50 51.1, AP75 33.1); 21.13 M parameters,
# 2.22 M of them in the backbone; 122.58G multiply-adds.
# Here: 19.85 M and 2.22 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
