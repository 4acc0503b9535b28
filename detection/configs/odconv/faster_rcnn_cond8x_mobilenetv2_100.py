# Faster R-CNN on MobileNetV2 (1.0x), CondConv (8x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 33.7 (AP50 54.9, AP75 35.6); 31.54 M parameters,
# 12.63 M of them in the backbone; 122.59G multiply-adds.
# Here: 30.26 M and 12.63 M; the paper's total has a static classifier of the backbone in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(
    backbone=dict(config="configs/mobilenetv2_100/cond8x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True)
)
