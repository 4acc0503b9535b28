# Faster R-CNN on MobileNetV2 (1.0x), DCD, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 33.3 (AP50 53.0, AP75 35.1); 23.34 M parameters,
# 4.44 M of them in the backbone; 123.01G multiply-adds.
# Here: 21.89 M and 4.26 M; the paper's total has the backbone's classifier in it,
# its backbone the dynamic part of that.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/dcd_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
