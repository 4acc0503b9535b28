# Mask R-CNN on ConvNeXt-Tiny, KW (1x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 44.8 (AP50 67.7, AP75 48.9), mask AP 40.6.  Parameters: 58.87 M,
# 38.60 M of them in the backbone.
_base_ = "../_base_/recipe_kw_convnext.py"

model = dict(backbone=dict(config="configs/convnext/kw1x_convnext_tiny.json"))
# As in the released files: warehouses learn at the full rate, and layer scales decay.
optim_wrapper = dict(paramwise_cfg=dict(warehouses_at_full_rate=True, decay_layer_scale=True))
