# Faster R-CNN on MobileNetV2 (1.0x), DY-Conv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 34.5 (AP50 55.6, AP75 36.5); 30.02 M parameters,
# 11.12 M of them in the backbone; 123.01G multiply-adds.
# Here: 28.75 M and 11.12 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/dy4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
