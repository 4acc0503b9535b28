# Faster R-CNN on MobileNetV2 (1.0x), ODConv (1x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 34.3 (AP50 55.6, AP75 36.5); 22.56 M parameters,
# 3.66 M of them in the backbone; 123.00G multiply-adds.
# Here: 21.29 M and 3.66 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/od1x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
