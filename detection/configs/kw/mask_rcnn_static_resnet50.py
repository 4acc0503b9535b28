# Mask R-CNN on ResNet50, 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 39.6 (AP50 61.6, AP75 43.3), mask AP 36.4.  Parameters: 44.40 M,
# 23.51 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/resnet50/resnet50.json", frozen_stages=1, norm_eval=True))
