# The recipe of recipe_kw.py with what is ConvNeXt's own: the learning rate is divided at epochs 9 and 11 and decays by
# layers, drop path 0.4, and a layer scale of 1.
_base_ = "./recipe_kw.py"

model = dict(backbone=dict(drop_path=0.4, layer_scale_init_value=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]
optim_wrapper = dict(constructor="LayerDecay", paramwise_cfg=dict(_delete_=True, decay_rate=0.95))
