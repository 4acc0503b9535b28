# Mask R-CNN on ConvNeXt-Tiny, 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 43.4 (AP50 65.8, AP75 47.7), mask AP 39.7.  Parameters: 48.09 M,
# 27.82 M of them in the backbone.
_base_ = "../_base_/recipe_kw_convnext.py"

model = dict(backbone=dict(config="configs/convnext/convnext_tiny.json"))
