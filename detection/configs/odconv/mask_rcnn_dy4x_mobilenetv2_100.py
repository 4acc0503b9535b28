# Mask R-CNN on MobileNetV2 (1.0x), DY-Conv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 35.2 (AP50 56.2, AP75 37.5); 32.68 M parameters,
# 11.12 M of them in the backbone; 176.09G multiply-adds.
# Here: 31.40 M and 11.12 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/mobilenetv2_100/dy4x_mobilenetv2_100.json", frozen_stages=1, norm_eval=True))
