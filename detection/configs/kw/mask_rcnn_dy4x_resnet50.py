# Mask R-CNN on ResNet50, DY-Conv (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 39.6 (AP50 62.1, AP75 43.1), mask AP 36.6.  Parameters: 119.72 M,
# 98.83 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/resnet50/dy4x_resnet50.json", frozen_stages=1, norm_eval=True))
