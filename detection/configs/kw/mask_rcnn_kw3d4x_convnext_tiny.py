# Mask R-CNN on ConvNeXt-Tiny, KW (3/4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 44.1 (AP50 66.8, AP75 48.4), mask AP 40.2.  Parameters: 44.03 M,
# 23.76 M of them in the backbone.
_base_ = "../_base_/recipe_kw_convnext.py"

model = dict(backbone=dict(config="configs/convnext/kw3d4x_convnext_tiny.json"))
# As in the released files: warehouses learn at the full rate, and layer scales decay.
optim_wrapper = dict(paramwise_cfg=dict(warehouses_at_full_rate=True, decay_layer_scale=True))
